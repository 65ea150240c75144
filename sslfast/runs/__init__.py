"""A run on disk: directory, lock, log, checkpoints, resume. Imports ``config``, ``distributed`` and ``files``."""

from sslfast.runs.checkpoint import HashedFileStore, is_sharded, list_checkpoints, load_checkpoint, load_latest
from sslfast.runs.checkpoint_store import (
    CheckpointStore,
    CheckpointWriteError,
    CorruptCheckpointError,
    SplitCheckpointStore,
    prune,
    set_aside_newer,
    stored_bytes,
)
from sslfast.runs.directory import RunDirectory, versions
from sslfast.runs.log import LogFile, print_error, read_log
from sslfast.runs.outbox import Outbox, surviving
from sslfast.runs.resume import check_same_run, find_checkpoint
from sslfast.runs.sharded_store import ShardedStore
from sslfast.runs.stored_tensors import INDEX, TensorTable, restored

__all__ = [
    "INDEX",
    "CheckpointStore",
    "CheckpointWriteError",
    "CorruptCheckpointError",
    "HashedFileStore",
    "LogFile",
    "Outbox",
    "RunDirectory",
    "ShardedStore",
    "SplitCheckpointStore",
    "TensorTable",
    "check_same_run",
    "find_checkpoint",
    "is_sharded",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "print_error",
    "prune",
    "read_log",
    "restored",
    "set_aside_newer",
    "stored_bytes",
    "surviving",
    "versions",
]
