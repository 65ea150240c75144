"""Optimizers with the papers' weight-decay rules: configuration, parameter groups, and the table of optimizers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from sslfast.optim.groups import Groups, ParameterOptions, parameter_groups
from sslfast.optim.lamb import LAMB
from sslfast.optim.lars import LARS
from sslfast.optim.schedule import LearningRate
from sslfast.optim.state import zero_moments, zero_momentum


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
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How both rates follow the batch size: times batch_size / 256, or times the root of it. SimCLR's
    0.075 sqrt(batch_size) (appendix B.1) is sqrt with 1.2 at 256."""
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
    warmup_factor: float | None = None
    """Share of the peak rate that the warm-up starts from; None: one update's share of it."""
    bias_norm_lr_factor: float = 1.0
    """Factor of the rate of the parameters that do not decay, biases and normalisation layers; Barlow Twins has one."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moving averages of AdamW and LAMB: of gradients and of their squares."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient; AdamW, LAMB: decoupled, the share of the weights that rate 1 subtracts."""
    final_weight_decay: float | None = None
    """Weight decay at the end of the run: it changes with every step along a cosine (DINO); None: it is constant."""
    decay_norm: bool = False
    """Also decay the weights and biases of normalisation layers; LARS and LAMB adapt the rate of what they decay."""
    decay_bias: bool = False
    """Also decay the biases of all other layers, likewise."""
    clip_grad_norm: float = 0.0
    """Largest L2 norm of the gradient: a longer one is scaled down to it. 0: gradients are not clipped."""
    clip_each: bool = False
    """Clip the gradient of every parameter by its own norm (DINO), not that of all of them together."""

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
        if self.warmup_factor is not None and not 0 <= self.warmup_factor <= 1:
            raise ValueError(f"optim.warmup_factor must be in [0, 1], got {self.warmup_factor}")
        for name in ("bias_norm_lr_factor", "clip_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name} must be at least 0, got {getattr(self, name)}")
        if self.final_weight_decay is not None and not self.final_weight_decay >= 0:
            raise ValueError(f"optim.final_weight_decay must be at least 0, got {self.final_weight_decay}")
        if self.clip_each and self.clip_grad_norm == 0:
            raise ValueError("optim.clip_each needs optim.clip_grad_norm above 0, got clip_grad_norm=0")

    def peak_lr(self, batch_size: int) -> float:
        """Largest learning rate at a batch size: ``lr_per_256_images`` scaled as ``lr_scaling`` says."""
        return self.lr_per_256_images * self._scale(batch_size)

    def _scale(self, batch_size: int) -> float:
        return batch_size / 256 if self.lr_scaling == "linear" else math.sqrt(batch_size / 256)

    def learning_rate(self, *, batch_size: int, steps_per_epoch: int, epochs: int) -> LearningRate:
        """The schedule of a pretraining run."""
        return LearningRate(
            peak=self.peak_lr(batch_size),
            final=self.final_lr_per_256_images * self._scale(batch_size),
            shape=self.schedule,
            epochs=epochs,
            milestones=self.milestones,
            gamma=self.gamma,
            warmup=self.warmup_epochs,
            warmup_factor=self.warmup_factor,
            update=self.lr_update,
            steps_per_epoch=steps_per_epoch,
        )

    def decay(self, total_steps: int) -> LearningRate:
        """The weight decay of each step of a run, as a schedule of steps."""
        if self.final_weight_decay is None:
            return LearningRate(peak=self.weight_decay)
        return LearningRate(peak=self.weight_decay, final=self.final_weight_decay, shape="cosine", epochs=total_steps)


def build_optimizer(
    module: nn.Module, config: OptimConfig, *, lr: float, options: Mapping[str, ParameterOptions] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that ``config.name`` names in :data:`OPTIMIZERS`, over :func:`parameter_groups`.

    Its state exists, zero, from the start.

    Args:
        module: whose parameters it updates.
        config: which optimizer, and its options; its learning rates are not read.
        lr: first learning rate, and for good that of parameters with a constant one;
            :func:`~sslfast.optim.schedule.set_learning_rate` changes it.
        options: of the parameters below a name.
    """
    groups = parameter_groups(module, config, options)
    for group in groups:
        group["lr"] = lr * group["lr_factor"]
    return OPTIMIZERS[config.name].build(groups, config, lr)


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """An optimizer in :data:`OPTIMIZERS`."""

    build: Callable[[Groups, OptimConfig, float], torch.optim.Optimizer]
    """From the groups of :func:`parameter_groups`, the configuration and the learning rate. State is allocated, and
    a step reads nothing from the device."""
    without: tuple[str, ...] = ()
    """Boolean options of :class:`OptimConfig` that it does not have."""


def _sgd(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    kernel = _kernel(groups)
    sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, **kernel)
    if any(group["momentum"] > 0 for group in sgd.param_groups):
        zero_momentum(sgd)
    return sgd


def _adamw(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    adamw = torch.optim.AdamW(groups, lr=lr, betas=config.betas, **_kernel(groups))
    zero_moments(adamw, step_on_device=bool(adamw.defaults["fused"]))
    return adamw


def _lars(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return LARS(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def _lamb(groups: Groups, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    return LAMB(groups, lr=lr, betas=config.betas)


def _kernel(groups: Groups) -> dict[str, Any]:
    """Torch's optimizers: fused on CUDA (one kernel over all parameters), foreach elsewhere, with the same state."""
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    return {"fused": True} if on_cuda else {"foreach": True}


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "sgd": OptimizerEntry(build=_sgd),
    "lars": OptimizerEntry(build=_lars, without=("nesterov",)),
    "adamw": OptimizerEntry(build=_adamw, without=("nesterov",)),
    "lamb": OptimizerEntry(build=_lamb, without=("nesterov",)),
}
"""Every value of ``OptimConfig.name``. To add an optimizer: its class in a module of its own, an entry here, and its
name in :class:`OptimConfig`."""
