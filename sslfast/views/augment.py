"""Pixel augmentation of a view: its configuration, and how that turns random words into view parameters.

Drawing is separate from rendering: the drawn parameters (:class:`~sslfast.ops.view_parameters.ViewParameter`) say
everything that ``render_views`` does to the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sslfast.ops import ViewParameter
from sslfast.ops.philox import uint32_below
from sslfast.ops.pixels import MAX_BLUR_SIGMA, ORDERS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

WORD_GROUPS = (12, 4)
"""uint32 words that an image draws, in whole Philox blocks of four. A draw of 16 words of an image concatenates its
groups. Groups are only ever appended: a view draws the first group of all its images, then the second one of all, so
that a new group leaves every recorded draw as it was. Word 15 is unused."""


@dataclass(kw_only=True)
class AugmentConfig:
    """Pixel augmentation, applied to every image or to every patch independently, in this order:
    flip, jitter (brightness, contrast, saturation, hue in random order), photometric, grayscale, blur, solarize,
    normalise."""

    flip_probability: float = 0.5
    """Horizontal flip."""
    jitter_probability: float = 1.0
    """Probability of the four jitters together."""
    brightness: float = 0.4
    """Factor uniform in [1 - b, 1 + b], at least 0; 0 disables it; likewise contrast and saturation."""
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    """Hue shift uniform in [-hue, hue] turns."""
    photometric_probability: float = 0.0
    """Probability of posterize (4 to 8 bits), sharpness (0.1 to 1.9), solarize (threshold 0 to 256) and autocontrast
    together."""
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    """Probability of the Gaussian blur; 0.5 in MoCo v2 and SimCLR."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest sigma of the blur, drawn uniformly, in pixels of the picture; at most 5."""
    solarize_probability: float = 0.0
    """Probability of the solarize behind the blur, apart from that of the photometric operations; 0.2 in the second
    view of BYOL, Barlow Twins, VICReg and DINO."""
    solarize_threshold: float = 128.0
    """Levels at or above it are inverted, of 0 to 255."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def _chance(word: Tensor, probability: float) -> Tensor:
    return word < round(probability * 2**32)


def _between(word: Tensor, low: float, high: float) -> Tensor:
    # float64 until the last step: the same float32 on every device, whether or not it fuses the multiply-add.
    return ((word >> 8).to(torch.float64) * ((high - low) * 2.0**-24) + low).to(torch.float32)


def _factor(word: Tensor, strength: float) -> Tensor:
    return _between(word, max(0.0, 1.0 - strength), 1.0 + strength)


# (w, the words of an image, each ``[...]`` int64; c, the config) to the parameter ``[...]``. A rule reads its words
# whatever the config disables: changing one strength leaves every other draw as it was.
_RULES: dict[ViewParameter, Callable[[Sequence[Tensor], AugmentConfig], Tensor]] = {
    ViewParameter.FLIP: lambda w, c: _chance(w[0], c.flip_probability),
    ViewParameter.JITTER: lambda w, c: _chance(w[1], c.jitter_probability),
    ViewParameter.JITTER_ORDER: lambda w, _: uint32_below(w[2], len(ORDERS)),
    ViewParameter.BRIGHTNESS: lambda w, c: _factor(w[3], c.brightness),
    ViewParameter.CONTRAST: lambda w, c: _factor(w[4], c.contrast),
    ViewParameter.SATURATION: lambda w, c: _factor(w[5], c.saturation),
    ViewParameter.HUE: lambda w, c: _between(w[6], -c.hue, c.hue),
    ViewParameter.PHOTOMETRIC: lambda w, c: _chance(w[7], c.photometric_probability),
    ViewParameter.POSTERIZE_BITS: lambda w, _: uint32_below(w[8], 5) + 4,
    ViewParameter.SHARPNESS: lambda w, _: _between(w[9], 0.1, 1.9),
    ViewParameter.SOLARIZE_THRESHOLD: lambda w, _: uint32_below(w[10], 257),
    ViewParameter.GRAYSCALE: lambda w, c: _chance(w[11], c.grayscale_probability),
    ViewParameter.BLUR_SIGMA: lambda w, c: _between(w[13], *c.blur_sigma) * _chance(w[12], c.blur_probability),
    ViewParameter.LAST_SOLARIZE_THRESHOLD: lambda w, c: torch.where(
        _chance(w[14], c.solarize_probability), c.solarize_threshold, ViewParameter.LAST_SOLARIZE_THRESHOLD.neutral
    ),
}


def draw_pixel_parameters(words: Tensor, config: AugmentConfig) -> Tensor:
    """Turn random words into view parameters.

    Args:
        words: ``[..., sum(WORD_GROUPS)]`` int64 holding uint32 values.
        config: strengths and probabilities.

    Returns:
        ``[..., len(ViewParameter)]`` float32, what ``render_views`` takes.
    """
    w = words.unbind(-1)
    return torch.stack([_RULES[parameter](w, config).to(torch.float32) for parameter in ViewParameter], dim=-1)


def check_augment(name: str, augment: AugmentConfig) -> None:
    """Raise ValueError for a value out of range, naming the view ``name``, the value and the rule."""
    for field in (field.name for field in fields(augment) if field.name.endswith("_probability")):
        if not 0 <= getattr(augment, field) <= 1:
            raise ValueError(f"view {name!r}: {field} must be in [0, 1], got {getattr(augment, field)}")
    for field in ("brightness", "contrast", "saturation"):
        if not 0 <= getattr(augment, field) < float("inf"):
            raise ValueError(f"view {name!r}: {field} must be at least 0, got {getattr(augment, field)}")
    if not 0 <= augment.hue <= 0.5:
        raise ValueError(f"view {name!r}: hue must be in [0, 0.5] turns, got {augment.hue}")
    low, high = augment.blur_sigma
    if not 0 < low <= high <= MAX_BLUR_SIGMA:
        raise ValueError(
            f"view {name!r}: blur_sigma must hold two sigmas, 0 < low <= high <= {MAX_BLUR_SIGMA}, got {low} and {high}"
        )
    if not 0 <= augment.solarize_threshold <= 256:
        raise ValueError(f"view {name!r}: solarize_threshold must be in [0, 256], got {augment.solarize_threshold}")
    if len(augment.mean) != 3 or len(augment.std) != 3 or min(augment.std) <= 0:
        raise ValueError(
            f"view {name!r}: mean and std must have 3 values, std above 0, got {augment.mean} and {augment.std}"
        )
