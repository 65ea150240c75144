from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.cli import pretrain
from sslfast.report import preview
from sslfast.report.preview import Original, denormalise, preview_sheet, write_preview
from sslfast.views.stage import ViewStage
from sslfast.views.types import AugmentConfig, Batch, CropConfig, JigsawConfig, View, ViewConfig
from tests.pictures import write_folder

PLAIN = AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.0)
SMALL = CropConfig(size=24)
VIEWS = {
    "image": ViewConfig(crop=SMALL),
    "jigsaw": ViewConfig(crop=SMALL, jigsaw=JigsawConfig(grid=3, patch_size=6), augment=PLAIN),
    "rotation": ViewConfig(crop=SMALL, rotation=True),
}


def make_batch(count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    crops = {name: torch.randint(0, 256, (count, 3, 24, 24), generator=generator, dtype=torch.uint8) for name in VIEWS}
    return Batch(sample_ids=torch.arange(count), crops=crops, epoch=0)


def tile(sheet: Image.Image, column: int, row: int, rows: int) -> np.ndarray:
    """The pixels of a tile, found from the sheet's own measures."""
    side, gap, margin = preview._TILE, preview._GAP, preview._MARGIN
    x = margin + column * (side + gap)
    step = side + gap + preview._CAPTION
    y = sheet.height - margin + gap - (rows - row) * step
    return np.asarray(sheet)[y : y + side, x : x + side]


def test_denormalise_inverts_the_view_stage() -> None:
    batch = make_batch()
    views = {"image": replace(VIEWS["image"], augment=PLAIN)}
    pixels = ViewStage(views, seed=0)(batch)["image"].pixels
    assert np.array_equal(denormalise(pixels, PLAIN), batch.crops["image"].movedim(1, -1).numpy())


def test_sheet_has_a_column_for_each_picture() -> None:
    batch = make_batch()
    originals = [
        Original(
            picture=Image.new("RGB", (60, 30), (200, 10, 10)),
            label=f"folder/{i}.jpg",
            boxes=dict.fromkeys(VIEWS, (5, 5, 25, 25)),
        )
        for i in range(2)
    ]
    with_originals = preview_sheet(batch, VIEWS, originals=originals)
    without = preview_sheet(batch, VIEWS)
    assert with_originals.width - without.width == preview._TILE + preview._GAP
    assert with_originals.width == 2 * preview._MARGIN + 5 * preview._TILE + 4 * preview._GAP
    assert tuple(tile(with_originals, 0, 0, 2)[100, 200]) == (200, 10, 10)
    assert tuple(tile(with_originals, 0, 0, 2)[5, 5]) == (238, 241, 244)  # above the wide picture


def test_tiles_are_the_rendered_views() -> None:
    batch = make_batch()
    sheet = preview_sheet(batch, VIEWS, seed=3)
    views = ViewStage(VIEWS, seed=3)(batch)
    image = denormalise(views["image"].pixels, VIEWS["image"].augment)
    rotation = denormalise(views["rotation"].pixels, VIEWS["rotation"].augment)
    scale = preview._TILE // 24
    for row in range(2):
        assert np.array_equal(tile(sheet, 0, row, 2)[scale // 2 :: scale, scale // 2 :: scale], image[row])
        assert np.array_equal(tile(sheet, 3, row, 2)[scale // 2 :: scale, scale // 2 :: scale], rotation[row])


def test_jigsaw_in_place_shows_each_patch_at_its_cell() -> None:
    batch = make_batch()
    sheet = preview_sheet(batch, VIEWS, seed=3)
    view = ViewStage(VIEWS, seed=3)(batch)["jigsaw"]
    assert view.permutation is not None
    patches = denormalise(view.pixels, PLAIN)
    side = (preview._TILE - 2 * preview._PATCH_GAP) // 3
    step = side + preview._PATCH_GAP
    for row in range(2):
        for slot, cell in enumerate(view.permutation[row].tolist()):
            corner = patches[row, slot, -1, -1]  # the number covers the upper left corner
            for column, place in ((1, slot), (2, cell)):
                y, x = place // 3 * step + side - 1, place % 3 * step + side - 1
                assert np.array_equal(tile(sheet, column, row, 2)[y, x], corner)


def test_write_preview_is_reproducible_and_leaves_bad_images_out(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "images", ["a/0.jpg", "a/1.jpg", "b/2.jpg", "b/very/long/name/" + "x" * 80 + ".jpg"]
    )
    (folder / "broken.jpg").write_bytes(b"no image")
    for name in ("first.png", "sub/second.png"):
        write_preview(folder, VIEWS, tmp_path / name, count=3, seed=7)
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("first.png", "sub/second.png"))
    assert np.array_equal(first, second)
    write_preview(folder, VIEWS, tmp_path / "all.png", count=99, seed=7)
    step = preview._TILE + preview._GAP + preview._CAPTION
    assert Image.open(tmp_path / "all.png").height - first.shape[0] == step  # four usable images


def test_bad_arguments(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", ["0.jpg"])
    with pytest.raises(ValueError, match="count must be at least 1, got count=0"):
        write_preview(folder, VIEWS, tmp_path / "x.png", count=0)
    with pytest.raises(ValueError, match=r"output must end in a picture format such as .png, got '.*x.txt'"):
        write_preview(folder, VIEWS, tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no usable image"):
        write_preview(tmp_path / "empty", VIEWS, tmp_path / "x.png")


def test_panels_are_further_columns() -> None:
    batch = make_batch()
    asked: dict[str, torch.Tensor] = {}

    def panels(views: Mapping[str, View], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        asked.update({name: view.pixels for name, view in views.items()}, rows=rows)
        ramp = torch.linspace(-0.5, 1.5, 24).expand(len(rows), 3, 24, 24)  # cut off at 0 and 1
        return {"input": batch.crops["image"] / 255, "target": ramp[:, :, :12]}

    sheet, without = preview_sheet(batch, VIEWS, seed=3, panels=panels), preview_sheet(batch, VIEWS, seed=3)
    assert sheet.width - without.width == 2 * (preview._TILE + preview._GAP)
    assert torch.equal(asked["rows"], batch.sample_ids)
    rendered = ViewStage(VIEWS, seed=3)(batch)
    for name, view in rendered.items():
        assert torch.equal(asked[name], view.pixels)
    scale = preview._TILE // 24
    for row in range(2):
        seen = tile(sheet, 4, row, 2)[scale // 2 :: scale, scale // 2 :: scale]
        assert np.array_equal(seen, batch.crops["image"][row].movedim(0, -1).numpy())
    wide = tile(sheet, 5, 0, 2)
    assert tuple(wide[20, 100]) == (238, 241, 244)  # above the wide picture
    assert tuple(wide[108, 0]) == (0, 0, 0)
    assert tuple(wide[108, -1]) == (255, 255, 255)


@pytest.mark.parametrize("recipe", ["autoencoder", "colorization", "super-resolution", "inpainting", "pirl"])
def test_command_draws_the_panels_of_the_method(recipe: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", ["0.jpg", "1.jpg"])
    output = tmp_path / "sheet.png"
    assert pretrain.preview([str(folder), "--recipe", f"{recipe}-small", "-o", str(output), "--count", "2"]) == 0
    columns = 5 if recipe == "pirl" else 4  # original, image, patches twice, rotation; original, image, input, target
    sheet = Image.open(output)
    assert sheet.width == 2 * preview._MARGIN + columns * preview._TILE + (columns - 1) * preview._GAP
