"""Optimizers, parameter groups, and schedules of rate and decay. Imports no other package of sslfast."""

from sslfast.optim.groups import ParameterOptions, prepare_gradients
from sslfast.optim.optimizers import OPTIMIZERS, OptimConfig, OptimizerEntry, build_optimizer
from sslfast.optim.schedule import LearningRate, set_learning_rate, set_weight_decay
from sslfast.optim.state import load_optimizer

__all__ = [
    "OPTIMIZERS",
    "LearningRate",
    "OptimConfig",
    "OptimizerEntry",
    "ParameterOptions",
    "build_optimizer",
    "load_optimizer",
    "prepare_gradients",
    "set_learning_rate",
    "set_weight_decay",
]
