"""Crops of one decoded image against Pillow and torchvision, and replacement of bad rows."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from sslfast.data.folder import FolderSource
from sslfast.data.images import BadImageError, decode_full, open_image
from sslfast.data.source import PackedPaths
from sslfast.loaders.decode import BatchDecoder, decode_crops
from sslfast.loaders.plan import REPLACEMENTS, replacement_rows
from sslfast.views.crops import crop_boxes, crop_draws
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import encoded, picture, write_folder

VIEWS = {
    "image": ViewConfig(crop=CropConfig(size=32)),
    "jigsaw": ViewConfig(crop=CropConfig(size=33, scale=(0.6, 1.0))),
}


def crops(data: bytes, boxes: list[list[int]], sizes: list[int]) -> list[torch.Tensor]:
    return decode_crops(open_image(data), [np.array(box) for box in boxes], sizes)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_agree_with_torchvision_on_pil(format: str, mode: str) -> None:
    data = encoded(picture(150, 120).convert(mode), format)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    boxes, sizes = [[3, 5, 120, 101], [40, 0, 71, 90], [0, 0, 150, 120], [10, 10, 41, 41]], [64, 31, 97, 31]
    for crop, (left, top, right, bottom), size in zip(crops(data, boxes, sizes), boxes, sizes, strict=True):
        expected = tv.pil_to_tensor(tv.resized_crop(image, top, left, bottom - top, right - left, [size, size]))
        assert crop.shape == (3, size, size)
        assert crop.dtype == torch.uint8
        assert (crop.int() - expected.int()).abs().max() <= 2


def test_a_box_of_the_crops_own_size_is_copied() -> None:
    data = encoded(picture(60, 50), "PNG")
    (crop,) = crops(data, [[7, 9, 39, 41]], [32])
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), decode_full(data)[9:41, 7:39])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_in_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(90, 70), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    copied, resized = crops(data, [[5, 11, 45, 51], [5, 11, 60, 66]], [40, 23])
    assert np.array_equal(copied.permute(1, 2, 0).numpy(), np.asarray(upright.crop((5, 11, 45, 51))))
    expected = tv.pil_to_tensor(tv.resized_crop(upright, 11, 5, 55, 55, [23, 23]))
    assert (resized.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("side", "factor"), [(99, 1), (100, 2), (210, 4), (400, 8)])
def test_large_jpegs_are_decoded_scaled_and_look_the_same(
    side: int, factor: int, orientation: int, monkeypatch
) -> None:
    seen = []
    original = decode_crops.__globals__["decode_pixels"]

    def spy(opened, *, factor):
        seen.append(original(opened, factor=factor))
        return seen[-1]

    monkeypatch.setitem(decode_crops.__globals__, "decode_pixels", spy)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Boxes snap to whole pixels of the smaller picture, so the picture is smooth enough for that to be little.
    data = encoded(picture(61, 54).resize((491, 433), Image.Resampling.BICUBIC), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    boxes = [[13, 17, 13 + side, 17 + side], [0, 0, 433, 433]]
    small, large = crops(data, boxes, [50, 50])
    assert seen[0][1] == factor
    for crop, (left, top, right, bottom) in zip((small, large), boxes, strict=True):
        expected = tv.pil_to_tensor(tv.resized_crop(upright, top, left, bottom - top, right - left, [50, 50]))
        difference = (crop.float() - expected.float()).abs()
        assert difference.mean() < (1 if factor == 1 else 5)


def decoder(root, names, *, on_bad_image="skip", seed=5) -> BatchDecoder:
    source = FolderSource(root=root, paths=names).packed()
    return BatchDecoder(source=source, views=VIEWS, seed=seed, on_bad_image=on_bad_image)


def test_a_batch_has_the_crops_of_its_rows_at_their_boxes(tmp_path) -> None:
    names = [f"{i}.jpg" for i in range(6)]
    write_folder(tmp_path, names)
    rows = np.array([4, 0, 4, 2])
    batch = decoder(tmp_path, names)(7, rows)
    assert batch.sample_ids.tolist() == rows.tolist()
    assert {name: tuple(crop.shape) for name, crop in batch.crops.items()} == {
        "image": (4, 3, 32, 32),
        "jigsaw": (4, 3, 33, 33),
    }
    for slot, row in enumerate(rows):
        data = (tmp_path / names[row]).read_bytes()
        image = open_image(data)
        size = np.array([[image.width, image.height]])
        boxes = [
            crop_boxes(crop_draws(torch.tensor([row]), seed=5, epoch=7, position=p), size, v.crop)[0]
            for p, v in enumerate(VIEWS.values())
        ]
        for crop, expected in zip(batch.crops.values(), crops(data, boxes, [32, 33]), strict=True):
            assert torch.equal(crop[slot], expected)


def test_groups_change_nothing(tmp_path, monkeypatch) -> None:
    names = [f"{i}.jpg" for i in range(9)]
    write_folder(tmp_path, names)
    (tmp_path / "4.jpg").write_bytes(b"")
    whole = decoder(tmp_path, names)(1, np.arange(9))
    monkeypatch.setitem(BatchDecoder.__call__.__globals__, "_GROUP", 2)
    parts = decoder(tmp_path, names)(1, np.arange(9))
    assert torch.equal(whole.sample_ids, parts.sample_ids)
    assert all(torch.equal(whole.crops[name], parts.crops[name]) for name in VIEWS)


def test_a_bad_row_is_replaced_by_the_drawn_good_one_under_its_own_id(tmp_path) -> None:
    names = [f"{i}.jpg" for i in range(8)]
    write_folder(tmp_path, names)
    good = decoder(tmp_path, names)
    first, second = list(dict.fromkeys(row for row in replacement_rows(3, 8, seed=5, epoch=2) if row != 3))[:2]
    data = (tmp_path / names[3]).read_bytes()
    (tmp_path / names[3]).write_bytes(data[: len(data) // 2])
    (tmp_path / names[first]).write_bytes(b"not an image at all")

    bad = decoder(tmp_path, names)
    keeps = next(row for row in range(8) if row not in (3, first, second))
    batch = bad(2, np.array([keeps, 3]))
    assert batch.sample_ids.tolist() == [keeps, second]
    expected = good(2, np.array([keeps, second]))
    assert all(torch.equal(batch.crops[name], expected.crops[name]) for name in VIEWS)
    assert [row for row, _ in batch.bad] == [3, first]
    assert "damaged" in batch.bad[0][1]
    assert "not an image" in batch.bad[1][1]
    # Known now: the same batch, nothing reported a second time.
    again = bad(2, np.array([keeps, 3]))
    assert (again.sample_ids.tolist(), again.bad) == ([keeps, second], [])


def test_error_mode_names_path_row_reason_and_remedy(tmp_path) -> None:
    names = ["a.jpg", "b.jpg"]
    write_folder(tmp_path, names)
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"cannot train on .*/b.jpg \(row 1\): empty file; repair .*skip$"):
        decoder(tmp_path, names, on_bad_image="error")(0, np.array([0, 1]))


def test_a_folder_of_only_bad_images_ends_with_one_error(tmp_path) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        BadImageError, match=r"no usable replacement .*\(not an image.*\): nearly every image tried is "
    ):
        decoder(tmp_path, names)(0, np.array([0]))
    assert REPLACEMENTS == 32


def test_packed_paths_are_a_list_of_strings() -> None:
    names = ["a/b.jpg", "ü/漢.png", "x\udcff.jpg", ""]
    packed = PackedPaths(names)
    assert [packed[row] for row in range(len(packed))] == names
    assert packed[1:] == names[1:]
