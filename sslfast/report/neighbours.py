"""The nearest-neighbour sheet: one row per query, with the images that an encoder finds most similar.

A green frame marks a neighbour of the query's class, a red frame one of another class; the number is the cosine
similarity. Several encoders are shown side by side for the same queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sslfast.data import ImageLocation, decode_full, open_data, quiet_pillow
from sslfast.device import resolve_device
from sslfast.evaluation import (
    EMBEDDING_SUFFIXES,
    EvaluationSet,
    FeatureConfig,
    Lettering,
    load_evaluation_set,
    load_font,
    nearest_neighbours,
    read_embeddings,
)
from sslfast.files import OUTPUT, save_picture
from sslfast.report.preview import check_picture
from sslfast.text import printable

_TILE, _GAP, _FRAME = 96, 10, 4
_MARGIN, _BLOCK_GAP = 28, 36
_TITLE, _HEADING, _SMALL = 22, 16, 12
_CAPTION = 20
_MOST_TITLE = 2000
_PAPER, _INK, _FAINT, _MAT = "#ffffff", "#1f2933", "#6b7785", "#eef1f4"
_OF_FILE = ("queries", "k", "device", "on_bad_image", "white_level", "max_pixels")
_SAME, _OTHER = "#16a34a", "#dc2626"


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig(FeatureConfig):
    """Settings of :func:`run_neighbours`."""

    queries: int = 12
    """Validation images, at most the number of classes."""
    k: int = 6
    """Neighbours of each."""


@dataclass(kw_only=True)
class Neighbour:
    """One image that an encoder found."""

    location: ImageLocation
    similarity: float
    same_class: bool | None
    """None: one of the two has no class."""


@dataclass(kw_only=True)
class Query:
    """One row of the sheet."""

    location: ImageLocation
    label: str
    """Caption of the image, for example its class."""
    neighbours: Mapping[str, Sequence[Neighbour]]
    """Encoder name -> what it found, most similar first."""


def write_neighbours(
    evaluation: EvaluationSet,
    output: Path | str,
    *,
    queries: int = 12,
    k: int = 6,
    encoders: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write the sheet of a labelled data set as an image file and return its path.

    Queries are validation images spread evenly over the classes, the middle one of each class; neighbours come from
    the training images.

    Args:
        evaluation: features, labels and paths.
        output: file to write; its suffix says the format.
        queries: rows, at most the number of classes.
        k: neighbours of each query.
        encoders: which, from left to right; None: all of them.
        title: first line; None: a description of the sheet.

    Raises:
        ValueError: no such encoder, ``queries`` or ``k`` out of range, a suffix that names no picture format.
    """
    output = Path(output)
    names = list(evaluation.val) if encoders is None else list(encoders)
    for name in names:
        if name not in evaluation.val:
            raise ValueError(f"no encoder {name!r} in this evaluation; there are {', '.join(evaluation.val)}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries=}")
    check_picture(output)
    rows = choose_queries(evaluation.val_labels, queries)
    found = {name: nearest_neighbours(evaluation.val[name][rows], evaluation.train[name], k) for name in names}
    sheet = []
    for i, row in enumerate(rows.tolist()):
        label = int(evaluation.val_labels[row])
        sheet.append(
            Query(
                location=evaluation.val_locations[row],
                label=evaluation.classes[label],
                neighbours={
                    name: [
                        Neighbour(
                            location=evaluation.train_locations[neighbour],
                            similarity=value,
                            same_class=int(evaluation.train_labels[neighbour]) == label,
                        )
                        for value, neighbour in zip(values[i].tolist(), found_rows[i].tolist(), strict=True)
                    ]
                    for name, (values, found_rows) in found.items()
                },
            )
        )
    if title is None:
        title = f"validation images and their {k} most similar training images"
    save_picture(neighbour_sheet(sheet, title=title), output, remedy=OUTPUT)
    return output


