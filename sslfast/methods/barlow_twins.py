"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar, Jing, Misra, LeCun & Deny, ICML 2021).

Objective (eq. 1 and 2): ``loss = sum_i (1 - c_ii)² + λ sum_(i != j) c_ij²``, where c is the D x D matrix of
correlations between the dimensions of the two views' embeddings, each normalised over the batch to mean 0 and variance
1.

Under several processes c is summed over all ranks, as in the authors' code, and BatchNorm should be synchronised
(``sync_batchnorm``, which the recipe sets): else each rank normalises its own part. The gradient is that of the loss of
the whole batch; the authors' code has it divided by the number of processes, since each rank differentiates its part of
c alone. The matrix is never stored whole: see ``methods/shared/correlation.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sslfast.distributed import world_size
from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.correlation import correlation_penalty
from sslfast.methods.shared.views import FIRST, SECOND, TwoViewConfig, upcast
from sslfast.models import MLPHead, build_trunk, seeded
from sslfast.views import View


@register_method
class BarlowTwins(Method):
    """The method as a module: trunk and projection. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(TwoViewConfig):
        """Barlow Twins."""

        name: ClassVar[str] = "barlow-twins"

        hidden_features: int = 8192
        """Width of the hidden layers of the projection."""
        dimensions: int = 8192
        """D, dimensions of an embedding; more are better up to 16,384 (figure 4)."""
        layers: int = 3
        """Layers of the projection."""
        off_diagonal_weight: float = 0.0051
        """λ, weight of the squared correlations off the diagonal."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features", "layers")
            self.check_at_least(2, "dimensions")
            self.check_positive("off_diagonal_weight")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where BatchNorm of the embeddings has too few samples of a view."""
            split.check_normalised("barlow-twins' projection")

        def build(self, context: MethodContext) -> "BarlowTwins":
            """The module for a run."""
            return BarlowTwins(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.projection = MLPHead(
                self.trunk.out_features,
                config.hidden_features,
                config.dimensions,
                layers=config.layers,
                hidden_norm=True,
                hidden_bias=False,
                output_bias=False,
                output_norm="plain",
            )

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch, the same on all ranks.

        Args:
            views: "first" and "second".
            sample_ids: ``[B]`` int64; not used.
            step: not used.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``invariance``, the first sum of the loss: D at the
            beginning, 0 where the views of an image have equal embeddings.
        """
        first, second = (upcast(self.projection(self.trunk(views[name].pixels))) for name in (FIRST, SECOND))
        loss, invariance = correlation_penalty(
            first,
            second,
            count=len(first) * world_size(),
            off_diagonal=self.config.off_diagonal_weight,
            diagonal=1.0,
        )
        return {"loss": loss, "invariance": invariance}
