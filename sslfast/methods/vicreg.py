"""VICReg: variance-invariance-covariance regularisation (Bardes, Ponce & LeCun, ICLR 2022).

Objective (eq. 6), for embeddings z and z' ``[N, D]`` of the two views::

    loss = λ s(z, z') + µ (v(z) + v(z')) / 2 + ν (c(z) + c(z'))
    s(z, z') = mean of (z_nd - z'_nd)² over n and d           (eq. 5, divided by D as in the authors' code)
    v(z) = 1/D sum_d max(0, 1 - sqrt(Var(z_d) + 1e-4))        (eq. 1 and 2)
    c(z) = 1/D sum_(d != e) C(z)_de²                          (eq. 3 and 4), C the covariance matrix

with both divided by N - 1. The authors' code halves v, which the paper does not. The embeddings are not normalised.

Under several processes variance and covariance are those of all ranks' samples together: the authors' code gathers the
embeddings; here sums over ranks give the same numbers, so that each rank multiplies its own rows alone. The covariance
matrix is never stored whole: see ``methods/shared/correlation.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import mse_loss, relu

from sslfast.distributed import gather_rows_with_gradient, mean_over_ranks, world_size
from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.correlation import correlation_penalty
from sslfast.methods.shared.views import FIRST, SECOND, TwoViewConfig, upcast
from sslfast.models import MLPHead, build_trunk, seeded
from sslfast.views import View

EPSILON = 1e-4


@register_method
class VICReg(Method):
    """The method as a module: trunk and expander. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(TwoViewConfig):
        """VICReg."""

        name: ClassVar[str] = "vicreg"

        hidden_features: int = 8192
        """Width of the hidden layers of the expander."""
        dimensions: int = 8192
        """D, dimensions of an embedding."""
        layers: int = 3
        """Layers of the expander."""
        invariance_weight: float = 25.0
        """λ."""
        variance_weight: float = 25.0
        """µ."""
        covariance_weight: float = 1.0
        """ν."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features", "layers")
            self.check_at_least(2, "dimensions")
            self.check_positive("invariance_weight", "variance_weight")
            self.check_at_least(0, "covariance_weight")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where variances have too few samples, or BatchNorm in the expander."""
            self.check_contrasted(split)
            if self.layers > 1:
                split.check_normalised("vicreg's expander")

        def build(self, context: MethodContext) -> "VICReg":
            """The module for a run."""
            return VICReg(self, context)

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
                output_bias=False,
            )

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first" and "second".
            sample_ids: ``[B]`` int64; not used.
            step: not used.

        Returns:
            ``loss`` (0-d, differentiable) and its detached 0-d terms without their weights: ``invariance``,
            ``variance`` and ``covariance``.
        """
        config = self.config
        first, second = (upcast(self.projection(self.trunk(views[name].pixels))) for name in (FIRST, SECOND))
        invariance = mse_loss(first, second)
        variance, covariance = (a + b for a, b in zip(spread(first), spread(second), strict=True))
        loss = config.invariance_weight * invariance
        loss = loss + config.variance_weight * variance / 2 + config.covariance_weight * covariance
        return {
            "loss": loss,
            "invariance": invariance.detach(),
            "variance": variance.detach() / 2,
            "covariance": covariance.detach(),
        }


def spread(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """v and c of all ranks' embeddings, 0-d, the same on every rank.

    The mean is a constant here: the gradient of either term sums to 0 over samples, so that subtracting the mean does
    not change it.

    Args:
        embeddings: ``[B, D]`` of this rank, fp32 or fp64.
    """
    count, dimensions = len(embeddings) * world_size(), embeddings.shape[1]
    centred = embeddings - mean_over_ranks(embeddings.detach().mean(dim=0))
    squares = gather_rows_with_gradient(centred.square().sum(dim=0)[None]).sum(dim=0)  # [D]
    variance = relu(1 - (squares / (count - 1) + EPSILON).sqrt()).mean()
    covariance, _ = correlation_penalty(centred, count=count - 1, off_diagonal=1 / dimensions)
    return variance, covariance
