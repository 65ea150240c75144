"""The transform of weights gives their trunk what evaluations give it; beside torchvision's own."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import sslfast
from sslfast.models import ResNetConfig, build_trunk
from sslfast.recipes.registry import RECIPES
from sslfast.training.trainer import Trainer
from tests.evaluation.runs import write_data, write_run
from tests.methods.harness import tiny, tiny_trunks
from tests.tiny import write_images


def test_features_are_those_of_embed(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1) / "train"
    transform = sslfast.transform(run)
    assert str(transform).startswith("centre-square: shorter side to 24, centre crop 24; ")
    found = sslfast.embed(run, data, device="cpu")
    images = torch.stack([transform(data / path) for path in found.paths])
    with torch.no_grad():
        torch.testing.assert_close(sslfast.load(run)(images), found.values, rtol=1e-5, atol=1e-5)


def test_a_trunk_that_sees_lightness(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 6)
    config = replace(tiny(RECIPES["colorization-small"]()), epochs=1)
    with tiny_trunks():
        Trainer(config, 2 * config.batch_size, tmp_path / "run", report=lambda _line: None).fit()
        found, trunk = sslfast.embed(tmp_path / "run", tmp_path / "data", device="cpu"), sslfast.load(tmp_path / "run")
        transform = sslfast.transform(tmp_path / "run")
    assert transform.colours == "lightness"
    images = torch.stack([transform(tmp_path / "data" / path) for path in found.paths])
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), found.values, rtol=1e-5, atol=1e-5)


def test_beside_torchvision(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(build_trunk(ResNetConfig(name="resnet18"), seed=0).state_dict(), weights)
    transform = pickle.loads(pickle.dumps(sslfast.transform(weights)))
    assert (transform.size, transform.preprocessing) == (224, "centre-crop")
    theirs = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (190, 300, 3), dtype=np.uint8))
    expected = theirs(image)
    file = io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    for given in (image, np.asarray(image), file.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        torch.testing.assert_close(transform(given), expected, rtol=1e-6, atol=1e-6)
    assert sslfast.transform(weights, size=32, preprocessing="whole")(image).shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], got float32 \[3, 4, 4\]"):
        transform(np.zeros((3, 4, 4), np.float32))
