"""Labelled data sets in folders: ``data/train/<class>/`` and ``data/val/<class>/``, and subsets of them."""

import os
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from sslfast.data import DEFAULT_DECODING, Decoding, Manifest, OnBadImage, alike, open_data, some_paths, source_of
from sslfast.files import open_regular, reason_of
from sslfast.ops.philox import Stream, random_uint32

_OTHER_FORMS = (".txt", ".json", ".jsonl", ".zip", ".tar", ".parquet")
SUBSET_STEP = 1
"""Philox step of the subset draws; the same stream draws held-out images (step 0) and low-shot sets."""


class UnsuitableError(ValueError):
    """This encoder cannot be evaluated on these images: too few, no labels, features that are not finite. What needs no
    evaluation can go on. The message ends with ``; `` and a remedy."""


def load_manifests(
    data: Path | str, *, on_bad_image: OnBadImage = "error", decoding: Decoding = DEFAULT_DECODING
) -> tuple[Manifest, Manifest]:
    """Manifests of ``data/train`` and ``data/val``, which must hold the same class folders.

    Raises:
        UnsuitableError: no image, images outside class folders, one class, or classes that differ.
        ValueError: a folder is missing, or images cannot be used.
    """
    data = Path(data)
    if data.is_file():
        raise ValueError(
            f"{data} is a file: an evaluation needs two labelled sets, a folder with train/<class>/ and val/<class>/ "
            "of images, or with .tar shards in train/ and val/"
        )
    places = {split: _place(data, split) for split in ("train", "val")}
    found = [_scan(place, on_bad_image=on_bad_image) for place in places.values()]
    # The pixels of a .beton file are decoded already.
    train, val = (one.decoded(decoding) if one.source.loader is None else one for one in found)
    for split, manifest in (("train", train), ("val", val)):
        loose = [path for path, label in zip(manifest.paths, manifest.labels, strict=True) if label < 0]
        if loose:
            lacking = _unlabelled(manifest, loose[0], data / split, places["train"])
            raise UnsuitableError(f"{manifest.root} has {len(loose)} images {lacking}")
    if train.classes != val.classes:
        same = alike(train.classes, val.classes)
        if same:
            raise UnsuitableError(
                f"classes of {data}/train and {data}/val have names that look the same and are not: {same}; rename the "
                "folders, or the labels, of one of them"
            )
        only = [
            f"only in {name}: {', '.join(sorted(these)[:5])}{' ...' if len(these) > 5 else ''}"
            for name, these in (
                ("train", set(train.classes) - set(val.classes)),
                ("val", set(val.classes) - set(train.classes)),
            )
            if these
        ]
        raise UnsuitableError(f"classes of {data}/train and {data}/val differ ({'; '.join(only)}); give both the same")
    if len(train.classes) < 2:
        remarks = "".join(f"; {line}" for line in train.class_remarks())
        raise UnsuitableError(f"{data} has one class, {train.classes[0]}; an evaluation needs at least 2{remarks}")
    return train, val


def _unlabelled(manifest: Manifest, first: str, place: Path, train: Path) -> str:
    """What images without a label lack, and the remedy for this kind of data."""
    if manifest.source.name in ("csv", "list"):
        return f"without a label ({first}): an evaluation needs labels; give every line one, in a column named label"
    if manifest.source.name in ("parquet", "arrow"):
        return f"without a label ({first}): an evaluation needs labels; write them into a column named label"
    classes = "" if place.name == "train" else f" --train {quote(str(train))}"
    listed = place.with_name(f"{place.name}{'.csv' if manifest.source.name == 'folder' else '.tsv'}")
    return (
        f"outside class folders ({first}): an evaluation needs labels; put each image into the folder of its class, "
        f"or, if a file has the labels, run `sslfast data labels {quote(str(manifest.root))} LABELS{classes} -o "
        f"{quote(str(listed))}`"
    )


