"""The pixels that a network sees, beside torchvision's transforms of the same picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from sslfast.data import Manifest
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.preprocessing import describe, preprocess, resized_side
from sslfast.evaluation.results import cache_folder
from sslfast.evaluation.svm import SvmConfig
from tests.evaluation.runs import write_data, write_run

SIZES = [(500, 375), (375, 500), (100, 80), (80, 121), (256, 256), (224, 224), (300, 223), (33, 500), (1100, 900)]
"""Ordinary, portrait, small (shorter side under 256), odd and long pictures: width, height."""


def picture(width: int, height: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_centre_crop_is_torchvision_s(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    published = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    assert np.array_equal(preprocess(pixels, 224, "centre-crop"), np.array(published(Image.fromarray(pixels))))


@pytest.mark.parametrize("size", SIZES)
def test_the_bicubic_crop_is_that_of_dino_s_knn(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    bicubic = transforms.InterpolationMode.BICUBIC
    published = transforms.Compose([transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224)])
    assert np.array_equal(preprocess(pixels, 224, "centre-crop-bicubic"), np.array(published(Image.fromarray(pixels))))
    assert "Pillow bicubic" in describe("centre-crop-bicubic", 224)


@pytest.mark.parametrize("size", SIZES)
def test_whole_is_that_of_vissl_s_voc07_svm(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    published = transforms.Compose([transforms.Resize(256), transforms.Resize([224, 224])])
    assert np.array_equal(preprocess(pixels, 224, "whole"), np.array(published(Image.fromarray(pixels))))


@pytest.mark.parametrize("size", [(40, 32), (32, 32), (20, 31)])
def test_centre_square(size: tuple[int, int]) -> None:
    pixels = picture(*size)
    published = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    assert np.array_equal(preprocess(pixels, 32, "centre-square"), np.array(published(Image.fromarray(pixels))))
    if size == (32, 32):
        assert np.array_equal(preprocess(pixels, 32, "centre-square"), pixels)


def test_very_long_pictures_take_no_memory() -> None:
    """The same rule, but only what is seen is resized: resizing all of it would take a gigabyte here."""
    pixels = np.broadcast_to(np.arange(200_000, dtype=np.uint32)[None, :, None] // 800, (8, 200_000, 3)).astype(
        np.uint8
    )
    seen = preprocess(pixels, 224, "centre-crop")
    assert seen.shape == (224, 224, 3)
    assert (abs(seen.astype(int) - 125) <= 1).all()  # the middle
    assert preprocess(pixels, 224, "whole")[0, [0, -1], 0].tolist() == pytest.approx([0, 249], abs=2)
    rows = preprocess(picture(64, 1100), 224, "centre-crop")
    exact = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    assert abs(rows.astype(int) - np.array(exact(Image.fromarray(picture(64, 1100))))).max() <= 1


def test_what_is_seen_by_default() -> None:
    assert resized_side(224, "centre-crop") == 256
    assert ImageConfig().seen(224) == "centre-crop"
    assert ImageConfig().seen(32) == ImageConfig().seen(64) == "centre-square"
    assert SvmConfig().seen(224, default="whole") == SvmConfig().seen(32, default="whole") == "whole"
    assert ImageConfig(preprocessing="whole").seen(32) == "whole"
    assert describe("centre-crop", 224).startswith("centre-crop: shorter side to 256, centre crop 224; Pillow bilinear")


def test_the_reader_gives_these_pixels(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    pixels = picture(61, 90)
    Image.fromarray(pixels).save(tmp_path / "c" / "0.png")
    for how in ("centre-crop", "centre-square", "whole"):
        ((_, seen),) = ImageReader(Manifest.scan(tmp_path), 24, preprocessing=how)([0])  # type: ignore[arg-type]
        assert torch.equal(seen[0], torch.from_numpy(preprocess(pixels, 24, how)).permute(2, 0, 1))  # type: ignore[arg-type]


def test_features_of_another_preprocessing_are_never_read(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=2, val=1)

    def evaluate(how: str) -> tuple[str, list[str], int]:
        config = KnnConfig(k=(1,), device="cpu", preprocessing=how)  # type: ignore[arg-type]
        result = evaluate_knn(run, data, config)
        return result["preprocessing"], result["departures"], len(list(cache_folder(run).iterdir()))

    first = evaluate("centre-crop")
    second = evaluate("whole")
    assert second[2] == 2 * first[2]
    assert evaluate("whole") == second
    assert (first[0], second[0]) == (describe("centre-crop", 24), describe("whole", 24))
    assert first[1] == ["size: 24, published 224", "preprocessing: centre-crop, published centre-crop-bicubic"]
    assert second[1] == ["size: 24, published 224", "preprocessing: whole, published centre-crop-bicubic"]
    assert evaluate("centre-crop-bicubic")[1] == ["size: 24, published 224"]
    with pytest.raises(ValueError, match=r"dali resizes by the triangular filter alone: bicubic takes --loader pillow"):
        ImageReader(Manifest.scan(data / "val"), 24, preprocessing="centre-crop-bicubic", loader="dali")
