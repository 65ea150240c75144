"""Heads on trunk features: projections to embeddings, and classifiers of patches."""

from typing import Literal, TypeAlias, cast

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


OutputNorm: TypeAlias = Literal["none", "affine", "scale", "plain"]
"""BatchNorm behind the last layer of :class:`MLPHead`. affine: with scale and shift; scale: with a scale alone, the
shift stays 0; plain: with neither."""


class MLPHead(nn.Sequential):
    """``[..., C]`` -> linear -> ReLU -> ... -> linear -> ``[..., D]``, with BatchNorm where asked; then ``[B, C]``.

    Of two layers without BatchNorm: SimCLR section 2.1, MoCo v2 section 3. With BatchNorm: BYOL section 3.3, SimSiam
    section 3, Barlow Twins section 2.2, VICReg section 4.2, SwAV section 3.2.

    Args:
        in_features: C.
        hidden_features: of every layer but the last.
        out_features: D.
        layers: linear layers, at least 1.
        hidden_norm: BatchNorm behind every layer but the last, before its activation.
        hidden_bias: bias in every layer but the last; BatchNorm takes it away again.
        output_bias: bias in the last layer.
        output_norm: BatchNorm behind the last layer.
        activation: class of the module behind every layer but the last.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        layers: int = 2,
        hidden_norm: bool = False,
        hidden_bias: bool = True,
        output_bias: bool = True,
        output_norm: OutputNorm = "none",
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        if layers < 1:
            raise ValueError(f"MLPHead needs at least 1 layer, got {layers=}")
        modules: list[nn.Module] = []
        for _ in range(layers - 1):
            modules.append(nn.Linear(in_features, hidden_features, bias=hidden_bias))
            modules += [nn.BatchNorm1d(hidden_features)] if hidden_norm else []
            modules.append(activation())
            in_features = hidden_features
        modules.append(nn.Linear(in_features, out_features, bias=output_bias))
        if output_norm != "none":
            norm = nn.BatchNorm1d(out_features, affine=output_norm != "plain")
            if output_norm == "scale":
                norm.bias.requires_grad_(False)
            modules.append(norm)
        super().__init__(*modules)
