"""What DATA may be: a folder of images or of tar shards, one ``.tar``, a manifest of these (``.tsv``), or what ``data
prepare`` wrote (``.beton``)."""

from pathlib import Path
from typing import Literal

from sslfast.data.beton import Beton
from sslfast.data.manifest import Manifest, some_paths


def open_data(path: Path, *, on_bad_image: Literal["error", "skip"] = "error", progress: bool = False) -> Manifest:
    """The rows of a data set for a new run; ValueError where it cannot be used as it is.

    Args:
        path: a folder or a tar file is scanned, a manifest compared with its folder, a .beton file brings its own.
        on_bad_image: ``error``: images known as bad are a ValueError that names them; ``skip``: they are left out.
        progress: show progress bars on the terminal.
    """
    if _is_file(path, ".beton"):
        with Beton(path) as beton:
            manifest = beton.manifest
    elif _is_file(path, ".tsv"):
        manifest = Manifest.load(path)
        manifest.check()
    else:
        return Manifest.scan(path, on_bad_image=on_bad_image, progress=progress)
    if manifest.excluded and on_bad_image == "error" and manifest.archive is None:
        raise ValueError(
            f"{len(manifest.excluded)} images of {path} cannot be used: {some_paths(manifest.excluded)}; repair or "
            "remove the files and verify again, or pass --on-bad-image skip"
        )
    return manifest


def reopen_data(path: Path, known: Path) -> Manifest:
    """The rows of a run that is gone on with: those of its manifest file ``known``, if the data still is the same.

    ValueError where the data changed, or is another.
    """
    if _is_file(path, ".beton") or _is_file(path, ".tsv"):
        manifest = open_data(path, on_bad_image="skip")
        run = Manifest.load(known)
        same = manifest.digest() == run.digest() and manifest.archive_id == run.archive_id
        if not same:
            what = "other images" if manifest.digest() != run.digest() else "the same images stored in another way"
            raise ValueError(
                f"{path} holds {what} than the run that {known} belongs to ({len(manifest)} rows, then {len(run)}). "
                "Rows are identities in the bank and in checkpoints, so nothing is renumbered: give the data that the "
                "run started with, or choose another output directory"
            )
        return manifest
    run = Manifest.load(known, root=path)
    if run.archive_id:
        raise ValueError(f"the run that {known} belongs to started with a .beton file: give that one, not {path}")
    run.check()
    return run


def _is_file(path: Path, suffix: str) -> bool:
    """Whether the name claims so; a folder may be called anything."""
    return path.suffix == suffix and not path.is_dir()


def parse_data(text: str) -> Path | int:
    """A folder, or the N of ``synthetic:N``."""
    kind, colon, number = text.partition(":")
    if kind != "synthetic" or not colon:
        return Path(text)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"synthetic:N needs a number of images of at least 1, got {text!r}")
    return int(number)
