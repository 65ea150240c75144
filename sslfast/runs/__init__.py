"""A run on disk: directory, lock, log, checkpoints, resume. Imports ``config``, ``distributed`` and ``files``."""

from sslfast.runs.checkpoint import HashedFileStore, list_checkpoints, load_checkpoint, load_latest
from sslfast.runs.checkpoint_store import (
    CheckpointStore,
    CheckpointWriteError,
    CorruptCheckpointError,
    prune,
    set_aside_newer,
    stored_bytes,
)
from sslfast.runs.directory import RunDirectory, versions
from sslfast.runs.log import LogFile, print_error, read_log
from sslfast.runs.outbox import Outbox, surviving
from sslfast.runs.resume import check_same_run, find_checkpoint

__all__ = [
    "CheckpointStore",
    "CheckpointWriteError",
    "CorruptCheckpointError",
    "HashedFileStore",
    "LogFile",
    "Outbox",
    "RunDirectory",
    "check_same_run",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "print_error",
    "prune",
    "read_log",
    "set_aside_newer",
    "stored_bytes",
    "surviving",
    "versions",
]
