"""LAMB: layer-wise adaptive moments for large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sslfast.optim.state import parameters_of, zeros_like


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al. 2020, "Large batch optimization for deep learning", algorithm 2).

    For each weight tensor w with gradient g, weight decay λ, rate γ, and step t::

        m = β₁ m + (1 - β₁) g,  v = β₂ v + (1 - β₂) g²
        u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε) + λ w
        w = w - γ φ u,  φ = |w| / |u|          (1 where |w| or |u| is 0)

    Groups with ``adapt=False`` have φ = 1: biases and normalisation layers, which have no decay. Moments are those of
    the paper with its bias correction and without a bound on |w|. Nothing is read from the device; ``lr`` may be a 0-d
    tensor, so that a captured CUDA graph sees its changes.

    Args:
        groups: parameter groups with ``params``, ``weight_decay`` and ``adapt``.
        lr: γ.
        betas: β₁ and β₂.
        eps: ε.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapt": True})
        for parameter in parameters_of(self):
            self.state[parameter] = {
                "exp_avg": zeros_like(parameter),
                "exp_avg_sq": zeros_like(parameter),
                # Not named "step": torch leaves a state of that name on the host when it loads one.
                "count": parameter.new_zeros(()),
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient stay as they are. ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("LAMB.step takes no closure; compute the gradients before it")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = self._updates(parameters, group)
            torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
            if group["adapt"]:
                sizes = torch.stack(torch._foreach_norm(parameters))
                moves = torch.stack(torch._foreach_norm(updates))
                usable = (sizes > 0) & (moves > 0)
                trust = torch.where(usable, sizes / moves, torch.ones_like(sizes))
                torch._foreach_mul_(updates, (group["lr"] * trust).unbind())
            else:
                torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(parameters, updates)

    def _updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Adam's update with bias correction, without rate and decay."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        counts, means, squares = (
            [self.state[p][name] for p in parameters] for name in ("count", "exp_avg", "exp_avg_sq")
        )
        first, second = group["betas"]
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        count = torch.stack(counts).to(torch.float64)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, self._scales((1 - second**count).sqrt(), parameters))
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_div_(updates, self._scales(1 - first**count, parameters))
        return list(updates)

    @staticmethod
    def _scales(values: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return [value.to(p.dtype) for value, p in zip(values.unbind(), parameters, strict=True)]
