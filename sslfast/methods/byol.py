"""BYOL: bootstrap your own latent (Grill et al., NeurIPS 2020).

Objective (eq. 2), symmetric in the two views v and v': ``loss = |q̄_θ(z_θ(v)) - z̄_ξ(v')|² + |q̄_θ(z_θ(v')) - z̄_ξ(v)|²``,
each ``2 - 2 cos``, where z is trunk and projection, q the predictor, the bar L2 normalisation, θ the trained weights
and ξ their moving average: ``ξ = τ ξ + (1 - τ) θ`` after the step (eq. 1). No gradient reaches the target network.
τ rises from ``momentum`` to 1: ``τ = 1 - (1 - τ_base) (cos(π k / K) + 1) / 2`` at step k of K (section 3.3).

Every network sees each view as a batch of its own, so BatchNorm normalises the views apart, as in the paper's code.
Under several processes nothing is exchanged but BatchNorm statistics (``sync_batchnorm``, which the recipe sets).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.momentum import rising_momentum
from sslfast.methods.shared.views import FIRST, SECOND, TwoViewConfig, upcast
from sslfast.models import MLPHead, build_trunk, seeded
from sslfast.ops import ema_update_
from sslfast.views import View


@register_method
class BYOL(Method):
    """The method as a module. State: the online network (trunk, projection, predictor) and the target network."""

    @dataclass(kw_only=True)
    class Config(TwoViewConfig):
        """BYOL."""

        name: ClassVar[str] = "byol"

        hidden_features: int = 4096
        """Width of the hidden layer of projection and predictor."""
        dimensions: int = 256
        """Dimensions of projections and predictions."""
        output_bias: bool = True
        """Bias in the last layer of projection and predictor; the authors' code has none."""
        momentum: float = 0.996
        """τ_base, factor of the target's old weights at the first step; it rises to 1 by the last one."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features")
            self.check_directions("dimensions")
            if not 0 <= self.momentum <= 1:
                raise ValueError(f"method.momentum must be in [0, 1], got {self.momentum}")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where BatchNorm in projection and predictor has too few samples of a view."""
            split.check_normalised("byol's projection and predictor")

        def build(self, context: MethodContext) -> "BYOL":
            """The module for a run."""
            return BYOL(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config, self.total_steps = config, context.total_steps
        self.trunk = build_trunk(context.model, seed=context.seed)
        hidden, dimensions = config.hidden_features, config.dimensions
        options: Any = {"hidden_norm": True, "output_bias": config.output_bias}
        with seeded(context.seed + 1):
            self.projection = MLPHead(self.trunk.out_features, hidden, dimensions, **options)
            self.predictor = MLPHead(dimensions, hidden, dimensions, **options)
        self.target_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self._step: int | Tensor | None = None

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first" and "second".
            sample_ids: ``[B]`` int64; not used.
            step: of the run: the momentum of the update after it depends on it.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``similarity``, the mean cosine of prediction and target.
        """
        self._step = step
        pixels = [views[name].pixels for name in (FIRST, SECOND)]
        predictions = [self.predictor(self.projection(self.trunk(x))) for x in pixels]
        with torch.no_grad():
            targets = [self.target_projection(self.target_trunk(x)) for x in reversed(pixels)]
        similarity = torch.stack(
            [cosine_similarity(upcast(p), upcast(t)) for p, t in zip(predictions, targets, strict=True)]
        )
        return {"loss": (2 - 2 * similarity).sum(dim=0).mean(), "similarity": similarity.detach().mean()}

    def after_step(self) -> None:
        """Updates the target network with the weights of the step just taken."""
        if self._step is None:
            raise RuntimeError("BYOL.after_step was called before a forward pass")
        ema_update_(
            chain(self.target_trunk.parameters(), self.target_projection.parameters()),
            chain(self.trunk.parameters(), self.projection.parameters()),
            momentum=rising_momentum(
                self.config.momentum, self._step, self.total_steps, device=next(self.trunk.parameters()).device
            ),
        )
        self._step = None
