import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.config import from_dict
from sslfast.evaluation import semisup
from sslfast.evaluation.encoders import TrunkEncoder, load_run
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.semisup import (
    FineTuned,
    SemisupConfig,
    evaluate_semisup,
    fine_tune,
    norm_images,
    published_protocol,
    render_table,
)
from sslfast.evaluation.sgd import SEMISUP, SEMISUP_SIMCLR, ResumeState, TrainingImages, count_hits
from sslfast.models import ResNetConfig, build_trunk
from tests.evaluation.runs import write_data, write_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=8, val=3)


def test_all_weights_train_and_the_encoder_is_not_modified() -> None:
    encoder = TrunkEncoder(build_trunk(ResNetConfig(name="resnet18"), seed=0))
    model = FineTuned(encoder, classes=3, seed=0).train()
    images = torch.arange(2 * 3 * 24 * 24).remainder(251).to(torch.uint8).reshape(2, 3, 24, 24)
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not encoder.trunk.training
    assert not encoder.trunk.bn1.running_mean.any()  # type: ignore[union-attr, operator]
    assert model.trunk.bn1.running_mean.any()  # type: ignore[union-attr, operator]
    model.eval()
    with torch.no_grad():
        fresh = FineTuned(encoder, classes=3, seed=0).eval()
        torch.testing.assert_close(fresh(images), fresh.classifier(encoder(images)))


def test_semisup(run: Path, data: Path) -> None:
    before = load_run(run).encoders["trained"].identity()["weights"]
    config = SemisupConfig(fraction=0.25, epochs=3, batch_size=3, device="cpu", seeds=(0, 1))
    result = evaluate_semisup(run, data, config)
    assert from_dict(SemisupConfig, result["config"]) == config
    assert json.loads((run / "evaluation" / "semisup-25%.json").read_text()) == result
    assert result["protocol"] == "semisup-3ep-25%"
    assert (result["drops"], result["lr"], result["weight_decay"]) == ([1], 0.01 * 3 / 256, 0.0)
    assert result["subset"]["images"] == [6, 6]
    assert len(set(result["subset"]["digests"])) == 2
    assert result["data"]["train"] | {"digest": ""} == {"images": 6, "left_out": 0, "digest": ""}
    (row,) = result["results"]
    assert len(row["top1_of_seeds"]) == 2
    assert row["top5"] == 1.0  # of three classes
    assert "semisup-3ep-25%: 3 classes, 6 training and 9 validation" in render_table(result)
    assert "mean and spread of 2 seeds" in render_table(result)
    assert load_run(run).encoders["trained"].identity()["weights"] == before
    assert not list((run / "evaluation").glob("*.partial.pt"))


class TinyTrunk(nn.Module):
    out_features = 8

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layers(images).mean((2, 3)))


def test_batchnorm_over_parts_is_that_of_processes(data: Path) -> None:
    """Two parts of four images: the gradient is the mean of two processes', the statistics are the first one's."""
    train, _ = load_manifests(data)
    fast = replace(SEMISUP, lr_per_256_images=1.0)

    def model() -> FineTuned:
        return FineTuned(TrunkEncoder(TinyTrunk()), classes=3, seed=0)

    images = TrainingImages(train, size=16, batch_size=24, seed=0, workers=0, on_bad_image="error", device=CPU)
    ((crops, labels),) = images.epoch(0)
    whole = model()
    fine_tune(
        whole, images, fast, epochs=1, batch_size=24, device=CPU, precision=torch.float32, norm_batch=8,
        resume=ResumeState(None, {}),
    )  # fmt: skip
    replicas = [model().train() for _ in range(3)]
    for one, some, own in zip(replicas, crops.split(8), labels.split(8), strict=True):
        cross_entropy(one(some), own).backward()
    start = model()
    lr = fast.learning_rate(0, epochs=1, batch_size=24)
    for name, value in whole.named_parameters():
        gradients = [dict(one.named_parameters())[name].grad for one in replicas]
        step = lr * 1.9 * torch.stack(gradients).mean(0)  # type: ignore[arg-type]
        torch.testing.assert_close(value, dict(start.named_parameters())[name] - step)  # Nesterov: g + 0.9 g
    for name, value in whole.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(value, dict(replicas[0].named_buffers())[name])
    assert whole.trunk.layers[1].momentum == 0.1  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"batch_size": 256}, 32), ({"batch_size": 32}, 32), ({"batch_size": 48}, None), ({"batch_size": 6}, None),
        ({"batch_size": 48, "norm_batch": 16}, 16), ({"batch_size": 256, "protocol": "simclr"}, None),
    ],
)  # fmt: skip
def test_images_of_batchnorm(options: dict[str, Any], found: int | None) -> None:
    config = SemisupConfig(**options)
    assert norm_images(config, published_protocol(config.protocol, 0.01)) == found


