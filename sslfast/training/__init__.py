"""The pretraining run: configuration, trainer, data, logging, signals, dry run. Imports ``evaluation`` and what
lies below."""

from sslfast.training.config import TrainConfig
from sslfast.training.dry_run import check_memory, summary
from sslfast.training.features import CollapseError
from sslfast.training.logging import LOGGERS
from sslfast.training.nonfinite import NonFiniteLossError
from sslfast.training.result import TrainResult
from sslfast.training.signals import RunInterruptedError, stopping_at_once
from sslfast.training.trainer import Trainer

__all__ = [
    "LOGGERS",
    "CollapseError",
    "NonFiniteLossError",
    "RunInterruptedError",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "check_memory",
    "stopping_at_once",
    "summary",
]
