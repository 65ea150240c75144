"""Projection heads from trunk features to the embedding that the memory bank holds."""

from typing import cast

from torch import Tensor, nn


class PatchHead(nn.Module):
    """PIRL's jigsaw g: every patch through one linear layer, concatenated in the order given, then a second one.

    ``[B, P, C]`` -> ``[B, P * D]`` -> ``[B, D]`` (PIRL section 3.3; no normalisation or ReLU between, as VISSL).
    """

    def __init__(self, in_features: int, out_features: int, num_patches: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.patch = nn.Linear(in_features, out_features)
        self.combine = nn.Linear(num_patches * out_features, out_features)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.combine(self.patch(features).flatten(1)))
