"""The store of one file a rank and checkpoint: every rank writes and reads its part, and none gathers the whole.

A checkpoint is a folder ``step_00001000``: ``rank_00000.bin`` and so on, and ``index.json`` with a SHA-256 of every
block of them (``stored_tensors.py``). All ranks write under a temporary name; when all have synced their files, rank 0
writes the index and renames the folder. So a folder with its final name is complete.

:meth:`ShardedStore.start` copies this rank's part to host memory and leaves the rest to a thread, which exchanges
errors and checksums with the threads of other ranks in a process group of its own.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from sslfast.distributed import background_gather, is_main, rank
from sslfast.files import fsync_directory, make_folder, reason_of, what_helps
from sslfast.runs.checkpoint import StoredCheckpoints, hide_checkpoint, remove_other
from sslfast.runs.checkpoint_store import CheckpointWriteError
from sslfast.runs.stored_tensors import Block, Part, layout, own_parts, pack, part_file, write_index, write_part

_REMEDY = "make the folder writable for all ranks, or choose --checkpoint-store file"


class ShardedStore(StoredCheckpoints):
    """A :class:`~sslfast.runs.checkpoint_store.SplitCheckpointStore` in a folder that all ranks share.

    Args:
        directory: created by the first save.
    """

    suffix = ""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._gather: Callable[[Any], list[Any]] | None = None
        self._thread: Thread | None = None
        self._error: str | None = None

    def save(self, state: dict[str, Any], step: int) -> None:
        """As the interface says; takes a block of host memory beside the state."""
        self.finish()
        write, parts = self._prepare(state, step)
        write(parts)
        self.finish()

    def start(self, state: dict[str, Any], step: int) -> None:
        """As the interface says; takes host memory for this rank's part until it is written."""
        self.finish()
        write, parts = self._prepare(state, step)
        copies: list[Part] | None
        try:
            copies = [part._replace(values=part.values.to("cpu", copy=True)) for part in parts]
        except (RuntimeError, MemoryError):  # torch's allocator raises the former
            copies = None
        self._thread = Thread(target=write, args=(copies,), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """As the interface says."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointWriteError(error)

    def has_failed(self) -> bool:
        """As the interface says."""
        return self._error is not None and (self._thread is None or not self._thread.is_alive())

    def _prepare(
        self, state: dict[str, Any], step: int
    ) -> tuple[Callable[[Iterable[Part] | None], None], Iterable[Part]]:
        """What writes this rank's parts, and the parts."""
        if self._gather is None:
            self._gather = background_gather()
        packed, tensors = pack(state)
        write = partial(self._write, step, packed, layout(tensors), self._gather)
        return write, own_parts(tensors, is_main=is_main())

    def _write(
        self,
        step: int,
        packed: Any,
        tensors: list[dict[str, Any]],
        gather: Callable[[Any], list[Any]],
        parts: Iterable[Part] | None,
    ) -> None:
        """Write the checkpoint together with the other ranks; what is wrong on any of them is in ``_error`` on all."""
        path = self.new_path(step)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            error, blocks = _error_of(path, lambda: _write_own(temporary, parts))
            found: list[tuple[str | None, list[Block], Any]] = gather((error, blocks, tensors))
            error = next((problem for problem, _, _ in found if problem is not None), None)
            if error is None and any(other != tensors for _, _, other in found):
                error = f"cannot write checkpoint {path}: ranks differ in the tensors of their states"
            if error is None and is_main():
                own = [blocks for _, blocks, _ in found]
                error, _ = _error_of(path, lambda: _complete(temporary, path, packed, tensors, own))
            error = gather(error)[0]
        except Exception as problem:  # of the exchange: the main thread meets it too
            error = f"cannot write checkpoint {path} ({reason_of(problem)}); the next start resumes from the one before"
        if error is not None:
            with suppress(OSError):  # clean() does it at the next start
                (temporary / part_file(rank())).unlink(missing_ok=True)
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
        self._error = error


def _write_own(folder: Path, parts: Iterable[Part] | None) -> list[Block]:
    if parts is None:
        raise OSError(errno.ENOMEM, "no memory for a copy of this rank's part")
    make_folder(folder)
    blocks = write_part(folder / part_file(rank()), parts)
    fsync_directory(folder)
    return blocks


def _complete(
    temporary: Path, path: Path, packed: Any, tensors: list[dict[str, Any]], blocks: list[list[Block]]
) -> list[Block]:
    """Write the index and give the folder its name; a checkpoint of this step is replaced."""
    write_index(temporary, packed, tensors, blocks)
    replaced = hide_checkpoint(path) if path.is_dir() else None
    os.replace(temporary, path)
    fsync_directory(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    remove_other(path)
    return []


def _error_of(path: Path, action: Callable[[], list[Block]]) -> tuple[str | None, list[Block]]:
    try:
        return None, action()
    except Exception as error:  # every rank has to hear of it
        remedy = what_helps(error.errno if isinstance(error, OSError) else None) or _REMEDY
        where = f"rank {rank()}: " if rank() else ""
        return f"cannot write checkpoint {path} ({where}{reason_of(error)}); {remedy}", []
