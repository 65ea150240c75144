"""SGD with the paper's weight-decay rule, and the learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(kw_only=True)
class OptimConfig:
    """Stochastic gradient descent with a cosine learning rate (PIRL section 4; VISSL's PIRL configuration)."""

    lr_per_256_images: float = 0.03
    """Learning rate at batch size 256; the rate used is this times ``batch_size / 256`` (0.12 at 1024)."""
    final_lr_per_256_images: float = 3e-5
    """Where the cosine ends, at batch size 256, scaled likewise (1.2e-4 at 1024)."""
    lr_update: Literal["epoch", "step"] = "epoch"
    """When the learning rate changes: once per epoch (VISSL) or at every step."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine; the paper has none."""
    momentum: float = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient."""
    decay_norm: bool = False
    """Also decay the weights and biases of normalisation layers."""
    decay_bias: bool = False
    """Also decay the biases of all other layers."""

    def __post_init__(self) -> None:
        if not self.lr_per_256_images > 0:
            raise ValueError(f"optim.lr_per_256_images must be above 0, got {self.lr_per_256_images}")
        if not 0 <= self.final_lr_per_256_images <= self.lr_per_256_images:
            raise ValueError(
                "optim.final_lr_per_256_images must be in [0, lr_per_256_images], "
                f"got {self.final_lr_per_256_images} with lr_per_256_images={self.lr_per_256_images}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0, got momentum=0")
        if not self.weight_decay >= 0:
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay}")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"optim.warmup_epochs must be at least 0, got {self.warmup_epochs}")


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Two groups, decayed and not decayed, each in the order of ``module.named_parameters()``.

    Parameters of normalisation layers belong to ``decay_norm``, the ``bias`` of every other layer to
    ``decay_bias``; what requires no gradient is left out. Both groups always exist, so that the optimizer's
    state has one shape for every setting.
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


def build_optimizer(module: nn.Module, config: OptimConfig, *, batch_size: int) -> torch.optim.SGD:
    """``torch.optim.SGD`` over :func:`parameter_groups`, one fused call per operation (``foreach``)."""
    return torch.optim.SGD(
        parameter_groups(module, config),
        lr=config.lr_per_256_images * batch_size / 256,
        momentum=config.momentum,
        nesterov=config.nesterov,
        foreach=True,
    )


def learning_rate(step: int, config: OptimConfig, *, batch_size: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of step ``step`` (0-based).

    With ``t`` the epochs done so far (whole epochs where ``lr_update="epoch"``), ``w`` the warm-up and ``E`` the
    epochs of the run: ``final + (lr - final) * (1 + cos(pi * (t - w) / (E - w))) / 2``; during warm-up
    ``lr * (t + u) / w`` with ``u`` one update interval in epochs, at most ``lr``.
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
    share = min(1.0, (done - warmup) / max(epochs - warmup, interval))
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
