"""Views of methods that compare views of whole images: two of them, or two large and several small ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sslfast.methods.base import BaseConfig
from sslfast.views import MAX_VIEWS, ViewConfig

FIRST, SECOND = "first", "second"


@dataclass(kw_only=True)
class TwoViewConfig(BaseConfig):
    """The configuration of a method with two views of every image, each with augmentations of its own."""

    image_view: ViewConfig = field(default_factory=ViewConfig)
    """The first view."""
    second_view: ViewConfig = field(default_factory=ViewConfig)
    """The second view, of the same size."""

    def views(self) -> dict[str, ViewConfig]:
        """The views that a step needs, in the order that numbers their random streams."""
        return {FIRST: self.image_view, SECOND: self.second_view}

    def check_views_are_whole(self) -> None:
        """ValueError where a view is cut into patches."""
        for name in ("image_view", "second_view"):
            if getattr(self, name).jigsaw is not None:
                raise ValueError(f"method.{name}.jigsaw must not be set: {self.name} takes whole images")


@dataclass(kw_only=True)
class MultiCropConfig(TwoViewConfig):
    """Two large crops and several small ones of every image (SwAV section 3.3)."""

    local_view: ViewConfig = field(default_factory=ViewConfig)
    """The view that the small crops are draws of."""
    local_crops: int = 0
    """Number of small crops."""

    def views(self) -> dict[str, ViewConfig]:
        """The two large crops, then the small ones."""
        return {**super().views(), **{f"local{i}": self.local_view for i in range(self.local_crops)}}

    def check_views_are_whole(self) -> None:
        """ValueError where a view is cut into patches, or there are too many."""
        super().check_views_are_whole()
        if self.local_view.jigsaw is not None:
            raise ValueError(f"method.local_view.jigsaw must not be set: {self.name} takes whole images")
        if not 0 <= self.local_crops <= MAX_VIEWS - 2:
            raise ValueError(f"method.local_crops must be in [0, {MAX_VIEWS - 2}], got {self.local_crops}")


def upcast(x: Tensor) -> Tensor:
    """fp32 of a lower precision; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def encode_crops(trunk: nn.Module, crops: Sequence[Tensor]) -> Tensor:
    """``[V * B, C]`` features of V crops ``[B, 3, S_v, S_v]``, view by view.

    Neighbouring crops of one size are one batch, for BatchNorm too, as in the code of SwAV and DINO.
    """
    batches: list[list[Tensor]] = []
    for crop in crops:
        if batches and batches[-1][0].shape == crop.shape:
            batches[-1].append(crop)
        else:
            batches.append([crop])
    return torch.cat([trunk(torch.cat(batch)) for batch in batches])


def swapped_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``1 / (2 (V - 1)) sum_(i < 2) sum_(v != i) H(t_i, softmax(x_v))``: every view predicts the targets of the two
    large crops, but its own (SwAV eq. 2 and section 3.3, DINO eq. 3).

    ``H = logsumexp(x) - t·x`` for targets that sum to 1; no log-softmax is stored.

    Args:
        logits: ``[V, B, K]``, x: those of the two large crops first.
        targets: ``[2, B, K]``, t; take no gradient.

    Returns:
        ``[B]``.
    """
    terms = logits.logsumexp(dim=2)  # [V, B]
    large = terms[:2] - torch.einsum("vbk,vbk->vb", logits[:2], targets.flip(0))
    small = 2 * terms[2:] - torch.einsum("vbk,bk->vb", logits[2:], targets.sum(dim=0))
    return (large.sum(dim=0) + small.sum(dim=0)) / (2 * (len(logits) - 1))
