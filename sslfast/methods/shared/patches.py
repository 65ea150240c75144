"""Views of jigsaw patches, patches in other orders and changes of the whole crop, for the methods that use them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sslfast.methods.base import BaseConfig
from sslfast.methods.shared.grid import PatchGrid
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, View, ViewConfig

CROP_WORDS = 2
"""Words of ``Stream.CORRUPTION`` that :func:`augment_crop` draws of a sample; further draws come behind them."""


@dataclass(kw_only=True)
class PatchConfig(BaseConfig):
    """Options of every method that cuts crops into patches. A view's augmentation is of each patch by itself; these are
    of the whole crop, before it is cut."""

    crop_flip_probability: float = 0.0
    """Mirror the whole crop."""
    crop_grayscale_probability: float = 0.0
    """Convert the whole crop to grayscale."""

    @property
    def changes_crops(self) -> bool:
        """Whether crops are mirrored or turned gray before they are cut."""
        return self.crop_flip_probability > 0 or self.crop_grayscale_probability > 0


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


def adjacent_patches(view: ViewConfig, normalise: Callable[[Tensor], Tensor] | None) -> PatchGrid | None:
    """The grid of a jigsaw view without gaps: Kolesnikov et al. average the features of 3 x 3 patches of 64 pixels, the
    centre 192 of an image."""
    if view.jigsaw is None:
        return None
    return PatchGrid(
        patch_size=view.jigsaw.patch_size,
        cells=view.jigsaw.grid,
        size=view.jigsaw.grid * view.jigsaw.patch_size,
        normalise=normalise,
        source="Kolesnikov et al., CVPR 2019 (who crop 192 of 224 and standardise every patch)",
    )


def augment_crop(
    view: View, sample_ids: Tensor, config: PatchConfig, space: PixelSpace, *, seed: int, step: int | Tensor
) -> View:
    """A view of patches as if its crop had been mirrored and converted to grayscale before it was cut: all patches of a
    sample, or none. A function of (seed, step, sample id).

    Mirroring exchanges the cells of a row and mirrors the patches; an offset range that leaves columns of a cell unused
    leaves those of the other side. Gray is ``0.299 R + 0.587 G + 0.114 B``, as PIL has it before rounding.

    Args:
        view: pixels ``[B, P, 3, p, p]`` and permutation.
        sample_ids: ``[B]`` int64.
        config: the probabilities.
        space: of the pixels, on their device.
        seed, step: of the draws.
    """
    if not config.changes_crops:
        return view
    words = random_uint32(sample_ids, CROP_WORDS, seed=seed, stream=Stream.CORRUPTION, step=step)
    flipped = words[:, 0] < round(config.crop_flip_probability * 2**32)
    gray = words[:, 1] < round(config.crop_grayscale_probability * 2**32)
    pixels, permutation = view.pixels, view.permutation
    if config.crop_grayscale_probability > 0:
        weights = torch.tensor((0.299, 0.587, 0.114), device=pixels.device)[:, None, None]
        luminance = (space.to_rgb(pixels) * weights).sum(dim=-3, keepdim=True).expand(*pixels.shape)
        pixels = torch.where(_each(gray, pixels), space.from_rgb(luminance).to(pixels.dtype), pixels)
    if config.crop_flip_probability > 0:
        if permutation is None:
            raise ValueError("the view has no permutation; give it a jigsaw")
        grid = math.isqrt(permutation.shape[1])
        mirrored = permutation + grid - 1 - 2 * (permutation % grid)
        permutation = torch.where(flipped[:, None], mirrored, permutation)
        pixels = torch.where(_each(flipped, pixels), pixels.flip(-1), pixels)
    return replace(view, pixels=pixels, permutation=permutation)


def _each(chosen: Tensor, pixels: Tensor) -> Tensor:
    """``[B]`` so that it broadcasts over ``pixels`` ``[B, ...]``."""
    return chosen.view(-1, *([1] * (pixels.dim() - 1)))


def resampling_matrices(size: int) -> Tensor:
    """``[size + 1, size, size]``: by the n-th, ``A x Aᵀ`` is a ``size``-pixel patch made n pixels wide and back.

    Bilinear, without antialiasing, as Doersch's code does it. The 0-th is not used, the last one is the identity.
    """
    unit = torch.eye(size)[None]  # [1, one row per input pixel, its column]
    rows = [torch.zeros(size, size)]
    for n in range(1, size + 1):
        small = interpolate(unit, size=n, mode="linear", align_corners=False)
        rows.append(interpolate(small, size=size, mode="linear", align_corners=False)[0].T)
    return torch.stack(rows)


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
