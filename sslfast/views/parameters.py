"""Draws of pixel augmentation: flip, colour jitter, photometric operations, grayscale, blur.

Drawing is strictly apart from application (``render_views``): :class:`PixelParameters` says everything about what
happens to the pixels.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sslfast.ops.philox import Stream, random_uint32, uint32_below
from sslfast.ops.pixels import ORDERS
from sslfast.views.types import AugmentConfig, JigsawConfig, ViewConfig

WORDS = 12
"""uint32 draws of one image but for its blur: three Philox blocks."""
BLUR_WORDS = 4
"""uint32 draws of its blur, one block; :func:`draw_pixel_parameters` takes them after the others."""

_POSTERIZE_BITS = (4, 8)
_SHARPNESS = (0.1, 1.9)
_SOLARIZE_LEVELS = 257


@dataclass(kw_only=True)
class PixelParameters:
    """What happens to the pixels of every image; all tensors share their leading dimensions ``[...]``."""

    flip: Tensor
    """``[...]`` bool: mirror left-right."""
    jitter: Tensor
    """``[...]`` bool: apply the four jitters."""
    jitter_order: Tensor
    """``[..., 4]`` int64: the jitter applied at each step: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    factors: Tensor
    """``[..., 3]`` float32: brightness, contrast and saturation factor, 1 = unchanged."""
    hue: Tensor
    """``[...]`` float32: hue shift in turns."""
    photometric: Tensor
    """``[...]`` bool: apply posterize, sharpness, solarize and autocontrast."""
    posterize_bits: Tensor
    """``[...]`` int64: bits kept, 4 to 8."""
    sharpness: Tensor
    """``[...]`` float32: 0 = smoothed, 1 = unchanged, 2 = sharpened."""
    solarize_threshold: Tensor
    """``[...]`` int64: levels at or above it are inverted; 256 inverts none."""
    grayscale: Tensor
    """``[...]`` bool: replace the three channels by their luminance."""
    blur_sigma: Tensor
    """``[...]`` float32: sigma of the Gaussian blur in pixels; 0 = none."""

    def __getitem__(self, index: Tensor | slice) -> "PixelParameters":
        """The parameters of the images at ``index`` of the first dimension."""
        return PixelParameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def flatten(self) -> "PixelParameters":
        """``[B, M, ...]`` to ``[B * M, ...]``."""
        return PixelParameters(**{f.name: getattr(self, f.name).flatten(0, 1) for f in fields(self)})

    def permute(self, permutation: Tensor) -> "PixelParameters":
        """``[B, M, ...]`` with entry ``j`` of sample ``b`` taken from ``permutation[b, j]``."""

        def take(values: Tensor) -> Tensor:
            index = permutation.reshape(*permutation.shape, *(1,) * (values.dim() - 2))
            return values.gather(1, index.expand(*permutation.shape, *values.shape[2:]))

        return PixelParameters(**{f.name: take(getattr(self, f.name)) for f in fields(self)})

    def pack(self) -> Tensor:
        """``[..., 13]`` float32, ordered as :data:`sslfast.ops.pixels.PARAMETERS`: what ``render_views`` takes."""
        first, second, third, fourth = self.jitter_order.unbind(-1)
        # Rank of the order among the 24: places among what is left.
        code = 6 * first + 2 * (second - (second > first).long()) + (third > fourth).long()
        values = (
            self.flip, self.jitter, code, *self.factors.unbind(-1), self.hue, self.photometric, self.posterize_bits,
            self.sharpness, self.solarize_threshold, self.grayscale, self.blur_sigma,
        )  # fmt: skip
        return torch.stack([value.to(torch.float32) for value in values], dim=-1)


def _chance(words: Tensor, probability: float) -> Tensor:
    return words < round(probability * 2**32)


def _between(words: Tensor, low: float, high: float) -> Tensor:
    # float64 until the last step: the same float32 on every device, whether or not it fuses the multiply-add.
    return ((words >> 8).to(torch.float64) * ((high - low) * 2.0**-24) + low).to(torch.float32)


def _order_of(code: Tensor) -> Tensor:
    """``ORDERS[code]`` as ``[..., 4]``, by arithmetic: a table copied to a GPU at every step would be waited for."""
    first, rest = code // 6, code % 6
    second = rest // 2 + (rest // 2 >= first)
    lowest, highest = torch.minimum(first, second), torch.maximum(first, second)
    third = torch.where(lowest > 0, 0, torch.where(highest > 1, 1, 2))  # the smaller of the two that are left
    third = torch.where(rest % 2 == 1, 6 - first - second - third, third)
    return torch.stack((first, second, third, 6 - first - second - third), dim=-1)