def run_neighbours(
    run: Path,
    data: Path,
    config: NeighboursConfig = NeighboursConfig(),
    *,
    output: Path = Path("neighbours.png"),
) -> Path:
    """Contact sheet of validation images and the training images most similar to them, for a run and its baselines.

    Args:
        run: run directory, or a file of weights; or a file of sslfast embed (.parquet, .npy), which needs no labels.
        data: folder with train/<class>/ and val/<class>/; with a file of sslfast embed the images that it is of.
        config: settings.
        output: image file to write.
    """
    if run.suffix in EMBEDDING_SUFFIXES and not run.is_dir():
        return _write_of_file(run, data, config, output)
    if data.is_dir() and not any(data.glob("train*")) and not any(data.glob("val*")):
        raise ValueError(
            f"{data} holds no sets train and val; for images without them: sslfast embed {run} {data} -o features.npy, "
            f"then sslfast neighbours features.npy {data}"
        )
    evaluation = load_evaluation_set(run, data, config)
    return write_neighbours(evaluation, output, queries=config.queries, k=config.k)


def _write_of_file(path: Path, data: Path, config: NeighboursConfig, output: Path) -> Path:
    """The sheet of embeddings in a file: images spread evenly over it, and the others that are most similar."""
    check_picture(output)
    others = [name for name in NeighboursConfig.__dataclass_fields__ if name not in _OF_FILE]
    given = [name for name in others if getattr(config, name) != getattr(NeighboursConfig(), name)]
    if given:
        raise ValueError(
            f"{path} holds embeddings, which {', '.join(given)} cannot change any more; leave that out, or write them "
            "again with sslfast embed"
        )
    found, manifest = read_embeddings(path), open_data(data, on_bad_image=config.on_bad_image)
    manifest = manifest.decoded(config.decoding(path))
    known = dict(zip(map(_utf8, manifest.paths), range(len(manifest)), strict=True))
    positions = [known.get(_utf8(name)) for name in found.paths]
    if None in positions:
        lost = printable(found.paths[positions.index(None)])
        raise ValueError(f"{path} has {lost}, which is not in {data}; name the images that it was made of")
    locations = [manifest.location(position) for position in positions if position is not None]
    count = min(config.queries, len(locations))
    rows = torch.arange(count) * len(locations) // max(1, count)
    device = resolve_device(config.device)
    queries = found.values[rows].to(device)
    similarity, nearest = nearest_neighbours(queries, found.values, config.k, own=rows.to(device))
    sheet = []
    for row, values, neighbours in zip(rows.tolist(), similarity.tolist(), nearest.tolist(), strict=True):
        label = found.classes[row]
        sheet.append(
            Query(
                location=locations[row],
                label=label or Path(found.paths[row]).name,
                neighbours={
                    path.name: [
                        Neighbour(
                            location=locations[other],
                            similarity=value,
                            same_class=None if None in (label, found.classes[other]) else label == found.classes[other],
                        )
                        for value, other in zip(values, neighbours, strict=True)
                    ]
                },
            )
        )
    title = f"images and the {config.k} others most similar to them"
    save_picture(neighbour_sheet(sheet, title=title), output, remedy=OUTPUT)
    return output


