"""Optimizers and learning-rate schedules. Imports no other package of sslfast."""

from sslfast.optim.optimizers import OPTIMIZERS, OptimConfig, OptimizerEntry, build_optimizer
from sslfast.optim.schedule import LearningRate, set_learning_rate
from sslfast.optim.state import load_optimizer

__all__ = [
    "OPTIMIZERS",
    "LearningRate",
    "OptimConfig",
    "OptimizerEntry",
    "build_optimizer",
    "load_optimizer",
    "set_learning_rate",
]
