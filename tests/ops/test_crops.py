"""Crops resized by the compiled core: equal to torch's interpolate to the last bit, whatever boxes, sizes, channels."""

import ctypes.util
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sslfast.ops import crops

Box = crops.Box


def expected(pixels: Tensor, box: Box, size: int) -> Tensor:
    left, top, right, bottom = box
    part = pixels.permute(2, 0, 1)[None, :, top:bottom, left:right]
    return interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0].expand(3, size, size)


def cropped(pixels: Tensor, boxes: list[Box], sizes: list[int], **options: int) -> list[Tensor]:
    outs = [torch.full((3, size, size), 77, dtype=torch.uint8) for size in sizes]
    crops.crop_pixels(pixels, boxes, outs, **options)
    return outs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("contrast", [False, True])
def test_awkward_boxes_equal_torch(channels: int, contrast: bool) -> None:
    draw = random.Random(channels)
    for _ in range(60):
        width, height = draw.randint(1, 150), draw.randint(1, 150)
        pixels = torch.from_numpy(
            np.frombuffer(draw.randbytes(width * height * channels), np.uint8).reshape(height, width, channels).copy()
        )
        pixels = torch.where(pixels > 127, 255, 0).to(torch.uint8) if contrast else pixels
        boxes, sizes = [], []
        for _ in range(3):
            left, top = draw.randrange(width), draw.randrange(height)
            boxes.append((left, top, draw.randint(left + 1, width), draw.randint(top + 1, height)))
            sizes.append(draw.choice([1, 2, 7, 8, 9, 31, 32, 33, 64, 97]))
        for box, size, crop in zip(boxes, sizes, cropped(pixels, boxes, sizes), strict=True):
            assert torch.equal(crop, expected(pixels, box, size)), (width, height, box, size)


@pytest.mark.parametrize("sides", [(1, 1), (1, 400), (999, 3), (700, 900)])
def test_extreme_sides_equal_torch(sides: tuple[int, int]) -> None:
    width, height = sides
    pixels = (torch.arange(width * height * 3, dtype=torch.int64) * 7919 % 256).to(torch.uint8).view(height, width, 3)
    for size in (1, 5, 64, 224):
        (crop,) = cropped(pixels, [(0, 0, width, height)], [size])
        assert torch.equal(crop, expected(pixels, (0, 0, width, height), size))


def test_a_box_of_the_crops_size_is_copied_and_a_constant_stays() -> None:
    pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
    (crop,) = cropped(pixels, [(7, 5, 39, 37)], [32])
    assert torch.equal(crop, pixels[5:37, 7:39].permute(2, 0, 1))
    for level in (0, 1, 128, 255):
        (crop,) = cropped(torch.full((33, 65, 3), level, dtype=torch.uint8), [(3, 1, 62, 30)], [45])
        assert crop.unique().tolist() == [level]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_the_crop(orientation: int) -> None:
    from tests.pictures import UPRIGHT

    pixels = torch.randint(0, 256, (31, 44, 3), dtype=torch.uint8)
    (stored,), (crop,) = (cropped(pixels, [(2, 3, 40, 29)], [17], orientation=o) for o in (1, orientation))
    upright = UPRIGHT[orientation](stored.permute(1, 2, 0).numpy())
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), upright)


def test_markers_are_found_wherever_they_are() -> None:
    draw = random.Random(0)
    for length in (0, 1, 2, 3, 64, 5000):
        data = bytes(draw.choice([0xFF, 0xFF, 0, 1, 0xD9]) for _ in range(length))
        where = [i for i in range(length - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
        found = crops.find_markers(data)
        assert found is not None
        assert (found[0].tolist(), found[1].tolist()) == (where, [data[i + 1] for i in where])


def test_a_library_without_libjpeg_is_named() -> None:
    for path in ("/no/such/library.so", ctypes.util.find_library("m") or "libm.so.6"):
        assert crops.bind_libjpeg(path) == "no shared libjpeg-turbo"
