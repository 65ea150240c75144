"""SimCLR: a simple framework for contrastive learning (Chen, Kornblith, Norouzi & Hinton, ICML 2020).

Objective (eq. 1, NT-Xent), the mean over the 2B views of a batch of ``loss_i = -log( exp(z_i·z_p(i)/τ) /
sum_{j≠i} exp(z_i·z_j/τ) )``, where z are unit embeddings behind an MLP and p(i) is the other view of the same image.
Under several processes a view is contrasted with those of all ranks, and BatchNorm should be synchronised (section 2.2:
else the statistics of a rank give its positives away): ``sync_batchnorm``, which the recipe sets. The ``[2B, 2B]``
matrix is never stored: see ``models/contrast.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.distributed import gather_rows_with_gradient, rank
from sslfast.methods.base import BaseConfig, BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.views import FIRST, SECOND
from sslfast.models import MLPHead, build_trunk, info_nce, seeded
from sslfast.views import View, ViewConfig


@register_method
class SimCLR(Method):
    """The method as a module: trunk and head. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """SimCLR."""

        name: ClassVar[str] = "simclr"

        hidden_features: int = 2048
        """Width of the head's hidden layer."""
        dimensions: int = 128
        """Dimensions of an embedding."""
        head_norm: bool = False
        """BatchNorm behind both layers of the head, which then have no bias, the last one no shift either, as the
        authors' code (``model_util.py``, projection_head); VISSL has none."""
        temperature: float = 0.1
        """τ of the scores."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The view that both views are draws of."""

        def views(self) -> dict[str, ViewConfig]:
            """Two draws of the image view."""
            return {FIRST: self.image_view, SECOND: self.image_view}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features")
            self.check_directions("dimensions")
            self.check_positive("temperature")
            self.check_whole_image()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where an image has no other one to be contrasted with."""
            self.check_contrasted(split)

        def build(self, context: MethodContext) -> "SimCLR":
            """The module for a run."""
            return SimCLR(self, context)

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
                hidden_norm=config.head_norm,
                hidden_bias=not config.head_norm,
                output_bias=not config.head_norm,
                output_norm="scale" if config.head_norm else "none",
            )

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first" and "second".
            sample_ids: ``[B]`` int64; not used.
            step: not used.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``similarity``, the mean of z_i·z_p(i).
        """
        pixels = torch.cat((views[FIRST].pixels, views[SECOND].pixels))  # one batch of 2B for BatchNorm
        embeddings = normalize(self.projection(self.trunk(pixels)).float(), dim=1)
        first, second = embeddings.detach().chunk(2)
        return {
            "loss": nt_xent(embeddings, temperature=self.config.temperature).mean(),
            "similarity": (first * second).sum(dim=1).mean(),
        }


def nt_xent(embeddings: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of this rank's views against those of all ranks.

    Args:
        embeddings: ``[2B, D]`` unit vectors: B first views, then the B second views in the same order.
        temperature: τ > 0.

    Returns:
        ``[2B]`` losses. Once gradients are averaged over ranks, the gradient of their mean is that of the mean over all
        ranks.
    """
    count = len(embeddings)
    own = torch.arange(count, device=embeddings.device) + rank() * count
    keys = gather_rows_with_gradient(embeddings)
    return info_nce(embeddings, keys, own.roll(count // 2), temperature=temperature, excluded=own)
