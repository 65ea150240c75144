"""``sslfast data verify``, ``sslfast data prepare`` and ``sslfast data labels``."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sslfast.cli.options import print_table
from sslfast.cli.usage import parse
from sslfast.data import (
    Contents,
    Decoding,
    Manifest,
    PrepareConfig,
    check_apart,
    label_images,
    prepare_beton,
    verify_images,
)
from sslfast.files import OUTPUT, check_writable, write_file, writing
from sslfast.text import printable


@dataclass(kw_only=True)
class Verify:
    """Decode every image once, list the unusable ones with the reason, and write a manifest that records both.

    `sslfast pretrain` and `sslfast data prepare` take the manifest in place of the folder and then know the unusable
    images before they start. Exit code 0: all images can be used, 1: some cannot."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images (class folders or flat, any nesting) or of .tar or .parquet shards, one .tar, .parquet or .zip,
    a list of `path,label` lines (.csv, .tsv, .txt, .lst, .json, .jsonl), a folder of datasets' save_to_disk, a file of
    such names (.roots), a URL of shards, or a manifest (.tsv), whose rows are decoded again."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Manifest to write; default NAME-OF-DIR.tsv in the current directory."""
    workers: int | None = None
    """Decoding processes; default: one per core."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)


@dataclass(kw_only=True)
class Prepare:
    """Store the images of a folder in one .beton file for the ffcv loader, with sample ids, manifest and checksums."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """What `sslfast pretrain` takes as DATA, of image files: a folder, shards, a list, a manifest, a URL, ..."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.beton")]
    """File to write; an existing one is replaced only when the new one is complete."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: stop at the first unusable image and name it. skip: leave unusable images out and list them."""
    workers: int | None = None
    """Processes; default: one per core."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


@dataclass(kw_only=True)
class Labels:
    """Give the images of a flat folder or archive the labels that a file has for them, as for ImageNet's validation
    set. A list DATA/val.csv, or of an archive a manifest DATA/val.tsv, takes the place of DATA/val in evaluations."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, or an archive (.tar, .zip, .parquet)."""
    labels: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LABELS")]
    """One label a line in the order of the sorted file names (the devkit's ground truth), `name label` lines, a .csv
    with a header (LOC_val_solution.csv), or ImageNet's devkit (its .tar.gz or folder)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """List to write (.csv), or of an archive the manifest (.tsv)."""
    train: Annotated[Path | None, tyro.conf.arg(metavar="DATA")] = None
    """Data whose classes the labels must be."""
    names: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """What numbers mean: the devkit's meta.mat, a text file whose line k names class k, or `sorted`: the classes of
    --train in sorted order."""


def labels(arguments: list[str]) -> int:
    """Run ``sslfast data labels``; returns the exit code."""
    chosen = parse(Labels, arguments, prog="sslfast data labels")
    if isinstance(chosen, int):
        return chosen
    check_writable(chosen.output, remedy=OUTPUT)
    check_apart([chosen.output], [path for path in (chosen.data, chosen.labels, chosen.train) if path is not None])
    count = label_images(chosen.data, chosen.labels, chosen.output, train=chosen.train, names=chosen.names)
    print(f"{count:,} images with their labels; wrote {chosen.output}")
    return 0


def verify(arguments: list[str]) -> int:
    """Run ``sslfast data verify``; returns the exit code."""
    chosen = parse(Verify, arguments, prog="sslfast data verify")
    if isinstance(chosen, int):
        return chosen
    output = chosen.output or Path(f"{Path(os.path.realpath(chosen.data)).name or 'root'}.tsv")
    check_writable(output, remedy=OUTPUT)
    check_apart([output], [chosen.data])
    contents = Contents()
    manifest, bad = verify_images(
        chosen.data,
        workers=chosen.workers,
        progress=sys.stderr.isatty(),
        decoding=chosen.decoding,
        contents=contents,
    )
    write_file(output, manifest.dump(), remedy=OUTPUT)
    for path, reason in bad:
        print(f"{printable(path)}\t{printable(reason)}")
    total, classes = len(manifest) + len(bad), len(manifest.classes)
    print(f"{len(manifest):,} of {total:,} images can be used, {classes:,} classes; wrote {output}")
    for line in [*contents.lines(), *contents.warnings("--white-level"), *left_out_lines(manifest)]:
        print(line)
    return 1 if bad else 0


def left_out_lines(manifest: Manifest) -> list[str]:
    """What looks like a picture and is not used, for the screen."""
    return [
        *(f"left out: {printable(line)}" for line in manifest.left_out()),
        *(f"classes: {printable(line)}" for line in manifest.class_remarks()),
    ]


def prepare(arguments: list[str]) -> int:
    """Run ``sslfast data prepare``; returns the exit code."""
    chosen = parse(Prepare, arguments, prog="sslfast data prepare")
    if isinstance(chosen, int):
        return chosen
    remedy = "name another file as OUT.beton"
    check_writable(chosen.output, remedy=remedy)
    if chosen.data.suffix.lower() != ".beton":  # else prepare_beton says, whatever the output, that it is one already
        check_apart([chosen.output], [chosen.data], remedy=remedy)
    with writing(chosen.output, remedy=remedy):
        prepared = prepare_beton(
            chosen.data,
            chosen.output,
            chosen.config,
            on_bad_image=chosen.on_bad_image,
            workers=chosen.workers,
            progress=sys.stderr.isatty(),
        )
    rows = [
        (
            "images",
            f"{len(prepared.manifest):,} in {len(prepared.manifest.classes):,} classes, {prepared.size / 1e9:.3f} GB",
        )
    ]
    rows += [(f"{count:,}", done) for done, count in prepared.counts.items()]
    rows += [("left out", f"{printable(path)} ({printable(reason)})") for path, reason in prepared.manifest.excluded]
    rows += [("left out", printable(line)) for line in prepared.manifest.left_out()]
    rows += [("classes", printable(line)) for line in prepared.manifest.class_remarks()]
    print_table([*rows, ("wrote", str(prepared.path))])
    return 0
