"""The preview sheet: one row per image, with the original, every view as network input, and the method's panels.

The sheet shows the first steps of a run with the same seed: the same images, crops and augmentations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from sslfast.data import (
    DEFAULT_DECODING,
    Decoding,
    Manifest,
    check_apart,
    combined,
    decode_full,
    open_data,
    quiet_pillow,
)
from sslfast.evaluation import Lettering, load_font
from sslfast.files import OUTPUT, save_picture
from sslfast.loaders import BatchDecoder, epoch_order
from sslfast.views import AugmentConfig, Batch, View, ViewConfig, ViewStage, crop_boxes, crop_draws

_TILE = 216
_GAP = 20
_MARGIN = 28
_CAPTION = 26
_MOST_TITLE = 2000
_PATCH_GAP = 4
_TITLE, _HEADING, _SMALL = 22, 16, 13
_PAPER, _INK, _FAINT, _MAT = "#ffffff", "#1f2933", "#6b7785", "#eef1f4"
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2")


Panels = Callable[[Mapping[str, View], Tensor], Mapping[str, Tensor]]
"""Maps rendered views and sample ids to further columns: heading -> RGB images ``[B, 3, H, W]``, float in 0..1."""


@dataclass(kw_only=True)
class Original:
    """The image that a sample's crops are from."""

    picture: Image.Image
    """The whole upright image."""
    label: str
    """Caption, for example its path."""
    boxes: Mapping[str, tuple[int, int, int, int]]
    """View name to left, top, right, bottom of its crop, in pixels of the image."""


@dataclass(kw_only=True)
class _Column:
    heading: str
    detail: str
    colour: str
    tiles: list[Image.Image]
    captions: list[str]


