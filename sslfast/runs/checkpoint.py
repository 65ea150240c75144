"""The store of one file per checkpoint: atomic writes, a SHA-256 beside each file.

A checkpoint is a plain ``torch.load`` file ``step_00001000.pt`` beside ``step_00001000.pt.sha256``. Rename and fsync
protect against a crash of the program or the machine. The checksum detects what they cannot: a truncated copy, a full
disk on another machine, a flipped bit. ``torch.load`` verifies no checksum, so training would continue from wrong
weights unnoticed. The checksum has a file of its own, in the format of ``sha256sum -c``, so that any program can read
the ``.pt``; it is renamed into place before the ``.pt``, so that no checkpoint exists without it.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sslfast.distributed import broadcast_object, is_main
from sslfast.files import fsync_directory, make_folder, open_regular, reason_of, save_tensors, what_helps
from sslfast.runs.checkpoint_store import CheckpointWriteError, CorruptCheckpointError, load_newest

_NAME = re.compile(r"step_(\d{8,})\.pt")


class HashedFileStore:
    """A :class:`~sslfast.runs.checkpoint_store.CheckpointStore` of one file per step, which rank 0 writes and every
    rank reads.

    Args:
        directory: created by the first :meth:`save`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def list(self) -> Sequence[int]:
        return [checkpoint_step(path) for path in list_checkpoints(self.directory)]

    def path(self, step: int) -> Path:
        return checkpoint_path(self.directory, step)

    def save(self, state: dict[str, Any], step: int) -> None:
        error = None
        if is_main():
            try:
                save_checkpoint(self.directory, state, step)
            except CheckpointWriteError as problem:
                error = str(problem)
        error = broadcast_object(error)
        if error is not None:
            raise CheckpointWriteError(error)

    def load(self, step: int) -> dict[str, Any]:
        return load_checkpoint(self.path(step))

    def delete(self, step: int) -> None:
        if is_main():
            self.path(step).unlink()
            _sum_path(self.path(step)).unlink(missing_ok=True)

    def set_aside(self, step: int) -> Path:
        path = self.path(step)
        aside = path.with_name(path.name + ".superseded")
        if is_main():
            number = 1
            while os.path.lexists(aside):  # of an earlier start: nothing is overwritten
                number += 1
                aside = path.with_name(f"{path.name}.superseded-{number}")
            os.replace(path, aside)
            with suppress(FileNotFoundError):
                os.replace(_sum_path(path), _sum_path(aside))
        return aside

    def clean(self) -> None:
        if not is_main():
            return
        names = set(_names(self.directory))
        for name in names:
            is_part = name.startswith(".step_") and name.endswith(".tmp")
            is_lone_sum = name.endswith(".sha256") and _NAME.fullmatch(name.removesuffix(".sha256")) is not None
            if is_part or (is_lone_sum and name.removesuffix(".sha256") not in names):
                with suppress(OSError):  # it is in nobody's way
                    (self.directory / name).unlink()


def load_latest(
    directory: Path,
    *,
    report: Callable[[str], None] | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of the newest good checkpoint file of a directory; arguments and errors as
    :func:`~sslfast.runs.checkpoint_store.load_newest`."""
    found = load_newest(HashedFileStore(directory), report=report, check=check)
    return None if found is None else (checkpoint_path(directory, found[0]), found[1])


def save_checkpoint(directory: Path, state: dict[str, Any], step: int) -> Path:
    """Write ``state`` as the checkpoint of ``step`` (number of finished steps).

    Temporary file in the same directory, flush, fsync, rename, fsync of the directory: after a crash at any moment
    the directory holds the complete checkpoint or none.

    Args:
        directory: created if it does not exist.
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
        with suppress(OSError):  # a failing disk may refuse this too; clean() does it at the next start
            for leftover in (path, _sum_path(path)):
                leftover.with_name(f".{leftover.name}.tmp").unlink(missing_ok=True)
            if not path.exists():
                _sum_path(path).unlink(missing_ok=True)
        remedy = what_helps(error.errno) or "make the folder writable"
        raise CheckpointWriteError(f"cannot write checkpoint {path} ({reason_of(error)}); {remedy}") from None
    return path


def _write(path: Path, state: dict[str, Any]) -> None:
    directory = path.parent
    make_folder(directory)
    sum_path = _sum_path(path)
    temporary, sum_temporary = (p.with_name(f".{p.name}.tmp") for p in (path, sum_path))
    with temporary.open("wb") as file:
        hashing = _HashingWriter(file)
        save_tensors(state, hashing)
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
    """Read and verify one checkpoint, with tensors on the CPU; no code in it is executed, and no pipe waited for.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: it cannot be read, the checksum is missing or does not match, or the content is no
            checkpoint or that of another step.
    """
    try:
        with open_regular(path) as file:
            _verify(path, file)
            file.seek(0)
            state = _content(path, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a step_*.pt file") from None
    except OSError as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read ({reason_of(error)})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise CorruptCheckpointError(f"{path} is not a checkpoint of sslfast (no step in it); use another")
    step = state["step"]
    if type(step) is not int or step < 0 or (_NAME.fullmatch(path.name) and step != checkpoint_step(path)):
        raise CorruptCheckpointError(f"{path} holds step {str(step)[:40]}, which is not the step in its name")
    return state


def _content(path: Path, file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # torch's own message advises to load the pickle unsafely
        raise CorruptCheckpointError(
            f"{path} is not a checkpoint of sslfast (it cannot be read as plain tensors and values); use another"
        ) from None


def _verify(path: Path, file: BufferedReader) -> None:
    """Compare the file with its checksum; raises as :func:`load_checkpoint` does."""
    name = _sum_path(path).name
    try:
        with open_regular(_sum_path(path)) as sums:
            expected = sums.read(64).decode("ascii", "replace")
    except FileNotFoundError:
        raise CorruptCheckpointError(
            f"checkpoint {path} has no checksum {name} beside it; copy both or use another"
        ) from None
    except OSError as error:
        raise CorruptCheckpointError(f"the checksum {name} of {path} cannot be read ({reason_of(error)})") from None
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == expected:
        return
    if set(expected) <= set("0123456789abcdef") and len(expected) == 64:
        raise CorruptCheckpointError(
            f"checkpoint {path} is damaged or truncated ({os.fstat(file.fileno()).st_size} bytes)"
        )
    raise CorruptCheckpointError(f"the checksum {name} of {path} is damaged")


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files of a directory, oldest first; empty if there are none. Nothing is verified.

    Raises:
        OSError: the directory cannot be listed.
    """
    return sorted((directory / name for name in _names(directory) if _NAME.fullmatch(name)), key=checkpoint_step)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OSError(f"cannot list the checkpoints in {directory} ({reason_of(error)}); make it readable") from None


def checkpoint_step(path: Path) -> int:
    """Step in a checkpoint's file name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint; expected the form step_00001000.pt")
    return int(match[1])


def checkpoint_path(directory: Path, step: int) -> Path:
    """Path of the checkpoint of ``step``."""
    return directory / f"step_{step:08d}.pt"


class _HashingWriter:
    """Hashing file wrapper for ``torch.save``, which writes sequentially: the checksum costs no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _sum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
