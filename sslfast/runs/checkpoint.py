"""The checkpoints of a run directory, and the store of one file per checkpoint with its SHA-256 beside it.

Such a checkpoint is a plain ``torch.load`` file ``step_00001000.pt`` beside ``step_00001000.pt.sha256``. Rename and
fsync protect against a crash of the program or the machine. The checksum detects what they cannot: a truncated copy, a
full disk on another machine, a flipped bit. ``torch.load`` verifies no checksum, so training would continue from wrong
weights unnoticed. The checksum has a file of its own, in the format of ``sha256sum -c``, so that any program can read
the ``.pt``; it is renamed into place before the ``.pt``, so that no checkpoint exists without it.

A folder ``step_00001000`` beside them is a sharded checkpoint (``sharded_store.py``). Whichever kind a run writes, it
lists, loads and deletes both.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from sslfast.distributed import broadcast_object, is_main, rank, world_size
from sslfast.files import fsync_directory, make_folder, open_regular, reason_of, save_tensors, what_helps
from sslfast.runs.checkpoint_store import CheckpointWriteError, CorruptCheckpointError, load_newest
from sslfast.runs.stored_tensors import INDEX, read_sharded

_NAME = re.compile(r"step_(\d{8,})(\.pt)?")
SUFFIX = ".pt"


class StoredCheckpoints:
    """The checkpoints in a directory, of both kinds: what the stores of either share.

    Args:
        directory: created by the first save.
    """

    suffix: ClassVar[str]
    """Of the names of new checkpoints."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def list(self) -> Sequence[int]:
        return [checkpoint_step(path) for path in list_checkpoints(self.directory)]

    def path(self, step: int) -> Path:
        there = (checkpoint_path(self.directory, step, suffix=suffix) for suffix in (SUFFIX, ""))
        return next(filter(os.path.lexists, there), self.new_path(step))

    def new_path(self, step: int) -> Path:
        """Where a checkpoint of ``step`` is written."""
        return checkpoint_path(self.directory, step, suffix=self.suffix)

    def load(self, step: int) -> dict[str, Any]:
        """As the interface says; of a sharded checkpoint every rank verifies its share of the blocks."""
        path = self.path(step)
        return load_checkpoint(path, verify=(rank(), world_size()))

    def delete(self, step: int) -> None:
        if is_main():
            remove_checkpoint(self.path(step))

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
                path = self.directory / name
                with suppress(OSError):  # it is in nobody's way
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


class HashedFileStore(StoredCheckpoints):
    """A :class:`~sslfast.runs.checkpoint_store.CheckpointStore` of one file per step, which rank 0 writes and every
    rank reads."""

    suffix = SUFFIX

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


def load_latest(
    directory: Path,
    *,
    report: Callable[[str], None] | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of the newest good checkpoint of a directory, of either kind; arguments and errors as
    :func:`~sslfast.runs.checkpoint_store.load_newest`. Of a sharded one what is read is verified, nothing else."""
    store = HashedFileStore(directory)
    found = load_newest(_Unverified(directory), report=report, check=check)
    return None if found is None else (store.path(found[0]), found[1])


class _Unverified(HashedFileStore):
    """Of a sharded checkpoint, what is read is verified, and nothing else is read."""

    def load(self, step: int) -> dict[str, Any]:
        return load_checkpoint(self.path(step))


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
    remove_other(path)


def remove_other(path: Path) -> None:
    """Of a step that was saved anew as ``path``, remove the checkpoint of the other kind."""
    other = path.with_suffix("") if path.suffix else path.with_suffix(SUFFIX)
    with suppress(OSError):
        if os.path.lexists(other):
            remove_checkpoint(other)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint of either kind; a folder stops being one before its files go. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(hide_checkpoint(path))
        return
    path.unlink()
    _sum_path(path).unlink(missing_ok=True)


def hide_checkpoint(folder: Path) -> Path:
    """Give the folder of a checkpoint that is to be deleted a name that :meth:`StoredCheckpoints.clean` knows; its new
    path. Raises OSError."""
    hidden = folder.with_name(f".{folder.name}.deleted.tmp")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.replace(folder, hidden)
    return hidden


def load_checkpoint(path: Path, *, verify: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Read and verify one checkpoint, with tensors on the CPU; no code in it is executed, and no pipe waited for.

    Of a sharded one, a folder, tables of tensors are :class:`~sslfast.runs.stored_tensors.TensorTable`: read and
    verified where they are used. ``verify`` as of :func:`~sslfast.runs.stored_tensors.read_sharded`.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: it cannot be read, the checksum is missing or does not match, or the content is no
            checkpoint or that of another step.
    """
    if path.is_dir() and path.suffix != SUFFIX:
        return _checked(path, read_sharded(path, verify=verify))
    try:
        with open_regular(path) as file:
            _verify(path, file)
            file.seek(0)
            state = _content(path, file)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a step_*.pt file") from None
    except OSError as error:
        raise CorruptCheckpointError(f"checkpoint {path} cannot be read ({reason_of(error)})") from None
    return _checked(path, state)


def is_sharded(path: Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint, whatever its name."""
    return (path / INDEX).is_file()


def _checked(path: Path, state: Any) -> dict[str, Any]:
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
    """Checkpoints of a directory, files and folders of sharded ones, oldest first; empty if there are none. Nothing is
    verified. Where a step has both, as an interrupted save may leave it, its file.

    Raises:
        OSError: the directory cannot be listed.
    """
    found = {checkpoint_step(Path(name)): name for name in sorted(_names(directory)) if _NAME.fullmatch(name)}
    return [directory / found[step] for step in sorted(found)]


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OSError(f"cannot list the checkpoints in {directory} ({reason_of(error)}); make it readable") from None


def checkpoint_step(path: Path) -> int:
    """Step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint; expected the form step_00001000.pt")
    return int(match[1])


def checkpoint_path(directory: Path, step: int, *, suffix: str = SUFFIX) -> Path:
    """Path of the checkpoint file of ``step``; with an empty suffix, of the folder of a sharded one."""
    return directory / f"step_{step:08d}{suffix}"


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
