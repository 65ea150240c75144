from pathlib import Path

import pytest
import torch
from torch import nn

from sslfast.data.manifest import Manifest
from sslfast.evaluation.linear import LinearConfig
from sslfast.evaluation.semisup import SemisupConfig
from sslfast.evaluation.sgd import GOYAL, MOCO, SEMISUP, SEMISUP_SIMCLR, Hits, ResumeState, SGDProtocol, TrainingImages
from tests.evaluation.runs import write_data


@pytest.mark.parametrize(
    ("protocol", "epochs", "changes"),
    [
        (GOYAL, 28, {0: 0.01, 7: 0.01, 8: 1e-3, 15: 1e-3, 16: 1e-4, 24: 1e-5, 27: 1e-5}),
        (GOYAL, 14, {3: 0.01, 4: 1e-3, 8: 1e-4, 12: 1e-5}),  # Places205
        (GOYAL, 84, {23: 0.01, 24: 1e-3, 48: 1e-4, 72: 1e-5}),  # iNaturalist 2018
        (MOCO, 100, {0: 30.0, 59: 30.0, 60: 3.0, 79: 3.0, 80: 0.3, 99: 0.3}),
        (SEMISUP, 70, {0: 0.01, 29: 0.01, 30: 1e-3, 69: 1e-3}),
    ],
)
def test_published_schedules(protocol: SGDProtocol, epochs: int, changes: dict[int, float]) -> None:
    for epoch, rate in changes.items():
        assert protocol.learning_rate(epoch, epochs=epochs, batch_size=256) == pytest.approx(rate)
        assert protocol.learning_rate(epoch, epochs=epochs, batch_size=64) == pytest.approx(rate / 4)


def test_simclr_s_cosine() -> None:
    """Rate 0.05 per 256 images: 0.8 at 4096, a half of it in the middle, 0 at the end."""
    rates = [SEMISUP_SIMCLR.learning_rate(epoch, epochs=60, batch_size=4096) for epoch in (0, 30, 60)]
    assert rates == pytest.approx([0.8, 0.4, 0.0])
    assert SEMISUP_SIMCLR.learning_rate(59.5, epochs=60, batch_size=4096) > 0
    assert SEMISUP_SIMCLR.facts(60, 4096)["drops"] == []


def test_departures_are_named() -> None:
    assert GOYAL.departures(28, 256, "centre-crop") == []
    assert GOYAL.departures(2, 64, "whole", size=(64, 224)) == [
        "epochs: 2, published 28",
        "batch_size: 64, published 256",
        "preprocessing: whole, published centre-crop",
        "size: 64, published 224",
    ]


def test_published_settings() -> None:
    assert [(p.weight_decay, p.nesterov, p.epochs) for p in (GOYAL, MOCO, SEMISUP)] == [
        (5e-4, True, 28),
        (0.0, False, 100),
        (0.0, True, 70),
    ]
    assert [GOYAL.full_name(epochs) for epochs in (28, 14)] == ["linear-goyal", "linear-goyal-14ep"]
    optimizer = GOYAL.optimizer(nn.Sequential(nn.BatchNorm2d(3), nn.Linear(3, 2)), batch_size=128)
    decay = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups}
    assert optimizer.defaults["lr"] == pytest.approx(0.005)
    assert optimizer.defaults["momentum"] == 0.9
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    assert [[p.ndim for p in group["params"]] for group in optimizer.param_groups] == [[2, 1], [1, 1]], decay


def test_training_images_are_crops_and_flipped_crops(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_data(tmp_path, train=5, val=1) / "train")

    def images(seed: int) -> TrainingImages:
        return TrainingImages(
            manifest, size=16, batch_size=4, seed=seed, workers=0, on_bad_image="error", device=torch.device("cpu")
        )

    one = list(images(0).epoch(0))
    assert len(one) == 3  # 15 images, the part batch is dropped
    assert all(crops.shape == (4, 3, 16, 16) and crops.dtype == torch.uint8 for crops, _ in one)
    for (a, labels), (b, same) in zip(one, images(0).epoch(0), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, same)
    # The brightest channel says the class.
    for crops, labels in one:
        assert torch.equal(crops.float().mean((2, 3)).argmax(1), 2 - labels)
    raw = images(0)
    mirrored = [
        not torch.equal(batch.crops["image"][i], crops[i])
        for batch, (crops, _) in zip(raw.loader.epoch(0), images(0).epoch(0), strict=True)
        for i in range(4)
    ]
    assert 0 < sum(mirrored) < len(mirrored)
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(one, images(1).epoch(0), strict=True))


def test_hits() -> None:
    hits = Hits()
    logits = torch.eye(7) * 9 + torch.arange(7) * 0.1
    hits.add({"a": logits, "b": -logits}, torch.arange(7))
    hits.add({"a": logits[:1], "b": -logits[:1]}, torch.tensor([3]))
    shares, count = hits.shares(["a", "b"], torch.device("cpu"))
    assert count == 8
    assert shares["a"] == (7 / 8, 1.0)
    assert shares["b"][0] == 0.0


def test_resume_state(tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "a" / "state.pt"
    resume = ResumeState(path, {"epochs": 5, "layers": ("res5",)})
    assert resume.load(module, optimizer) == 0
    resume.save(module, optimizer, 3)
    other = nn.Linear(3, 2)
    restored = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    assert ResumeState(path, {"epochs": 5, "layers": ("res5",)}).load(other, restored) == 3
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(
        restored.state[other.weight]["momentum_buffer"], optimizer.state[module.weight]["momentum_buffer"]
    )
    assert ResumeState(path, {"epochs": 6, "layers": ("res5",)}).load(other, restored) == 0
    path.write_bytes(path.read_bytes()[:300])
    assert resume.load(other, restored) == 0
    resume.remove()
    assert list(path.parent.iterdir()) == []


def test_checks_of_configurations() -> None:
    for config, options, words in (
        (SemisupConfig, {"epochs": 0}, "epochs must be at least 1"),
        (SemisupConfig, {"batch_size": 0}, "batch_size must be at least 1"),
        (LinearConfig, {"seeds": ()}, "seeds must be whole numbers from 0 on, at least one and all different"),
        (LinearConfig, {"seeds": (1, 1)}, "seeds must be whole numbers from 0 on, at least one and all different"),
    ):
        with pytest.raises(ValueError, match=words):
            config(**options)  # type: ignore[arg-type]
