"""SimSiam: simple siamese representation learning (Chen & He, CVPR 2021).

Objective (eq. 1 and 2), symmetric in the two views: ``loss = (D(p_1, stopgrad(z_2)) + D(p_2, stopgrad(z_1))) / 2`` with
``D(p, z) = -cos(p, z)``, where z is trunk and projection, p the predictor of z. No negatives, no moving average: the
stopped gradient alone keeps the embeddings from collapsing (section 4.1). The rate of the predictor stays at its peak
(``constant_predictor_lr``; table 1, last row).

Heads (section 3): a projection of three layers with BatchNorm behind each, the last one without scale and shift; a
predictor of two layers with BatchNorm in the first. Each view is a batch of its own for BatchNorm. Under several
processes nothing is exchanged but BatchNorm statistics (``sync_batchnorm``, which the recipe sets).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.views import FIRST, SECOND, TwoViewConfig, upcast
from sslfast.models import MLPHead, build_trunk, seeded
from sslfast.optim import ParameterOptions
from sslfast.views import View


@register_method
class SimSiam(Method):
    """The method as a module: trunk, projection and predictor. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(TwoViewConfig):
        """SimSiam."""

        name: ClassVar[str] = "simsiam"

        hidden_features: int = 2048
        """Width of the hidden layers of the projection."""
        dimensions: int = 2048
        """Dimensions of projections and predictions."""
        predictor_features: int = 512
        """Width of the predictor's hidden layer, a quarter of the dimensions in the paper."""
        constant_predictor_lr: bool = True
        """Keep the predictor's learning rate at the peak of the run's, without warm-up and schedule."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features", "predictor_features")
            self.check_directions("dimensions")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where BatchNorm in projection and predictor has too few samples of a view."""
            split.check_normalised("simsiam's projection and predictor")

        def build(self, context: MethodContext) -> "SimSiam":
            """The module for a run."""
            return SimSiam(self, context)

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
                layers=3,
                hidden_norm=True,
                hidden_bias=False,
                output_bias=False,
                output_norm="plain",
            )
            self.predictor = MLPHead(
                config.dimensions, config.predictor_features, config.dimensions, hidden_norm=True, hidden_bias=False
            )

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first" and "second".
            sample_ids: ``[B]`` int64; not used.
            step: not used.

        Returns:
            ``loss`` (0-d, differentiable, -1 to 1) and detached 0-d ``output_std``: the standard deviation of the
            dimensions of z / |z| over the batch, mean over dimensions and views; 1 / √D where embeddings spread over
            the sphere, 0 where they have collapsed (section 4.1).
        """
        first, second = (self.projection(self.trunk(views[name].pixels)) for name in (FIRST, SECOND))
        similarity = torch.stack(
            [
                cosine_similarity(upcast(self.predictor(own)), upcast(other.detach()))
                for own, other in ((first, second), (second, first))
            ]
        )
        directions = normalize(upcast(torch.stack((first.detach(), second.detach()))), dim=2)
        return {"loss": -similarity.mean(), "output_std": directions.std(dim=1, correction=0).mean()}

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The predictor's rate is constant."""
        return {"predictor": ParameterOptions(constant_lr=True)} if self.config.constant_predictor_lr else {}
