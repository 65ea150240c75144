"""Views of jigsaw patches, and patches in other orders, for the methods that use them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, View, ViewConfig


def jigsaw_view(
    size: int = 255,
    patch_size: int = 64,
    *,
    max_offset: int | None = None,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    augment: AugmentConfig | None = None,
) -> ViewConfig:
    """Crop of 60 to 100 % of the image, 3 x 3 cells, a patch at a random position of each (PIRL section 3.3).

    Args:
        size: side of the crop; that of a cell is a third of it.
        patch_size: side of a patch.
        max_offset: largest offset of a patch in its cell; None: as far as the cell allows.
        ratio: aspect ratios of the crop.
        augment: of each patch by itself; None: the default.
    """
    return ViewConfig(
        crop=CropConfig(size=size, scale=(0.6, 1.0), ratio=ratio),
        jigsaw=JigsawConfig(grid=3, patch_size=patch_size, max_offset=max_offset),
        augment=augment or AugmentConfig(),
    )


def slots_of_cells(view: View) -> Tensor:
    """``[B, P]`` int64: the slot that shows each cell, the inverse of the view's permutation."""
    if view.permutation is None:
        raise ValueError("the view has no permutation; give it a jigsaw")
    return view.permutation.argsort(dim=1)


def gather_patches(x: Tensor, slots: Tensor) -> Tensor:
    """``[B, P, ...]`` by slot and ``[B, Q]`` int64 slots -> ``[B, Q, ...]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], slots]


def normalise_patches(pixels: Tensor) -> Tensor:
    """Every channel of every patch to mean 0 and standard deviation 1; ``[..., 3, p, p]``.

    Against the shortcut that neighbouring patches are equally bright (Noroozi and Favaro 2016). Standard deviations
    below 0.02, about one grey level of normalised input, are divided by 0.02: flat patches stay flat.
    """
    deviation, mean = torch.std_mean(pixels.float(), dim=(-2, -1), correction=0, keepdim=True)
    return ((pixels.float() - mean) / deviation.clamp_min(0.02)).to(pixels.dtype)


def mosaic(patches: Tensor, columns: int, *, gap: int = 2) -> Tensor:
    """``[B, P, 3, p, p]`` -> one image per sample, the patches row by row on white: RGB in 0..1."""
    framed = pad(patches, (0, gap, 0, gap), value=1.0)  # [B, P, 3, q, q]
    rows = framed.unflatten(1, (-1, columns)).permute(0, 3, 1, 4, 2, 5)  # [B, 3, R, q, C, q]
    return rows.flatten(4, 5).flatten(2, 3)[:, :, :-gap, :-gap]
