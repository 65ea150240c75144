"""LARS: layer-wise adaptive rate scaling for large batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sslfast.optim.state import zero_momentum


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, algorithm 1).

    For each weight tensor w with gradient g, weight decay β, trust coefficient η, momentum m and rate γ::

        λ = η |w| / (|g| + β |w|)          (1 where |w| or the denominator is 0)
        v = m v + γ λ (g + β w)
        w = w - v

    The rate is inside of the momentum, as in the paper and in SimCLR, so that a falling rate damps old gradients no
    more than new ones; ``torch.optim.SGD`` has it outside. Groups with ``adapt=False`` have λ = 1: biases and
    normalisation layers, as in SimCLR, where they do not decay either. Every operation is one foreach call over a group
    and nothing is read from the device; ``lr`` may be a 0-d tensor, so that a captured CUDA graph sees its changes.

    Args:
        groups: parameter groups with ``params`` and ``adapt``.
        lr: γ.
        momentum: m.
        weight_decay: β of groups without one of their own.
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
        zero_momentum(self)

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
                decay = group["weight_decay"]
                penalised = torch._foreach_add(gradients, parameters, alpha=decay) if decay else gradients
                moves = list(torch._foreach_mul(penalised, group["lr"]))
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
