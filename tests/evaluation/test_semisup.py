import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from sslfast.config import from_dict
from sslfast.evaluation import semisup
from sslfast.evaluation.encoders import TrunkEncoder, load_run
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.semisup import FineTuned, SemisupConfig, evaluate_semisup, fine_tune, render_table
from sslfast.evaluation.sgd import ResumeState, TrainingImages, count_hits
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


def test_fine_tuning_learns_colours(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semisup, "SEMISUP", replace(semisup.SEMISUP, lr_per_256_images=10.0))
    train, val = load_manifests(data)
    model = FineTuned(TrunkEncoder(TinyTrunk()), classes=3, seed=0)
    images = TrainingImages(train, size=16, batch_size=8, seed=0, workers=0, on_bad_image="error", device=CPU)
    begun = {name: value.clone() for name, value in model.named_parameters()}
    fine_tune(model, images, epochs=14, batch_size=8, device=CPU, precision=torch.float32, resume=ResumeState(None, {}))
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