def test_vissl_s_rate() -> None:
    """configs/config/benchmark/semi_supervised: 0.05 and 0.005 with SimCLR's lists, PIRL's lists set 0.01 and 0.001."""
    rates = {
        name: [published_protocol(name, 0.01).learning_rate(epoch, epochs=70, batch_size=256) for epoch in (29, 30)]
        for name in ("pirl", "vissl")
    }
    assert rates == {"pirl": pytest.approx([0.01, 0.001]), "vissl": pytest.approx([0.05, 0.005])}
    assert published_protocol("vissl", 0.1).full_name(70) == "semisup-vissl"


def test_simclr_s_epochs() -> None:
    assert published_protocol("simclr", 0.01) == SEMISUP_SIMCLR
    assert published_protocol("simclr", 0.1).epochs == 30
    with pytest.raises(ValueError, match="norm_batch=5 must divide each process's 48 images of a batch"):
        norm_images(SemisupConfig(batch_size=48, norm_batch=5), SEMISUP)


def test_fine_tuning_learns_colours(data: Path) -> None:
    protocol = replace(SEMISUP, lr_per_256_images=10.0)
    train, val = load_manifests(data)
    model = FineTuned(TrunkEncoder(TinyTrunk()), classes=3, seed=0)
    images = TrainingImages(train, size=16, batch_size=8, seed=0, workers=0, on_bad_image="error", device=CPU)
    begun = {name: value.clone() for name, value in model.named_parameters()}
    fine_tune(
        model, images, protocol, epochs=14, batch_size=8, device=CPU, precision=torch.float32,
        resume=ResumeState(None, {}),
    )  # fmt: skip
    assert not any(torch.equal(begun[name], value) for name, value in model.named_parameters())
    labels = torch.from_numpy(val.labels)
    found, count = count_hits(lambda x: {"": model(x)}, [""], ImageReader(val, 16), labels, CPU)
    assert (found[""], count) == ((1.0, 1.0), 9)


def test_subset_file(run: Path, data: Path, tmp_path: Path) -> None:
    names = tmp_path / "few.txt"
    names.write_text("\n".join(f"{name}/{i}.png" for name in ("blue", "green", "red") for i in (1, 4)))
    config = SemisupConfig(subset=names, epochs=1, batch_size=6, device="cpu")
    result = evaluate_semisup(run, data, config, output=tmp_path / "out.json")
    assert result["protocol"] == "semisup-1ep-few"
    assert result["norm_batch"] == 6
    assert "norm_batch: None, published 32" in result["departures"]
    simclr = replace(config, protocol="simclr", epochs=2, norm_batch=3)
    other = evaluate_semisup(run, data, simclr, output=tmp_path / "simclr.json")
    assert (other["protocol"], other["norm_batch"]) == ("semisup-simclr-2ep-few", 3)
    assert other["learning_rate"] == "cosine to 0, by step"
    assert "batch_size: 6, published 4096" in other["departures"]
    assert (result["subset"]["file"], result["subset"]["images"]) == (str(names), [6])


def test_stopped_evaluation_resumes(run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SemisupConfig(fraction=0.25, epochs=3, batch_size=6, device="cpu")
    whole = evaluate_semisup(run, data, config, output=tmp_path / "whole.json")
    begun: list[int] = []

    def stop(losses: dict[str, torch.Tensor], epoch: int, *, remedy: str) -> None:
        begun.append(epoch)
        if len(begun) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(semisup, "check_finite", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_semisup(run, data, config, output=tmp_path / "parts.json")
    parts = evaluate_semisup(run, data, config, output=tmp_path / "parts.json")
    assert begun == [0, 1, 1, 2]
    assert parts["results"] == whole["results"]


def test_errors(run: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="fraction must be above 0"):
        SemisupConfig(fraction=0.0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        SemisupConfig(epochs=0)
    with pytest.raises(ValueError, match=r"batch_size=256 is larger than the data set \(3 images\)"):
        evaluate_semisup(run, data, SemisupConfig(device="cpu"))
