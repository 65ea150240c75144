"""SGD, LARS and AdamW with the papers' weight-decay rules, and the learning rate as a pure function of the step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

_NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(kw_only=True)
class OptimConfig:
    """Stochastic gradient descent with a cosine learning rate (PIRL section 4; VISSL's PIRL configuration)."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd; lars: layer-wise rates for large batches (You et al. 2017); adamw (Loshchilov & Hutter
    2019), which is Adam where weight_decay is 0. LARS has larger rates: 0.3 per 256 images with 10 epochs of warm-up
    and weight decay 1e-6 in SimCLR (Chen et al. 2020, section 2.2); AdamW smaller ones, about 1e-4."""
    trust_coefficient: float = 0.001
    """η of LARS: share of a layer's norm that a step of rate 1 moves it by."""
    lr_per_256_images: float = 0.03
    """Learning rate at batch size 256; the rate used is this times batch_size / 256 (0.12 at 1024)."""
    final_lr_per_256_images: float = 3e-5
    """Where the cosine ends, at batch size 256, scaled likewise (1.2e-4 at 1024)."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """How the rate falls after the warm-up. cosine: to the final rate at the end of the run. steps: times gamma at each
    milestone. constant: not at all."""
    milestones: tuple[float, ...] = ()
    """Epochs after which the rate falls, rising, for schedule steps; those behind the end of the run have no effect."""
    gamma: float = 0.1
    """Factor of the rate at each milestone."""
    lr_update: Literal["epoch", "step"] = "epoch"
    """When the learning rate changes: once per epoch (VISSL) or at every step."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up at the beginning; the paper has none."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Weights of the old moving averages of AdamW: of gradients and of their squares."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 1e-4
    """L2 penalty, added to the gradient; AdamW: share that a step of rate 1 takes off the weights."""
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
        rising = all(a < b for a, b in pairwise((0.0, *self.milestones)))
        if not rising or (self.schedule == "steps") > bool(self.milestones):
            raise ValueError(
                "optim.milestones must be rising epochs above 0, at least one with optim.schedule=steps, "
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
        unknown = {"lars": ("nesterov", "decay_norm", "decay_bias"), "adamw": ("nesterov",)}
        for option in unknown.get(self.name, ()):
            if getattr(self, option):
                raise ValueError(f"optim.{option} must be False with optim.name={self.name}, which has no such form")
        if not self.weight_decay >= 0:
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay}")
        if not self.warmup_epochs >= 0:
            raise ValueError(f"optim.warmup_epochs must be at least 0, got {self.warmup_epochs}")


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1).

    For each weight tensor w with gradient g, weight decay β, trust coefficient η, momentum m and rate γ::

        λ = η |w| / (|g| + β |w|)          (1 where |w| or the denominator is 0)
        v = m v + γ λ (g + β w)
        w = w - v

    The rate is inside of the momentum, as in the paper and in SimCLR, so that a falling rate damps old gradients no
    more than new ones; ``torch.optim.SGD`` has it outside. Groups with ``adapt=False`` have λ = 1 and β = 0: biases and
    normalisation layers, as in SimCLR. Every operation is one foreach call over a group and nothing is read from the
    device; ``lr`` may be a 0-d tensor, so that a captured CUDA graph takes up its changes.

    Args:
        groups: parameter groups with ``params`` and ``adapt``.
        lr: γ.
        momentum: m.
        weight_decay: β of the groups with ``adapt``.
        trust_coefficient: η.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(groups, defaults)
        start_momentum(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient stay as they are. ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("LARS.step takes no closure; compute the gradients before it")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            if group["adapt"]:
                moves = self._adapted(parameters, gradients, group)
            else:
                moves = list(torch._foreach_mul(gradients, group["lr"]))
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, moves)
            torch._foreach_sub_(parameters, momenta)

    @staticmethod
    def _adapted(parameters: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        """γ λ (g + β w)."""
        decay = group["weight_decay"]
        sizes = torch.stack(torch._foreach_norm(parameters))
        denominators = torch.stack(torch._foreach_norm(gradients)) + decay * sizes
        usable = (sizes > 0) & (denominators > 0)
        trust = torch.where(usable, group["trust_coefficient"] * sizes / denominators, torch.ones_like(sizes))
        moves = list(torch._foreach_add(gradients, parameters, alpha=decay))
        torch._foreach_mul_(moves, (group["lr"] * trust).unbind())
        return moves


def build_optimizer(module: nn.Module, config: OptimConfig, *, batch_size: int) -> torch.optim.Optimizer:
    """``torch.optim.SGD``, ``torch.optim.AdamW`` or :class:`LARS` over :func:`parameter_groups`.

    Torch's are fused on CUDA (one kernel over all parameters) and foreach elsewhere, with the same state. The state
    exists, zero, from the start: a step that is undone and a captured graph find it where it stays.
    """
    groups = parameter_groups(module, config)
    lr = config.lr_per_256_images * batch_size / 256
    if config.name == "lars":
        adapted, others = groups
        return LARS(
            [{**adapted, "adapt": True}, {**others, "adapt": False}],
            lr=lr,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
        )
    on_cuda = all(p.is_cuda for group in groups for p in group["params"])
    kernel = {"fused": True} if on_cuda else {"foreach": True}
    if config.name == "adamw":
        adam = torch.optim.AdamW(groups, lr=lr, betas=config.betas, **kernel)
        start_moments(adam)
        return adam
    sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, **kernel)
    if config.momentum > 0:
        start_momentum(sgd)
    return sgd


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a momentum of zeros, from which SGD's first step is what it is without one."""
    for parameter in _parameters(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = _zeros_like(parameter)


def start_moments(optimizer: torch.optim.AdamW) -> None:
    """Give every parameter the averages of zeros and the count that AdamW's first step begins with.

    Fused kernels have the count on the device, others on the host.
    """
    fused = optimizer.defaults["fused"]
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": _zeros_like(parameter),
            "exp_avg_sq": _zeros_like(parameter),
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` that keeps this device's kernels: fused on CUDA, foreach elsewhere."""
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Written under another memory format; the fused kernel refuses a momentum laid out unlike its parameter.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
