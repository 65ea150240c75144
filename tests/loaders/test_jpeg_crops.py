"""The direct decoder of common JPEGs: Pillow's pixels for every kind of file, and Pillow's outcome for damaged ones."""

import io
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sslfast.data import BadImageError, scan_jpeg
from sslfast.data.images import DEFAULT_DECODING, open_image
from sslfast.loaders import jpeg_crops
from sslfast.loaders.decode import decode_crops
from sslfast.loaders.jpeg_crops import common_jpeg, why_pillow
from sslfast.ops import crops
from tests.pictures import encoded, picture

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 30},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive, restart markers": {"progressive": True, "subsampling": 0, "restart_marker_rows": 1},
}


def relabelled(factors: int, width: int, height: int, **options: int) -> bytes:
    """A JPEG whose luma has other sampling factors than Pillow can write, with as many blocks: noise, but valid."""
    columns, rows = factors >> 4, factors & 15
    side = 16 if columns * rows == 4 else 8  # what 4:2:0 and 4:2:2 have in a unit of 16 columns
    units = -(-width // (8 * columns)), -(-height // (8 * rows))
    data = bytearray(encoded(picture(16 * units[0], side * units[1]), **options))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    data[frame + 11] = factors
    return bytes(data)


LAYOUTS = {"4:1:1": (0x41, 2), "1x4": (0x14, 2), "4:4:0": (0x12, 1)}


def pillow_crop(data: bytes, box: crops.Box, size: int, factor: int) -> Tensor:
    image = Image.open(io.BytesIO(data))
    if factor > 1:
        image.draft(None, (max(image.width // factor, 1), max(image.height // factor, 1)))
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)
    left, top, right, bottom = box
    part = pixels[None, :, top:bottom, left:right]
    return interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0].expand(3, size, size)


def check_file(data: bytes, *, factors: tuple[int, ...] = (1,), boxes: int = 3, key: int = 0) -> None:
    """Boxes all over the file, together and one by one, at every scale."""
    draw, scan = random.Random(key), scan_jpeg(data)
    for factor in factors:
        width, height = -(-scan.width // factor), -(-scan.height // factor)
        chosen: list[crops.Box] = [(0, 0, width, height)]
        for _ in range(boxes):
            left, top = draw.randrange(width), draw.randrange(height)
            right, bottom = draw.randint(left + 1, width), draw.randint(top + 1, height)
            chosen.append((left, top, min(right, left + 40), min(bottom, top + 40)))
        for together in ([box] for box in chosen), [chosen[1:]]:
            for group in together:
                sizes = [draw.choice([5, 16, 33]) for _ in group]
                outs = [torch.empty(3, size, size, dtype=torch.uint8) for size in sizes]
                shape = (scan.width, scan.height)
                assert crops.crop_jpeg(data, group, outs, size=shape, channels=len(scan.components), factor=factor), (
                    "reported as damaged"
                )
                for box, size, out in zip(group, sizes, outs, strict=True):
                    assert torch.equal(out, pillow_crop(data, box, size, factor)), (shape, factor, box, size)


def test_pillows_library_is_called_directly() -> None:
    assert why_pillow() == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pillows(kind: str, mode: str) -> None:
    for key, (width, height) in enumerate([(261, 307), (64, 400), (400, 65), (8, 8)]):
        data = encoded(picture(width, height, key).convert(mode), **KINDS[kind])
        check_file(data, factors=(1, 2, 4, 8), key=key)


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "progressive"])
def test_every_small_size(kind: str) -> None:
    for side in range(1, 34):
        factors = (1, 2) if 2 <= side <= 32 else (1,)  # Pillow does not scale a side of 1
        check_file(encoded(picture(side, 34 - side), **KINDS[kind]), factors=factors, boxes=1, key=side)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_chroma(layout: str) -> None:
    factors, subsampling = LAYOUTS[layout]
    for key, (width, height) in enumerate([(150, 190), (33, 200), (200, 31)]):
        data = relabelled(factors, width, height, subsampling=subsampling)
        check_file(data, factors=(1, 2, 4, 8), key=key)


def test_a_progressive_file_that_ends_early_is_smoothed_alike() -> None:
    data = encoded(picture(200, 230), progressive=True)
    starts = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xc4"]
    for end in starts[2:6]:
        short = data[:end] + b"\xff\xd9"
        assert scan_jpeg(short).is_common
        check_file(short, factors=(1, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_and_scale_are_those_of_the_pillow_path(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(150, 110), exif=exif)
    for boxes, sizes in (
        ([[5, 11, 60, 66], [3, 2, 90, 100]], [20, 31]),
        ([[1, 1, 100, 99], [0, 0, 110, 110]], [24, 9]),
    ):
        found = common_jpeg(data, DEFAULT_DECODING)
        assert found is not None
        chosen = [np.array(box) for box in boxes]
        direct, pillow = (decode_crops(image, chosen, sizes) for image in (found, open_image(data)))
        assert all(torch.equal(a, b) for a, b in zip(direct, pillow, strict=True))


def outcome(data: bytes, *, direct: bool) -> list[Tensor] | str:
    """The crops of a file, or why it is bad."""
    boxes, sizes = [np.array([20, 30, 90, 85]), np.array([0, 60, 120, 100])], [32, 24]
    try:
        found = common_jpeg(data, DEFAULT_DECODING) if direct else None
        image = open_image(data) if found is None else found
        if (image.width, image.height) != (120, 100):
            return f"{image.width} x {image.height}"
        return decode_crops(image, boxes, sizes)
    except BadImageError as error:
        return error.reason


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "restart markers"])
def test_damaged_files_have_the_outcome_of_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, whole = random.Random(1), encoded(picture(120, 100, 3), **KINDS[kind])
    through = []
    original = jpeg_crops.crops.crop_jpeg
    monkeypatch.setattr(jpeg_crops.crops, "crop_jpeg", lambda *a, **k: through.append(original(*a, **k)) or through[-1])
    bad = 0
    for number in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(2, len(data))] = draw.randrange(256)
        if number % 5 == 0:
            start = draw.randrange(len(data))
            del data[start : start + draw.randint(1, 40)]
        direct, pillow = (outcome(bytes(data), direct=way) for way in (True, False))
        if isinstance(direct, str) or isinstance(pillow, str):
            bad += 1
            assert direct == pillow, number
        else:
            assert all(torch.equal(a, b) for a, b in zip(direct, pillow, strict=True)), number
    assert bad
    assert {True, False} == set(through)


