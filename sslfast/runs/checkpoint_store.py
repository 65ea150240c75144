"""Where checkpoints are kept: the interface of a store, and what the trainer does with any store."""

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sslfast.distributed import broadcast_object, gather_objects
from sslfast.files import reason_of, writing
from sslfast.runs.log import print_error


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


@runtime_checkable
class SplitCheckpointStore(CheckpointStore, Protocol):
    """A store to which every rank writes its part, while training goes on if asked to.

    In the states that it is given, a :class:`~sslfast.distributed.Shard` stands for a tensor that is split over ranks;
    of everything else rank 0's counts. :meth:`load` may return tables whose tensors are read when they are asked for.
    """

    def start(self, state: dict[str, Any], step: int) -> None:
        """Begin what :meth:`save` does, and return as soon as ``state`` may change. Waits for the checkpoint before."""

    def finish(self) -> None:
        """Wait for what :meth:`start` began; exchanges nothing with other ranks.

        Raises:
            CheckpointWriteError: it could not be written. Said once.
        """

    def has_failed(self) -> bool:
        """Whether :meth:`finish` would raise at once. Never waits."""


def load_newest(
    store: CheckpointStore,
    *,
    report: Callable[[str], None] | None = None,
    all_ranks: bool = False,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """Step and state of the newest good checkpoint, None where there is none at all. Nothing is deleted.

    Args:
        store: to read.
        report: takes one line for every checkpoint that is passed over (default: standard error).
        all_ranks: every rank of the run calls this, and all take the same checkpoint: one that all of them can read.
        check: raises CorruptCheckpointError for a path and a state that is not one of a run.

    Raises:
        CorruptCheckpointError: there are checkpoints and every one is damaged or cannot be read.
    """
    report = report or print_error
    steps = list_steps(store) if all_ranks else store.list()
    errors: list[str] = []
    for position in range(len(steps) - 1, -1, -1):
        state, error = None, None
        try:
            state = store.load(steps[position])
            if check is not None:
                check(store.path(steps[position]), state)
        except Exception as problem:  # whatever a disk, or a store of the user's, raises: another one may be good
            known = isinstance(problem, CorruptCheckpointError | FileNotFoundError)
            error = str(problem) if known else f"{store.path(steps[position])} cannot be read ({reason_of(problem)})"
        found = gather_objects(error) if all_ranks else [error]
        error = next((problem for problem in found if problem is not None), None)
        if state is not None and error is None:
            return steps[position], state
        errors.append(str(error))
        if position:
            report(f"{error}; trying the one before, {store.path(steps[position - 1]).name}")
    if steps:
        paths = [store.path(step) for step in steps]
        raise CorruptCheckpointError(
            f"every checkpoint in {paths[0].parent} is damaged ({', '.join(path.name for path in paths)}); "
            f"restore one from a copy or start again with another output directory. The newest: {errors[0]}"
        )
    return None


def prune(
    store: CheckpointStore, *, keep: int, keep_every_steps: int = 0, report: Callable[[str], None] | None = None
) -> None:
    """Delete all but the newest ``keep`` and those whose step is a multiple of ``keep_every_steps`` (0: none).

    One that cannot be deleted stays, with a line for ``report`` (default: standard error): a run does not end for it.
    """
    report = report or print_error
    try:
        steps = list_steps(store)
    except OSError as error:
        return report(f"old checkpoints are kept: {error}")
    for step in steps[:-keep]:
        if not (keep_every_steps and step % keep_every_steps == 0):
            try:
                store.delete(step)
            except OSError as error:
                report(
                    f"cannot delete {store.path(step)} ({reason_of(error)}); it is tried again at the next checkpoint"
                )


def set_aside_newer(store: CheckpointStore, step: int) -> list[Path]:
    """Set the checkpoints after ``step`` aside, so that no later resume uses them; where they are now.

    Raises:
        WriteError: one cannot be renamed.
    """
    aside = []
    for newer in list_steps(store):
        if newer > step:
            with writing(store.path(newer), remedy="make its folder writable"):
                aside.append(store.set_aside(newer))
    return aside


def stored_bytes(store: CheckpointStore) -> int:
    """Disk space of the checkpoints of a store."""
    total = 0
    for path in map(store.path, store.list()):
        inside = () if path.is_symlink() else os.walk(path)
        files = [path, *(Path(folder) / name for folder, _, names in inside for name in names)]
        for file in files:
            with suppress(OSError):  # what cannot be read is no space to reckon with
                found = os.lstat(file)
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def list_steps(store: CheckpointStore) -> Sequence[int]:
    """What rank 0 lists: a network file system shows the same folder to different machines at different times.

    Raises:
        OSError: on every rank, where rank 0 cannot list them.
    """
    steps: Sequence[int] = ()
    error = None
    try:
        steps = store.list()
    except OSError as problem:
        error = str(problem)
    steps, error = broadcast_object((steps, error))
    if error is not None:
        raise OSError(error)
    return steps
