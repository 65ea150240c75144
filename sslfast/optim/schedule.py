"""The learning rate as a pure function of the step."""

import math
from bisect import bisect_right

import torch
from torch import Tensor

from sslfast.optim.optimizers import (
    OptimConfig,
)


def learning_rate(step: int, config: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of step ``step`` (0-based).

    With ``t`` the epochs done so far (whole epochs where ``lr_update="epoch"``), ``w`` the warm-up and ``E`` the
    epochs of the run: during warm-up ``lr * (t + u) / w`` with ``u`` one update interval in epochs, at most ``lr``;
    then

    - cosine: ``final + (lr - final) * (1 + cos(pi * (t - w) / (E - w))) / 2``,
    - steps: ``lr * gamma^n``, ``n`` the milestones that are at most ``t``,
    - constant: ``lr``.
    """
    scale = batch_size / 256
    peak, final = config.lr_per_256_images * scale, config.final_lr_per_256_images * scale
    if config.lr_update == "epoch":
        done, interval = float(step // steps_per_epoch), 1.0
    else:
        done, interval = step / steps_per_epoch, 1 / steps_per_epoch
    warmup = config.warmup_epochs
    if done < warmup:
        return peak * min(1.0, (done + interval) / warmup)
    if config.schedule == "steps":
        return peak * config.gamma ** bisect_right(config.milestones, done)
    if config.schedule == "constant":
        return peak
    share = min(1.0, (done - warmup) / max(epochs - warmup, interval))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate ``lr``."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
