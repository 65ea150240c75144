"""Where checkpoints are kept: the interface of a store, and what the trainer does with any store."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sslfast.distributed import broadcast_object, gather_objects


class CheckpointWriteError(OSError):
    """A checkpoint that could not be written; those before it are untouched, and nothing is left of it."""


class CorruptCheckpointError(ValueError):
    """A checkpoint whose bytes are not the ones that were written."""


class CheckpointStore(Protocol):
    """The checkpoints of one run, named by their step (number of finished steps).

    Every rank of a run makes a store and calls its methods at the same points of the run, with the same arguments but
    for ``state``. Which rank does the work is the store's affair: one rank for all, or each for its part. A store that
    fails in :meth:`save` raises on every rank.
    """

    def list(self) -> Sequence[int]:
        """Steps that have a complete checkpoint, ascending; empty where nothing was ever saved. Nothing is read."""

    def path(self, step: int) -> Path:
        """The file or folder of a checkpoint, whether it exists or not; names it in messages."""

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write the checkpoint of ``step``, durably: after a crash at any moment it is listed complete or not at all.

        Args:
            state: dicts, lists, tensors and plain values. Under "method", rank 0 has the whole of a state that is split
                over ranks (a sharded bank), other ranks their part; everything else is the same on every rank.
            step: at least 0. A checkpoint of this step is replaced.

        Raises:
            CheckpointWriteError: what was there before is untouched.
        """

    def load(self, step: int) -> dict[str, Any]:
        """The state of a checkpoint, verified, with tensors on the CPU.

        Raises:
            CorruptCheckpointError: it is damaged.
            FileNotFoundError: there is none.
        """

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""

    def set_aside(self, step: int) -> Path:
        """Take a checkpoint out of :meth:`list` without deleting it; where it is now."""

    def clean(self) -> None:
        """Delete what interrupted saves have left. Called before the first save, by the run that owns the directory."""


def load_newest(
    store: CheckpointStore, *, report: Callable[[str], None] | None = None, all_ranks: bool = False
) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest good checkpoint, None where there is none at all.

    Args:
        store: to read.
        report: takes one line for every damaged checkpoint that is passed over (default: standard error).
        all_ranks: every rank of the run calls this, and all take the same checkpoint: one that all of them can read.

    Raises:
        CorruptCheckpointError: there are checkpoints and every one is damaged.
    """
    report = report or _print_error
    steps = _steps(store) if all_ranks else store.list()
    for position in range(len(steps) - 1, -1, -1):
        state, error = None, None
        try:
            state = store.load(steps[position])
        except (CorruptCheckpointError, FileNotFoundError) as problem:
            error = str(problem)
        errors = gather_objects(error) if all_ranks else [error]
        error = next((found for found in errors if found is not None), None)
        if state is not None and error is None:
            return steps[position], state
        if position:
            report(f"{error}; trying the one before, {store.path(steps[position - 1]).name}")
    if steps:
        paths = [store.path(step) for step in steps]
        raise CorruptCheckpointError(
            f"every checkpoint in {paths[0].parent} is damaged ({', '.join(path.name for path in paths)}); "
            "restore one from a copy or start again with another output directory"
        )
    return None


def prune(store: CheckpointStore, *, keep: int, keep_every_steps: int = 0) -> None:
    """Delete all but the newest ``keep`` and those whose step is a multiple of ``keep_every_steps`` (0: none)."""
    for step in _steps(store)[:-keep]:
        if not (keep_every_steps and step % keep_every_steps == 0):
            store.delete(step)


def set_aside_newer(store: CheckpointStore, step: int) -> list[Path]:
    """Set the checkpoints after ``step`` aside, so that no later resume uses them; where they are now."""
    return [store.set_aside(newer) for newer in _steps(store) if newer > step]


def stored_bytes(store: CheckpointStore) -> int:
    """Disk space of the checkpoints of a store."""
    paths = [store.path(step) for step in store.list()]
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _steps(store: CheckpointStore) -> Sequence[int]:
    """What rank 0 lists: a network file system shows the same folder to different machines at different times."""
    return broadcast_object(store.list())


def _print_error(line: str) -> None:
    print(f"sslfast: {line}", file=sys.stderr, flush=True)
