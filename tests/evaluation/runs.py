"""Run directories and labelled folders for evaluation tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from sslfast.config import save_json, to_dict
from sslfast.methods.pirl import PIRL
from sslfast.models.resnet import ResNetConfig
from sslfast.runs.checkpoint import save_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, ViewConfig
from tests.tiny import context

COLOURS = {"blue": (30, 40, 200), "green": (30, 200, 60), "red": (210, 40, 30)}


def run_config(*, seed: int = 3, size: int = 24) -> TrainConfig:
    return TrainConfig(
        recipe="test",
        method=PIRL.Config(pretext_weight=0.0, image_view=ViewConfig(crop=CropConfig(size=size))),
        model=ResNetConfig(name="resnet18"),
        seed=seed,
    )


def write_run(path: Path, *, seed: int = 3, size: int = 24, weights_seed: int = 8) -> Path:
    """A finished run whose weights are those of another seed."""
    config = run_config(seed=seed, size=size)
    method = config.method.build(context(config.model, 4, seed=weights_seed))
    path.mkdir(parents=True)
    save_json(path / "config.json", to_dict(config))
    save_checkpoint(path / "checkpoints", {"step": 5, "method": method.state_dict()}, 5)
    return path


def write_data(root: Path, *, train: int, val: int, side: int = 30) -> Path:
    """Classes of one colour each, with noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            for number in range(count):
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = rng.integers(-25, 26, (side, side + number, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return root
