"""Outputs apart from inputs: what a command writes neither replaces a file that it reads nor lands among the images."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslfast.data.images import SUFFIXES
from sslfast.data.source import as_data
from sslfast.files import OUTPUT

_READ_IN_FOLDERS = (*SUFFIXES, ".tar", ".parquet")
_SPLITS = ("train", "val")
_RECORDS = ("config.json", "versions.json", "manifest.tsv", "log.jsonl", "init.json", "bad_images.txt", ".lock")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Any], *, remedy: str = OUTPUT) -> None:
    """Raises ValueError where a file to be written is one that is read; links and ``..`` are followed.

    Args:
        outputs: files to be written; they need not exist.
        inputs: what is read: data, lists, run directories, weights; of no account are URLs and objects. Into a folder
            only files may be written that are not read as part of it: no picture or shard, none that stands for
            ``train`` or ``val``, and no file of a run.
        remedy: what helps.
    """
    paths = _paths(tuple(inputs))
    for output in outputs:
        real = _real(output)
        for source in paths:
            folder = _real(source)
            if real == folder or _same_file(output, source):
                raise ValueError(f"{output} is read and would be replaced; {remedy}")
            if os.path.isdir(folder) and folder in real.parents and _is_part(real.relative_to(folder), folder):
                raise ValueError(f"{output} would be a part of {source}, which is read; {remedy}")


def check_run_apart(run: Path, data: Any) -> None:
    """Raises ValueError where a new run's files would land among the images of ``data``, or in a folder that holds the
    folder of images. A run that is there already can be resumed."""
    run_folder = _real(run)
    if os.path.lexists(run / "config.json") or os.path.lexists(run / "checkpoints"):
        return
    remedy = "choose another output directory with --output"
    for path in _paths(data):
        images = _real(path)
        if os.path.isdir(images):
            if images == run_folder or _same_file(run, path):
                raise ValueError(f"the run directory {run} is the folder of images {path}; {remedy}")
            if images in run_folder.parents:
                raise ValueError(f"the run directory {run} lies inside the folder of images {path}; {remedy}")
            if run_folder in images.parents:
                raise ValueError(f"the folder of images {path} lies inside the run directory {run}; {remedy}")
        elif images.parent == run_folder and images.name in _RECORDS:
            raise ValueError(f"{path} is read and would be replaced by the run in {run}; {remedy}")


def _paths(data: Any) -> list[Path]:
    """The local files and folders among the data, as they were given."""
    if isinstance(data, list | tuple):
        return [path for part in data for path in _paths(part)]
    if isinstance(data, str | Path) and isinstance(as_data(data), Path):
        return [Path(data)]
    return []


def _is_part(path: Path, folder: Path) -> bool:
    """Whether a file at a relative path is read where the folder is."""
    if os.path.lexists(folder / "config.json") and os.path.lexists(folder / "checkpoints"):
        return str(path) in _RECORDS or path.parts[0] == "checkpoints"
    return path.suffix.lower() in _READ_IN_FOLDERS or (len(path.parts) == 1 and path.stem in _SPLITS)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _same_file(one: Path, other: Path) -> bool:
    """Also where letters of both cases are one name."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