def draw_pixel_parameters(words: Tensor, config: AugmentConfig) -> PixelParameters:
    """Turn uint32 draws into parameters.

    Word 0 flip, 1 jitter gate, 2 order, 3 brightness, 4 contrast, 5 saturation, 6 hue, 7 photometric gate,
    8 posterize, 9 sharpness, 10 solarize, 11 grayscale, 12 blur gate, 13 blur sigma (14 and 15 unused), whatever the
    config switches off: changing one strength leaves every other draw as it was.

    Args:
        words: ``[..., 16]`` int64 holding uint32 values.
        config: strengths and probabilities.
    """
    w = words.unbind(-1)
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = [_between(w[3 + i], max(0.0, 1.0 - s), 1.0 + s) for i, s in enumerate(strengths)]
    low_bits, high_bits = _POSTERIZE_BITS
    return PixelParameters(
        flip=_chance(w[0], config.flip_probability),
        jitter=_chance(w[1], config.jitter_probability),
        jitter_order=_order_of(uint32_below(w[2], len(ORDERS))),
        factors=torch.stack(factors, dim=-1),
        hue=_between(w[6], -config.hue, config.hue),
        photometric=_chance(w[7], config.photometric_probability),
        posterize_bits=uint32_below(w[8], high_bits - low_bits + 1) + low_bits,
        sharpness=_between(w[9], *_SHARPNESS),
        solarize_threshold=uint32_below(w[10], _SOLARIZE_LEVELS),
        grayscale=_chance(w[11], config.grayscale_probability),
        blur_sigma=_between(w[13], *config.blur_sigma) * _chance(w[12], config.blur_probability),
    )


_BLOCK = 4  # uint32 numbers in a Philox block


@dataclass(kw_only=True)
class ViewParameters:
    """Every random choice of one view of a batch: ``B`` samples, ``P`` jigsaw cells, ``M`` = ``P`` or 1 images."""

    quarter_turns: Tensor | None
    """``[B]`` int64 in 0..3, counter-clockwise; None: the view does not rotate."""
    permutation: Tensor | None
    """``[B, P]`` int64: the cell that each slot shows; None: the view has no jigsaw."""
    offsets: Tensor | None
    """``[B, P, 2]`` int64: y and x of the patch inside its cell, by cell (not by slot)."""
    pixel: PixelParameters
    """Leading dimensions ``[B, M]``, by cell, so that a cell's pixels do not depend on the permutation."""


def max_offset(config: ViewConfig, jigsaw: JigsawConfig) -> int:
    """Largest patch offset inside a cell, in pixels."""
    if jigsaw.max_offset is not None:
        return jigsaw.max_offset
    return config.crop.size // jigsaw.grid - jigsaw.patch_size


def draw_view(rows: Tensor, config: ViewConfig, *, seed: int, position: int, epoch: int | Tensor) -> ViewParameters:
    """Draw the parameters of one view: a function of ``(seed, position, epoch, row)``, the same on every device.

    Of a row's Philox blocks (four uint32 each), block 0 is the header (word 0: quarter turns), the next ``P`` belong
    to the jigsaw cells (word 0: sort key, 1 and 2: offset), the following three per image or patch to its pixels and
    the last one each to its blur (:func:`~sslfast.views.parameters.draw_pixel_parameters`). The permutation sorts the
    cells by their keys, ties by position, so all ``P!`` orders are equally likely.

    Args:
        rows: ``[B]`` int64 manifest rows.
        config: of the view.
        seed: ``0 <= seed < 2**63``.
        position: of the view in its recipe, 0..14.
        epoch: int or 0-d int64 tensor.
    """
    cells = config.jigsaw.grid**2 if config.jigsaw is not None else 0
    images = max(1, cells)
    counts = (_BLOCK * (1 + cells), WORDS * images, BLUR_WORDS * images)
    words = random_uint32(rows, sum(counts), seed=seed, stream=Stream.VIEW + position, step=epoch)
    words, *of_pixels = words.split(counts, dim=1)
    pixel_words = torch.cat([part.unflatten(1, (images, -1)) for part in of_pixels], dim=-1)
    permutation = offsets = None
    if config.jigsaw is not None:
        cell_words = words[:, _BLOCK:].unflatten(1, (cells, _BLOCK))
        permutation = cell_words[:, :, 0].argsort(dim=1, stable=True)
        offsets = uint32_below(cell_words[:, :, 1:3], max_offset(config, config.jigsaw) + 1)
    return ViewParameters(
        quarter_turns=uint32_below(words[:, 0], 4) if config.rotation else None,
        permutation=permutation,
        offsets=offsets,
        pixel=draw_pixel_parameters(pixel_words, config.augment),
    )
