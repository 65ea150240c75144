"""Optimizers and learning-rate schedules. Imports no other package of sslfast."""

from sslfast.optim.optimizers import OptimConfig, build_optimizer, load_optimizer
from sslfast.optim.schedule import learning_rate, set_learning_rate

__all__ = [
    "OptimConfig",
    "build_optimizer",
    "learning_rate",
    "load_optimizer",
    "set_learning_rate",
]
