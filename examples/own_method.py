"""A method of one's own: uniformity and alignment (Wang & Isola, ICML 2020, section 4.1) of two views.

    cd examples
    sslfast pretrain FOLDER --plugin own_method --recipe alignment-small --output RUN
    sslfast evaluate knn RUN LABELLED --plugin own_method

``loss = mean ||x - y||² + weight · mean over views of log mean_{i≠j} exp(-2 ||x_i - x_j||²)``, x and y unit embeddings
of two views of the same images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.methods import BaseConfig, Method, MethodContext, register_method
from sslfast.models import MLPHead, build_trunk, seeded
from sslfast.recipes import RECIPES
from sslfast.training import TrainConfig
from sslfast.views import View, ViewConfig


@register_method
class Alignment(Method):
    """Views of an image together, different images spread over the sphere."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """What the method adds to a configuration; every field is an option of the command line."""

        name: ClassVar[str] = "alignment"

        second_view: ViewConfig = field(default_factory=ViewConfig)
        """The other view; draws its own crop and colours."""
        dimensions: int = 128
        """Of the embeddings."""
        weight: float = 1.0
        """Of uniformity beside alignment."""

        def views(self) -> dict[str, ViewConfig]:
            return {"image": self.image_view, "second": self.second_view}

        def build(self, context: MethodContext) -> "Alignment":
            return Alignment(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        self.config = config
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = MLPHead(self.trunk.out_features, 512, config.dimensions, hidden_norm=True)

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        x, y = (normalize(self.head(self.trunk(views[name].pixels)).float(), dim=1) for name in ("image", "second"))
        alignment = (x - y).square().sum(1).mean()
        uniformity = sum(torch.pdist(z).square().mul(-2).exp().mean().log() for z in (x, y)) / 2
        loss = alignment + self.config.weight * uniformity
        return {"loss": loss, "alignment": alignment.detach(), "uniformity": uniformity.detach()}


def alignment_small() -> TrainConfig:
    """Alignment and uniformity for images up to 64 px: SimCLR's small recipe with the other loss."""
    base = RECIPES["simclr-small"]()
    view = base.method.image_view
    return replace(base, recipe="alignment-small", method=Alignment.Config(image_view=view, second_view=view))


RECIPES["alignment-small"] = alignment_small
