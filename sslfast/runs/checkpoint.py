"""Checkpoints that survive a kill at any moment: written whole or not at all, checked by a sum, newest good one used.

Each checkpoint is a plain ``torch.load`` file ``step_00001000.pt`` beside ``step_00001000.pt.sha256``. Rename and
fsync protect against a crash of the program or the machine. The checksum is for what they cannot see: a copy cut
short, a full disk on another machine, a flipped bit; ``torch.load`` itself checks no sums, and a wrong weight would
train on unnoticed. It lies in a file of its own, in the format of ``sha256sum -c``, so that ``.pt`` stays readable
by anything; it is renamed into place before the ``.pt``, so a checkpoint never exists without it.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sslfast.files import fsync_directory

_NAME = re.compile(r"step_(\d{8,})\.pt")


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; those before it are untouched, and nothing is left of it."""


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes are not the ones that were written."""


def save_checkpoint(directory: Path, state: dict[str, Any], step: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` (number of finished steps).

    Temporary file in the same directory, flush, fsync, rename, fsync of the directory: after a crash at any moment
    the directory holds the checkpoint completely or not at all.

    Args:
        directory: made if it does not exist.
        state: tensors, dicts, lists and plain values only (what ``torch.load(weights_only=True)`` reads).
        step: at least 0.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointWriteError: the disk is full or fails.
    """
    path = checkpoint_path(directory, step)
    try:
        _write(path, state)
    except OSError as error:
        with suppress(OSError):  # a disk that fails may not let them go either: remove_leftovers does at the next start
            for leftover in (path, _sum_path(path)):
                leftover.with_name(f".{leftover.name}.tmp").unlink(missing_ok=True)
            if not path.exists():
                _sum_path(path).unlink(missing_ok=True)
        raise CheckpointWriteError(
            f"cannot write checkpoint {path} ({error.strerror or error}); free some space or correct the disk"
        ) from None
    return path


def _write(path: Path, state: dict[str, Any]) -> None:
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    sum_path = _sum_path(path)
    temporary, sum_temporary = (p.with_name(f".{p.name}.tmp") for p in (path, sum_path))
    with temporary.open("wb") as file:
        hashing = _HashingWriter(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            # torch finds its position wrong after a write that failed, and hides why.
            raise hashing.error or RuntimeError(f"torch cannot save the state of {path}") from None
        file.flush()
        os.fsync(file.fileno())
    with sum_temporary.open("w", encoding="ascii") as text:
        text.write(f"{hashing.sha256.hexdigest()}  {path.name}\n")
        text.flush()
        os.fsync(text.fileno())
    os.replace(sum_temporary, sum_path)
    os.replace(temporary, path)
    fsync_directory(directory)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint onto the CPU; tensors and plain values only, no code is executed.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: the checksum is missing or does not match, or the content is no checkpoint.
    """
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise CorruptCheckpointError(f"{path} is not a checkpoint of sslfast ({first_line}); use another") from None
    if not isinstance(state, dict) or "step" not in state:
        raise CorruptCheckpointError(f"{path} is not a checkpoint of sslfast (no step in it); use another")
    return state


def verify_checkpoint(path: Path) -> None:
    """Compare the file with its checksum; raises as :func:`load_checkpoint` does."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a step_*.pt file")
    try:
        expected = _sum_path(path).read_text(encoding="ascii").partition(" ")[0]
    except FileNotFoundError:
        raise CorruptCheckpointError(
            f"checkpoint {path} has no checksum {_sum_path(path).name} beside it; copy both or use another"
        ) from None
    except UnicodeDecodeError:
        expected = ""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CorruptCheckpointError(f"checkpoint {path} is damaged or cut short ({path.stat().st_size} bytes)")


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a directory, oldest first; empty where there is none. Nothing is verified."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Number of finished steps that a checkpoint's name states."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint name; expected step_00001000.pt")
    return int(match[1])


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return directory / f"step_{step:08d}.pt"


def latest_checkpoint(directory: Path, *, report: Callable[[str], None] | None = None) -> Path | None:
    """The newest good checkpoint, None where there is none at all.

    Each damaged one on the way is named in one line by ``report`` (default: standard error).

    Raises:
        CorruptCheckpointError: there are checkpoints and every one is damaged.
    """
    found = load_latest(directory, report=report, load=False)
    return None if found is None else found[0]


def load_latest(
    directory: Path, *, report: Callable[[str], None] | None = None, load: bool = True
) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of the newest good checkpoint; as :func:`latest_checkpoint`. ``load=False`` only verifies."""
    report = report or _print_error
    paths = list_checkpoints(directory)
    for position in range(len(paths) - 1, -1, -1):
        path = paths[position]
        try:
            if load:
                return path, load_checkpoint(path)
            verify_checkpoint(path)
            return path, {}
        except CorruptCheckpointError as error:
            if position:
                report(f"{error}; trying the one before, {paths[position - 1].name}")
    if paths:
        raise CorruptCheckpointError(
            f"every checkpoint in {directory} is damaged ({', '.join(p.name for p in paths)}); "
            "restore one from a copy or start again with another output directory"
        )
    return None


def prune_checkpoints(directory: Path, *, keep: int, keep_every_steps: int = 0) -> None:
    """Delete all but the newest ``keep`` and those whose step is a multiple of ``keep_every_steps`` (0: none)."""
    for path in list_checkpoints(directory)[:-keep]:
        if not (keep_every_steps and checkpoint_step(path) % keep_every_steps == 0):
            path.unlink()
            _sum_path(path).unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed :func:`save_checkpoint` left; only the owner of the run directory may call it."""
    if directory.is_dir():
        for path in directory.glob(".step_*.tmp"):
            path.unlink()
        for path in directory.glob("step_*.pt.sha256"):
            if not path.with_name(path.name.removesuffix(".sha256")).exists():
                path.unlink()


def set_aside_newer(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints above ``step`` to ``*.superseded``, so that no later resume takes them up."""
    newer = [path for path in list_checkpoints(directory) if checkpoint_step(path) > step]
    for path in newer:
        os.replace(path, path.with_name(path.name + ".superseded"))
        _sum_path(path).unlink(missing_ok=True)
    return newer


class _HashingWriter:
    """File face for ``torch.save``, which writes front to back: the checksum costs no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _print_error(line: str) -> None:
    print(f"sslfast: {line}", file=sys.stderr, flush=True)
