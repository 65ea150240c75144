"""Optimizers with the papers' weight-decay rules: configuration, parameter groups, and the table of optimizers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from sslfast.optim.lamb import LAMB
from sslfast.optim.lars import LARS
from sslfast.optim.schedule import LearningRate
from sslfast.optim.state import zero_moments, zero_momentum

Groups = list[dict[str, Any]]
"""Parameter groups: the decayed one and the other."""

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(kw_only=True)
class OptimConfig:
    """Stochastic gradient descent with a cosine learning rate (PIRL section 4; VISSL's PIRL configuration)."""

    name: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"
    """sgd; lars: layer-wise rates for large batches (You et al. 2017); adamw (Loshchilov & Hutter
    2019), which is Adam where weight_decay is 0; lamb: layer-wise rates with Adam's moments (You et al. 2020). LARS
    needs larger rates: 0.3 per 256 images with 10 epochs of warm-up and weight decay 1e-6 in SimCLR (Chen et al. 2020,
    section 2.2); AdamW smaller ones, about 1e-4."""
    trust_coefficient: float = 0.001
    """η of LARS: share of a layer's norm that a step of rate 1 moves it by."""
    lr_per_256_images: float = 0.03
    """Learning rate at batch size 256; the rate used is this times batch_size / 256 (0.12 at 1024)."""
    final_lr_per_256_images: float = 3e-5
    """Final rate of the cosine at batch size 256, scaled likewise (1.2e-4 at 1024)."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """How the rate falls after the warm-up. cosine: to the final rate at the end of the run. steps: times gamma at each
    milestone. constant: not at all."""
    milestones: tuple[float, ...] = ()
    """Epochs after which the rate falls, ascending, for schedule steps; those after the end of the run do nothing."""
    gamma: float = 0.1
    """Factor of the rate at each milestone."""
    lr_update: Literal["epoch", "step"] = "epoch"
    """When the learning rate changes: once per epoch (VISSL) or at every step."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up at the beginning; the paper has none."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moving averages of AdamW and LAMB: of gradients and of their squares."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient; AdamW, LAMB: decoupled, the share of the weights that rate 1 subtracts."""
    decay_norm: bool = False
    """Also decay the weights and biases of normalisation layers."""
    decay_bias: bool = False
    """Also decay the biases of all other layers."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {self.name!r}")
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise ValueError(f"optim.{name} must be a finite number, got {value}")
        if not self.lr_per_256_images > 0:
            raise ValueError(f"optim.lr_per_256_images must be above 0, got {self.lr_per_256_images}")
        if not 0 <= self.final_lr_per_256_images <= self.lr_per_256_images:
            raise ValueError(
                "optim.final_lr_per_256_images must be in [0, lr_per_256_images], "
                f"got {self.final_lr_per_256_images} with lr_per_256_images={self.lr_per_256_images}"
            )
        increasing = all(a < b for a, b in pairwise((0.0, *self.milestones)))
        if not increasing or (self.schedule == "steps") > bool(self.milestones):
            raise ValueError(
                "optim.milestones must be increasing epochs above 0, at least one with optim.schedule=steps, "
                f"got {self.milestones}"
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optim.gamma must be in (0, 1], got {self.gamma}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0, got momentum=0")
        if not self.trust_coefficient > 0:
            raise ValueError(f"optim.trust_coefficient must be above 0, got {self.trust_coefficient}")
        for option in OPTIMIZERS[self.name].without:
            if getattr(self, option):
                raise ValueError(f"optim.{option} must be False with optim.name={self.name}, which does not have it")
        if not self.weight_decay >= 0:
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay}")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"optim.warmup_epochs must be at least 0, got {self.warmup_epochs}")

    def peak_lr(self, batch_size: int) -> float:
        """Largest learning rate at a batch size: ``lr_per_256_images * batch_size / 256``."""
        return self.lr_per_256_images * batch_size / 256

    def learning_rate(self, *, batch_size: int, steps_per_epoch: int, epochs: int) -> LearningRate:
        """The schedule of a pretraining run."""
        return LearningRate(
            peak=self.peak_lr(batch_size),
            final=self.final_lr_per_256_images * batch_size / 256,
            shape=self.schedule,
            epochs=epochs,
            milestones=self.milestones,
            gamma=self.gamma,
            warmup=self.warmup_epochs,
            update=self.lr_update,
            steps_per_epoch=steps_per_epoch,
        )


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups, decayed and not decayed, each in the order of ``module.named_parameters()``.

    Parameters of normalisation layers belong to ``decay_norm``, the ``bias`` of every other layer to
    ``decay_bias``; what requires no gradient is left out. Both groups always exist, so that the layout of the
    optimizer's state does not depend on the settings.
    """
    norm = {id(p) for m in module.modules() if isinstance(m, _NORM_LAYERS) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in norm:
            decays = config.decay_norm
        elif name.rpartition(".")[2] == "bias":
            decays = config.decay_bias
        else:
            decays = True
        (decayed if decays else free).append(parameter)
    if not decayed and not free:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train")
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module, config: OptimConfig, *, lr: float) -> torch.optim.Optimizer:
    """The optimizer that ``config.name`` names in :data:`OPTIMIZERS`, over :func:`parameter_groups`.

    Its state exists, zero, from the start.

    Args:
        module: whose parameters it updates.
        config: which optimizer, and its options; its learning rates are not read.
        lr: first learning rate; :func:`~sslfast.optim.schedule.set_learning_rate` changes it.
    """
    return OPTIMIZERS[config.name].build(parameter_groups(module, config), config, lr)


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """An optimizer in :data:`OPTIMIZERS`."""

    build: Callable[[Groups, OptimConfig, float], torch.optim.Optimizer]
    """From the two groups of :func:`parameter_groups`, the configuration and the learning rate. State is allocated, and
    a step reads nothing from the device."""
    without: tuple[str, ...] = ()
    """Boolean options of :class:`OptimConfig` that it does not have."""


def _sgd(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    kernel = _kernel(groups)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, **kernel)
    if config.momentum > 0:
        zero_momentum(sgd)
    return sgd


def _adamw(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    adamw = torch.optim.AdamW(groups, lr=lr, betas=config.betas, **_kernel(groups))
    zero_moments(adamw, step_on_device=bool(adamw.defaults["fused"]))
    return adamw


def _lars(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    decayed, others = groups
    groups = [{**decayed, "adapt": True}, {**others, "adapt": False}]
    return LARS(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def _lamb(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    decayed, others = groups
    return LAMB([{**decayed, "adapt": True}, {**others, "adapt": False}], lr=lr, betas=config.betas)


def _kernel(groups: Groups) -> dict[str, Any]:
    """Torch's optimizers: fused on CUDA (one kernel over all parameters), foreach elsewhere, with the same state."""
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    return {"fused": True} if on_cuda else {"foreach": True}


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(build=_sgd),
    "lars": OptimizerEntry(build=_lars, without=("nesterov", "decay_norm", "decay_bias")),
    "adamw": OptimizerEntry(build=_adamw, without=("nesterov",)),
    "lamb": OptimizerEntry(build=_lamb, without=("nesterov", "decay_norm", "decay_bias")),
}
"""Every value of ``OptimConfig.name``. To add an optimizer: its class in a module of its own, an entry here, and its
name in :class:`OptimConfig`."""