def test_another_file_than_told_is_refused() -> None:
    data = encoded(picture(60, 50))
    out = torch.empty(3, 8, 8, dtype=torch.uint8)
    for size, channels in (((60, 51), 3), ((61, 50), 3), ((60, 50), 1)):
        assert not crops.crop_jpeg(data, [(0, 0, 9, 9)], [out], size=size, channels=channels)
    cmyk = encoded(picture(60, 50).convert("CMYK"))
    assert not crops.crop_jpeg(cmyk, [(0, 0, 9, 9)], [out], size=(60, 50), channels=3)
    assert not crops.crop_jpeg(data[: len(data) // 2], [(0, 0, 60, 50)], [out], size=(60, 50), channels=3)
    assert not crops.crop_jpeg(b"", [(0, 0, 9, 9)], [out], size=(60, 50), channels=3)


def test_without_the_direct_decoder_pillow_gives_the_same_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    data, boxes = encoded(picture(90, 80)), [np.array([3, 4, 80, 70])]
    found = common_jpeg(data, DEFAULT_DECODING)
    assert found is not None
    (direct,) = decode_crops(found, boxes, [40])
    monkeypatch.setattr(jpeg_crops, "why_pillow", lambda: "no compiled core")
    (pillow,) = decode_crops(found, boxes, [40])
    monkeypatch.setitem(decode_crops.__globals__, "is_compiled", lambda: False)
    (plain,) = decode_crops(found, boxes, [40])
    assert torch.equal(direct, pillow)
    assert torch.equal(direct, plain)