def _scan(folder: Path, *, on_bad_image: OnBadImage) -> Manifest:
    try:
        return open_data(folder, on_bad_image=on_bad_image)
    except ValueError as error:
        if str(error).startswith("no usable image"):
            raise UnsuitableError(str(error).replace(": name a", "; name a")) from None
        raise


def _place(data: Path, split: str) -> Path:
    """Where the images of a split are: its .csv list or .tsv manifest, else its folder, another list or an archive."""
    folder = data / split
    for place in (
        data / f"{split}.csv",
        data / f"{split}.tsv",
        folder,
        data / f"{split}.beton",
        *(data / f"{split}{suffix}" for suffix in _OTHER_FORMS),
        data / f"ILSVRC2012_img_{split}.tar",
    ):
        if place.is_file() or (place == folder and place.is_dir()):
            return place
    for place in sorted(data.absolute().glob(f"{split}.*")):
        if source_of(place).name != "folder":  # .arrow, .roots, what a plugin reads
            return place
    whole = Path(os.path.abspath(data))
    if whole.name.casefold() in ("train", "val") and (whole.parent / "train").is_dir():
        raise ValueError(
            f"{data} has no folder {split}: it seems to be one of the two sets that an evaluation needs; give the "
            f"folder of both, {whole.parent}"
        )
    raise ValueError(
        f"{data} has no folder {split}: an evaluation needs {data}/train/<class>/ and {data}/val/<class>/, or a list "
        f"{split}.csv or a file {split}.beton, {split}.tar or {split}.zip in place of a folder"
    )


def listed_rows(manifest: Manifest, subset: Path) -> list[int]:
    """Rows that a list file names: one file a line, by its name alone (SimCLR's ImageNet lists) or its relative path.

    Raises:
        ValueError: a line matches no image or several, a class has no image, or the file is empty or unreadable.
    """
    lines = [line.strip() for line in read_list(subset, remedy="give another list").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{subset} lists nothing; give one file name a line")
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(manifest.paths):
        for name in {path, Path(path).name}:
            rows_of.setdefault(name, []).append(row)
    for words, wrong in (
        ("are not in", [line for line in lines if line not in rows_of]),
        ("are the name of several images in", [line for line in lines if len(rows_of.get(line, ())) > 1]),
    ):
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(lines)} files of {subset} {words} {manifest.root}: "
                f"{some_paths([(line, '') for line in wrong])}; give the list that belongs to this data"
            )
    rows = sorted({rows_of[line][0] for line in lines})
    absent = sorted(set(range(len(manifest.classes))) - set(manifest.labels[rows].tolist()))
    if absent:
        raise ValueError(
            f"{subset} has no image of {len(absent)} of {len(manifest.classes)} classes "
            f"({', '.join(manifest.classes[label] for label in absent[:5])}); list at least one of each"
        )
    return rows


def read_list(path: Path, *, remedy: str) -> str:
    """The text of a list of file names; bytes that are not UTF-8 as surrogate escapes, as file names have them.

    Raises:
        ValueError: it cannot be read; ends with ``remedy``.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); {remedy}") from None


def drawn_rows(manifest: Manifest, fraction: float, *, seed: int) -> list[int]:
    """``round(fraction * n)`` rows of every class of n images, at least 1, by Philox draws of (seed, row)."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    order = random_order(len(manifest), seed=seed, step=SUBSET_STEP)
    labels = manifest.labels[order.numpy()]
    rows: list[int] = []
    for label in range(len(manifest.classes)):
        these = order[torch.from_numpy(labels == label)]
        rows += these[: max(1, round(fraction * len(these)))].tolist()
    return sorted(rows)


def random_order(count: int, *, seed: int, step: int) -> Tensor:
    """``[count]`` int64: a permutation by one Philox draw per row."""
    draws = random_uint32(torch.arange(count), 1, seed=seed, stream=Stream.PROBE_SPLIT, step=step)[:, 0]
    return draws.argsort(stable=True)
