"""Which checkpoint a run is resumed from, and whether configuration and data allow it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sslfast.config import differences, from_dict, resumable_fields, to_dict
from sslfast.distributed import broadcast_object, gather_objects
from sslfast.runs.checkpoint import is_sharded, load_checkpoint
from sslfast.runs.checkpoint_store import CheckpointStore, CorruptCheckpointError, list_steps, load_newest
from sslfast.runs.directory import RunDirectory

KEYS = ("step", "method", "optimizer", "metrics", "config", "precision", "manifest_digest")
"""Keys of a run's checkpoint."""


def find_checkpoint(
    run: RunDirectory,
    resume: str,
    *,
    open_store: Callable[[Path], CheckpointStore],
    report: Callable[[str], None],
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Path and state of the checkpoint to resume from; None for a new run. Every rank calls it.

    Args:
        run: directory that the run writes to.
        resume: ``auto``, ``never``, or the path of a checkpoint or of a run directory.
        open_store: the store in a directory.
        report: takes a line for every damaged checkpoint that is passed over.
        check: raises CorruptCheckpointError for a path and a state, of a checkpoint, that must not be resumed from.

    Raises:
        ValueError, FileNotFoundError: ``run`` or ``resume`` does not allow it; names the remedy.
    """

    def checked(path: Path, state: dict[str, Any]) -> None:
        _check_keys(path, state)
        if check is not None:
            check(path, state)

    store = open_store(run.checkpoints)
    holds_checkpoints, holds_log = bool(list_steps(store)), broadcast_object(os.path.lexists(run.log))
    if resume == "never":
        if holds_checkpoints or holds_log:
            raise ValueError(
                f"{run.path} already holds a run; choose another output directory, or resume it with --resume auto"
            )
        return None
    if resume == "auto":
        return _newest(store, report, checked)
    path = Path(resume)
    siblings = open_store(path.parent)
    step = next((step for step in siblings.list() if siblings.path(step) == path), None)
    if step is not None:
        found = path, _together(lambda: siblings.load(step))
    elif path.is_dir() and not is_sharded(path):
        newest = _newest(open_store(RunDirectory(path).checkpoints), report, checked)
        if newest is None:
            raise FileNotFoundError(f"{path} holds no checkpoint; give a run directory or a step_*.pt file")
        found = newest
    else:
        try:
            found = path, _together(lambda: load_checkpoint(path))
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{error}; --init {path} starts a new run from weights") from None
    checked(*found)
    if holds_checkpoints and found[0].resolve().parent != run.checkpoints.resolve():
        raise ValueError(f"{run.path} already holds another run; choose a new output directory to resume {path} in")
    return found


def _newest(
    store: CheckpointStore, report: Callable[[str], None], check: Callable[[Path, dict[str, Any]], None]
) -> tuple[Path, dict[str, Any]] | None:
    found = load_newest(store, report=report, all_ranks=True, check=check)
    return None if found is None else (store.path(found[0]), found[1])


def _together(load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``load`` returns; every rank raises what one of them raises, since each may verify another part."""
    state, error = None, None
    try:
        state = load()
    except (CorruptCheckpointError, FileNotFoundError) as problem:
        error = problem
    errors = gather_objects(None if error is None else (isinstance(error, FileNotFoundError), str(error)))
    for found in errors:
        if found is not None:
            raise (FileNotFoundError if found[0] else CorruptCheckpointError)(found[1])
    assert state is not None
    return state


def _check_keys(path: Path, state: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpointError unless ``state`` has what a run's checkpoint has."""
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CorruptCheckpointError(
            f"{path} is no checkpoint of a run ({', '.join(missing)} missing); use another; --init {path} starts a new "
            "run from its weights"
        )
    tables = [key for key in ("method", "optimizer", "metrics", "config") if not isinstance(state[key], Mapping)]
    if tables:
        raise CorruptCheckpointError(f"{path} is no checkpoint of a run ({', '.join(tables)} no table); use another")


def check_same_run(path: Path, state: Mapping[str, Any], *, config: Any, manifest_digest: str) -> None:
    """Check that a run of ``config``, a TrainConfig, on these images may be resumed from ``state``.

    Fields declared :func:`~sslfast.config.resumable` may differ. Fields that did not exist when the checkpoint was
    written had their present defaults then.

    Raises:
        ValueError: one line with every field that differs, its old and its new value.
    """
    old, new = (_chosen(table) for table in (state["config"], to_dict(config)))
    if old["method"] != new["method"]:
        raise ValueError(
            f"cannot resume {path}: it is of recipe {old['recipe']} (method {old['method']}), not of {new['recipe']} "
            f"(method {new['method']}); give --recipe {old['recipe']}, or choose another output directory"
        )
    try:
        before = to_dict(from_dict(type(config), state["config"]))
    except ValueError as error:
        raise ValueError(f"cannot resume {path}: {error}; choose another output directory") from None
    free = resumable_fields(config)
    changed = [
        f"{name} was {old!r}, is {new!r}" for name, old, new in differences(before, to_dict(config)) if name not in free
    ]
    if changed:
        raise ValueError(
            f"cannot resume {path}: {'; '.join(changed)}. Give the old values, or choose another output directory; "
            f"--init {path} starts a new run from its weights"
        )
    if state["manifest_digest"] != manifest_digest:
        raise ValueError(
            f"cannot resume {path}: the images are not those it was trained on (files added, removed "
            "or changed), so the bank would belong to other images. Put them back, or choose another output "
            f"directory; --init {path} starts a new run from its weights"
        )


def _chosen(table: Mapping[str, Any]) -> dict[str, Any]:
    """What chose the fields of a configuration: names of its recipe and its method, where it has them."""
    method = table.get("method")
    return {"recipe": table.get("recipe"), "method": method.get("name") if isinstance(method, Mapping) else None}