def denormalise(pixels: Tensor, augment: AugmentConfig) -> NDArray[np.uint8]:
    """Network input ``[..., 3, H, W]`` back to 8-bit RGB ``[..., H, W, 3]``."""
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (augment.mean, augment.std))
    levels = (pixels.detach().cpu().float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    array: NDArray[np.uint8] = levels.movedim(-3, -1).numpy()
    return array


def preview_sheet(
    batch: Batch,
    views: Mapping[str, ViewConfig],
    *,
    seed: int = 0,
    originals: Sequence[Original] | None = None,
    panels: Panels | None = None,
    title: str = "what the network sees",
) -> Image.Image:
    """Draw the sheet of a batch.

    A view without jigsaw has one column; a jigsaw view has two: its patches in the order of the network input, each
    with the number of its cell, and the same patches in their original position.

    Args:
        batch: uint8 crops with rows and epoch.
        views: view name to config, in the recipe's order.
        seed: of the run.
        originals: one for each sample; None: no column of originals.
        panels: the method's further columns, see ``BaseConfig.preview_panels``; None: none.
        title: first line of the sheet.
    """
    columns = [] if originals is None else [_original_column(originals, list(views))]
    rendered = ViewStage(views, seed=seed)(batch)
    for position, (name, view) in enumerate(rendered.items()):
        columns += _view_columns(name, views[name], view, _colour(position))
    for heading, pictures in {} if panels is None else panels(rendered, batch.sample_ids).items():
        columns.append(_panel_column(heading, pictures))
    return _draw(columns, len(batch.sample_ids), title)


def write_preview(
    data: str | Path,
    views: Mapping[str, ViewConfig],
    output: str | Path,
    *,
    count: int = 8,
    seed: int = 0,
    panels: Panels | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> None:
    """Write the sheet of the first ``count`` images of a run on ``data`` as an image file.

    Args:
        data: folder of images or of tar shards, or a manifest of one; unusable images are left out.
        views: view name to config, in the recipe's order.
        output: file to write; its suffix says the format.
        count: images on the sheet; all of a smaller folder.
        seed: of the run.
        decoding: what the policy for images leaves to the user.

    Raises:
        ValueError: a .beton file, no usable image, ``count`` below 1, a suffix that names no picture format.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count=}")
    output = Path(output)
    check_picture(output)
    check_apart([output], [Path(data)])
    manifest = open_data(Path(data), on_bad_image="skip", progress=True)
    manifest = manifest.decoded(combined(manifest.source.decoding, decoding, where=data))
    if manifest.source.loader is not None:
        raise ValueError(
            f"a preview is drawn from image files and {data} is a .beton file: name what it was made of "
            f"({manifest.root})"
        )
    sheet = manifest_preview(manifest, views, count=count, seed=seed, panels=panels)
    save_picture(sheet, output, remedy=OUTPUT)


def manifest_preview(
    manifest: Manifest, views: Mapping[str, ViewConfig], *, count: int, seed: int, panels: Panels | None
) -> Image.Image:
    """The sheet of the first ``count`` images of a run on the images of a manifest; arguments as of
    :func:`write_preview`."""
    decode = BatchDecoder(source=manifest.source, views=views, seed=seed, on_bad_image="skip")
    decoded = decode(0, epoch_order(len(manifest), seed=seed, epoch=0)[:count])
    batch = Batch(sample_ids=decoded.sample_ids, crops=decoded.crops, epoch=0)
    title = f"{manifest.root.resolve().name}: what the network sees in epoch 0, seed {seed}"
    originals = _originals(manifest, batch, views, seed)
    return preview_sheet(batch, views, seed=seed, originals=originals, panels=panels, title=title)


def check_picture(output: Path) -> None:
    """ValueError unless the suffix names a picture format that Pillow writes."""
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"output must end in a picture format such as .png, got {str(output)!r}")


def _originals(manifest: Manifest, batch: Batch, views: Mapping[str, ViewConfig], seed: int) -> list[Original]:
    with quiet_pillow():
        source = manifest.source
        pictures = [Image.fromarray(decode_full(source.read(int(row)), source.decoding)) for row in batch.sample_ids]
    sizes = np.array([picture.size for picture in pictures], dtype=np.int64)
    boxes = {
        name: crop_boxes(
            crop_draws(batch.sample_ids, seed=seed, epoch=batch.epoch, position=position), sizes, config.crop
        )
        for position, (name, config) in enumerate(views.items())
    }
    originals = []
    for i, (picture, row) in enumerate(zip(pictures, batch.sample_ids.tolist(), strict=True)):
        own = {name: _box(rows[i]) for name, rows in boxes.items()}
        originals.append(Original(picture=picture, label=manifest.paths[row], boxes=own))
    return originals


def _box(edges: NDArray[np.int64]) -> tuple[int, int, int, int]:
    left, top, right, bottom = edges.tolist()
    return left, top, right, bottom


def _colour(position: int) -> str:
    return _COLOURS[position % len(_COLOURS)]


def _original_column(originals: Sequence[Original], names: Sequence[str]) -> _Column:
    tiles = []
    for original in originals:
        scale = _TILE / max(original.picture.size)
        width, height = (max(1, round(side * scale)) for side in original.picture.size)
        tile = Image.new("RGB", (_TILE, _TILE), _MAT)
        left, top = (_TILE - width) // 2, (_TILE - height) // 2
        tile.paste(_resized(original.picture, (width, height)), (left, top))
        draw = ImageDraw.Draw(tile)
        for position, name in enumerate(names):
            x0, y0, x1, y1 = (edge * scale for edge in original.boxes[name])
            box = (left + x0, top + y0, min(left + x1, left + width) - 1, min(top + y1, top + height) - 1)
            draw.rectangle(box, outline=_PAPER, width=4)
            draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), outline=_colour(position), width=2)
        tiles.append(tile)
    detail = "frames: the crops of the views"
    return _Column(
        heading="original", detail=detail, colour=_INK, tiles=tiles, captions=[original.label for original in originals]
    )


def _view_columns(name: str, config: ViewConfig, view: View, colour: str) -> Iterator[_Column]:
    pixels = denormalise(view.pixels, config.augment)
    turns = ["" if view.quarter_turns is None else _turned(k) for k in _list(view.quarter_turns, len(pixels))]
    if config.jigsaw is None:
        size = f"{config.crop.size} x {config.crop.size} pixels"
        tiles = [_resized(Image.fromarray(image), (_TILE, _TILE)) for image in pixels]
        yield _Column(heading=name, detail=size, colour=colour, tiles=tiles, captions=turns)
        return
    if view.permutation is None:
        raise ValueError(f"view {name!r} has a jigsaw, but no permutation")
    grid, side = config.jigsaw.grid, config.jigsaw.patch_size
    orders = view.permutation.tolist()
    shown = [_mosaic(patches, list(range(grid**2)), order, grid) for patches, order in zip(pixels, orders, strict=True)]
    placed = [_mosaic(patches, order, order, grid) for patches, order in zip(pixels, orders, strict=True)]
    detail = f"{grid**2} patches of {side} x {side} pixels"
    yield _Column(heading=f"{name}: as shown", detail=detail, colour=colour, tiles=shown, captions=turns)
    yield _Column(heading=f"{name}: in place", detail="the same patches", colour=colour, tiles=placed, captions=turns)


def _panel_column(heading: str, pictures: Tensor) -> _Column:
    levels = pictures.detach().cpu().float().mul(255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
    height, width = levels.shape[1:3]
    tiles = []
    for picture in levels.numpy():
        scale = _TILE / max(height, width)
        shown = _resized(Image.fromarray(picture), (max(1, round(width * scale)), max(1, round(height * scale))))
        tile = Image.new("RGB", (_TILE, _TILE), _MAT)
        tile.paste(shown, ((_TILE - shown.width) // 2, (_TILE - shown.height) // 2))
        tiles.append(tile)
    detail = f"{width} x {height} pixels"
    return _Column(heading=heading, detail=detail, colour=_INK, tiles=tiles, captions=[""] * len(tiles))


def _list(values: Tensor | None, count: int) -> list[int]:
    return [0] * count if values is None else values.tolist()


def _turned(quarter_turns: int) -> str:
    return ("not turned", "turned 90° left", "turned 180°", "turned 90° right")[quarter_turns % 4]


def _mosaic(patches: NDArray[np.uint8], positions: Sequence[int], cells: Sequence[int], grid: int) -> Image.Image:
    """Patch ``j`` at position ``positions[j]`` of the grid, with the number of its cell in the corner."""
    tile = Image.new("RGB", (_TILE, _TILE), _PAPER)
    draw = ImageDraw.Draw(tile)
    side = (_TILE - _PATCH_GAP * (grid - 1)) // grid
    font = load_font(None, max(9, min(_SMALL, side // 4)))
    for patch, position, cell in zip(patches, positions, cells, strict=True):
        x, y = (position % grid) * (side + _PATCH_GAP), (position // grid) * (side + _PATCH_GAP)
        tile.paste(_resized(Image.fromarray(patch), (side, side)), (x, y))
        text = str(cell + 1)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = max(right - left, bottom - top) + 8, bottom - top + 8
        draw.rounded_rectangle((x + 3, y + 3, x + 3 + width, y + 3 + height), radius=3, fill=_INK)
        draw.text((x + 3 + width / 2, y + 3 + height / 2), text, font=font, fill=_PAPER, anchor="mm")
    return tile


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Downscaled with a Lanczos filter, upscaled to square pixels, which shows the pixels as they are."""
    larger = size[0] > image.width
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _draw(columns: Sequence[_Column], rows: int, title: str) -> Image.Image:
    heading_top = _MARGIN + _TITLE + 18
    tiles_top = heading_top + _HEADING + _SMALL + 26
    step = _TILE + (_CAPTION if any(any(column.captions) for column in columns) else 0) + _GAP
    lettering = Lettering()
    title, title_font = lettering.fitted(title, _TITLE, _MOST_TITLE)
    width = 2 * _MARGIN + len(columns) * _TILE + (len(columns) - 1) * _GAP
    width = max(width, 2 * _MARGIN + round(title_font.getlength(title)))
    sheet = Image.new("RGB", (width, tiles_top + rows * step - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, font=title_font, fill=_INK)
    for i, column in enumerate(columns):
        x = _MARGIN + i * (_TILE + _GAP)
        heading, font = lettering.fitted(column.heading, _HEADING, _TILE)
        draw.text((x, heading_top), heading, font=font, fill=column.colour)
        detail, font = lettering.fitted(column.detail, _SMALL, _TILE)
        draw.text((x, heading_top + _HEADING + 5), detail, font=font, fill=_FAINT)
        bar = tiles_top - 9
        draw.rectangle((x, bar, x + _TILE - 1, bar + 2), fill=column.colour)
        for j, (tile, caption) in enumerate(zip(column.tiles, column.captions, strict=True)):
            y = tiles_top + j * step
            sheet.paste(tile, (x, y))
            caption, font = lettering.fitted(caption, _SMALL, _TILE, keep_end=True)  # the end of a path says most
            draw.text((x, y + _TILE + 6), caption, font=font, fill=_FAINT)
    lettering.report()
    return sheet
