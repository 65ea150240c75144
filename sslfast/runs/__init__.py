"""A run on disk: directory, lock, log, checkpoints, resume. Imports ``config`` and ``files``."""

from sslfast.runs.checkpoint import (
    CheckpointWriteError,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
    set_aside_newer,
)
from sslfast.runs.directory import RunDirectory, versions
from sslfast.runs.log import LogFile, read_log
from sslfast.runs.resume import check_same_run, find_checkpoint

__all__ = [
    "CheckpointWriteError",
    "LogFile",
    "RunDirectory",
    "check_same_run",
    "checkpoint_path",
    "checkpoint_step",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "prune_checkpoints",
    "read_log",
    "remove_leftovers",
    "save_checkpoint",
    "set_aside_newer",
    "versions",
]
