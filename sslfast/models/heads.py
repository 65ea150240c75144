"""Heads on trunk features: projections to embeddings, and classifiers of patches."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


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


class JigsawHead(nn.Module):
    """Scores of permutations: every patch through linear, BatchNorm and ReLU, concatenated, then linear (VISSL).

    ``[B, P, C]`` in the order shown -> ``[B, P * D]`` -> ``[B, K]``.
    """

    def __init__(self, in_features: int, patch_features: int, num_patches: int, num_classes: int) -> None:
        super().__init__()
        self.patch = nn.Linear(in_features, patch_features)
        self.norm = nn.BatchNorm1d(patch_features)
        self.classes = nn.Linear(num_patches * patch_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        batch, patches = features.shape[:2]
        hidden = relu(self.norm(self.patch(features.flatten(0, 1))))
        return cast(Tensor, self.classes(hidden.view(batch, patches * hidden.shape[1])))


class PairHead(nn.Module):
    """Scores of a pair: both features concatenated, then linear, BatchNorm, ReLU and linear.

    Two of ``[B, C]``, in order -> ``[B, 2 * C]`` -> ``[B, H]`` -> ``[B, K]`` (Doersch et al. 2015, figure 3).
    """

    def __init__(self, in_features: int, hidden_features: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * in_features, hidden_features)
        self.norm = nn.BatchNorm1d(hidden_features)
        self.classes = nn.Linear(hidden_features, num_classes)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        hidden = relu(self.norm(self.hidden(torch.cat((first, second), dim=1))))
        return cast(Tensor, self.classes(hidden))


class MLPHead(nn.Sequential):
    """``[..., C]`` -> linear -> ReLU -> linear -> ``[..., D]`` (SimCLR section 2.1, MoCo v2 section 3)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, hidden_features), nn.ReLU(), nn.Linear(hidden_features, out_features))
