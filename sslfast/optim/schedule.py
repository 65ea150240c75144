"""The learning rate as a pure function of the step, for pretraining and for the evaluations that train."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A schedule: ``rate = schedule(step)``, ``step`` counted from 0.

    Times (``epochs``, ``milestones``, ``warmup``) are in epochs of ``steps_per_epoch`` steps; with one step per epoch
    they are in steps. With ``t`` the epochs done before the step (whole epochs where ``update="epoch"``), ``u`` one
    update interval in epochs and ``w`` the warm-up:

    - linear warm-up, ``t < w``: ``peak * (t + u) / w``, which ends at the peak; with a ``warmup_factor`` ``f``,
      ``peak * (f + (1 - f) * t / w)``;
    - cosine: ``final + (peak - final) * (1 + cos(pi * (t - w) / (epochs - w))) / 2``;
    - steps: ``peak * gamma^n``, ``n`` the milestones that are at most ``t``;
    - constant: ``peak``.
    """

    peak: float
    """Largest rate: that after the warm-up."""
    shape: Literal["cosine", "steps", "constant"] = "constant"
    """How the rate falls after the warm-up."""
    epochs: float = 1.0
    """Where the cosine ends."""
    final: float = 0.0
    """Rate at the end of the cosine."""
    milestones: tuple[float, ...] = ()
    """For ``steps``: when the rate falls, ascending."""
    gamma: float = 0.1
    """Factor of the rate at each milestone."""
    warmup: float = 0.0
    """Length of the warm-up."""
    warmup_factor: float | None = None
    """Share of the peak that the warm-up starts from; None: one update's share, so that no step has rate 0."""
    update: Literal["epoch", "step"] = "step"
    """Whether the rate changes at every step or only between epochs."""
    steps_per_epoch: int = 1

    def __call__(self, step: int) -> float:
        if self.update == "epoch":
            done, interval = float(step // self.steps_per_epoch), 1.0
        else:
            done, interval = step / self.steps_per_epoch, 1 / self.steps_per_epoch
        if done < self.warmup:
            start, reached = (0.0, done + interval) if self.warmup_factor is None else (self.warmup_factor, done)
            return self.peak * min(1.0, start + (1 - start) * reached / self.warmup)
        if self.shape == "steps":
            return self.peak * self.gamma ** bisect_right(self.milestones, done)
        if self.shape == "constant":
            return self.peak
        share = min(1.0, (done - self.warmup) / max(self.epochs - self.warmup, interval))
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group, times its ``lr_factor``, but of those with ``constant_lr``; a rate that is
    a tensor is filled in place."""
    for group in optimizer.param_groups:
        if group.get("constant_lr", False):
            continue
        own = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def set_weight_decay(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Set the decay of the parameter groups that follow the run's."""
    for group in optimizer.param_groups:
        if group.get("scheduled_decay", False):
            group["weight_decay"] = decay