def _utf8(name: str) -> str:
    """The name as a .parquet file holds it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def choose_queries(labels: Tensor, count: int) -> Tensor:
    """Rows of at most ``count`` queries: classes spread evenly over all, of each the row in its middle."""
    classes = labels.unique()
    count = min(count, len(classes))
    chosen = classes[torch.arange(count) * len(classes) // count]
    return torch.stack([rows[len(rows) // 2] for rows in ((labels == c).nonzero()[:, 0] for c in chosen)])


def neighbour_sheet(queries: Sequence[Query], *, title: str) -> Image.Image:
    """Draw the sheet; every query has the same encoders, with equally many neighbours each."""
    if not queries:
        raise ValueError("a neighbour sheet needs at least one query")
    names = list(queries[0].neighbours)
    k = max((len(found) for found in queries[0].neighbours.values()), default=0)
    cell = _TILE + 2 * _FRAME
    block = k * cell + (k - 1) * _GAP
    heading_top = _MARGIN + _TITLE + 34
    tiles_top = heading_top + _HEADING + _SMALL + 26
    step = cell + _CAPTION + _GAP
    lettering = Lettering()
    title, title_font = lettering.fitted(title, _TITLE, _MOST_TITLE)
    small = load_font(None, _SMALL)
    legend = (("same class", _SAME), ("another class", _OTHER))
    width = 2 * _MARGIN + cell + len(names) * (_BLOCK_GAP + block)
    width = max(width, 2 * _MARGIN + round(title_font.getlength(title)))
    sheet = Image.new("RGB", (width, tiles_top + len(queries) * step + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, font=title_font, fill=_INK)
    x = _MARGIN
    for words, colour in legend:
        y = _MARGIN + _TITLE + 6
        draw.rectangle((x, y + 1, x + 11, y + 12), outline=colour, width=3)
        draw.text((x + 18, y), words, font=small, fill=_FAINT)
        x += 18 + round(small.getlength(words)) + 22
    starts = {name: _MARGIN + cell + _BLOCK_GAP + i * (block + _BLOCK_GAP) for i, name in enumerate(names)}
    for heading, detail, x, length in (
        ("query", "", _MARGIN, cell),
        *((name, _share(name, queries), start, block) for name, start in starts.items()),
    ):
        heading, font = lettering.fitted(heading, _HEADING, length)
        draw.text((x, heading_top), heading, font=font, fill=_INK)
        draw.text((x, heading_top + _HEADING + 5), detail, font=small, fill=_FAINT)
        draw.rectangle((x, tiles_top - 11, x + length - 1, tiles_top - 9), fill=_INK)
    with quiet_pillow():
        for i, query in enumerate(queries):
            y = tiles_top + i * step
            sheet.paste(_framed(query.location, _PAPER), (_MARGIN, y))
            _caption(draw, query.label, _MARGIN, y + cell, lettering)
            for name, start in starts.items():
                for j, neighbour in enumerate(query.neighbours[name]):
                    x = start + j * (cell + _GAP)
                    colour = {True: _SAME, False: _OTHER, None: _MAT}[neighbour.same_class]
                    sheet.paste(_framed(neighbour.location, colour), (x, y))
                    _caption(draw, f"{neighbour.similarity:.3f}", x, y + cell, lettering)
    lettering.report()
    return sheet


def _share(name: str, queries: Sequence[Query]) -> str:
    found = [neighbour.same_class for query in queries for neighbour in query.neighbours[name]]
    if None in found:
        return ""
    return f"{sum(map(bool, found))} of {len(found)} neighbours on this sheet are of the query's class"


def _framed(location: ImageLocation, colour: str) -> Image.Image:
    """The whole image on a square background, with a frame."""
    picture = Image.fromarray(decode_full(location.read(), location.source.decoding))
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if size != picture.size:
        # Larger: square pixels, so that what is there is what one sees.
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (_TILE + 2 * _FRAME, _TILE + 2 * _FRAME), colour)
    framed.paste(_MAT, (_FRAME, _FRAME, _FRAME + _TILE, _FRAME + _TILE))
    framed.paste(picture, (_FRAME + (_TILE - size[0]) // 2, _FRAME + (_TILE - size[1]) // 2))
    return framed


def _caption(draw: ImageDraw.ImageDraw, text: str, x: int, y: int, lettering: Lettering) -> None:
    """Centred under a tile; the end of a text that is too long is cut."""
    cell = _TILE + 2 * _FRAME
    text, font = lettering.fitted(text, _SMALL, cell)
    draw.text((x + cell / 2, y + 4), text, font=font, fill=_FAINT, anchor="ma")
