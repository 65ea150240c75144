"""Pixel augmentation of a view: flip, colour jitter, photometric operations, grayscale, normalisation.

Everything works on float32 ``[N, 3, H, W]`` RGB pixels on the 0..255 scale, with one parameter per image, and
without a Python loop over images. Names ending in ``_`` write into their first argument and return it.

Drawing (:func:`draw_pixel_parameters`) and application (:func:`augment`) are strictly apart: the tensors of
:class:`PixelParameters` say everything about what happens to the pixels.

Agreement with torchvision.transforms.v2.functional (float images) and with PIL, in levels of 255, is stated at each
function and held by ``tests/loaders/test_color.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sslfast.loaders.batch import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
WORDS = 12
"""uint32 draws that :func:`draw_pixel_parameters` takes for one image: three Philox blocks."""

_LUMINANCE = (0.2989, 0.587, 0.114)
_POSTERIZE_BITS = (4, 8)
_SHARPNESS = (0.1, 1.9)
_SOLARIZE_LEVELS = 257
# All 24 orders of the four jitters in lexicographic order; row = draw * 24 // 2**32.
_ORDERS = tuple((a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3)
# Pixels of one pass on the CPU: larger temporaries are returned to the system and page-faulted in again.
_CPU_PASS_PIXELS = 256 * 1024


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


def uint32_below(words: Tensor, bound: int) -> Tensor:
    """int64 uniform on ``0 .. bound-1`` from uint32 ``words`` (``bound < 2**31``; bias below ``bound / 2**32``)."""
    return (words * bound) >> 32


def _chance(words: Tensor, probability: float) -> Tensor:
    return words < round(probability * 2**32)


def _between(words: Tensor, low: float, high: float) -> Tensor:
    # float64 until the last step: the same float32 on every device, whether or not it fuses the multiply-add.
    return ((words >> 8).to(torch.float64) * ((high - low) * 2.0**-24) + low).to(torch.float32)


def draw_pixel_parameters(words: Tensor, config: AugmentConfig) -> PixelParameters:
    """Turn uint32 draws into parameters.

    Word 0 flip, 1 jitter gate, 2 order, 3 brightness, 4 contrast, 5 saturation, 6 hue, 7 photometric gate,
    8 posterize, 9 sharpness, 10 solarize, 11 grayscale, whatever the config switches off: changing one strength
    leaves every other draw as it was.

    Args:
        words: ``[..., 12]`` int64 holding uint32 values.
        config: strengths and probabilities.
    """
    w = words.unbind(-1)
    orders = torch.tensor(_ORDERS, device=words.device)
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = [_between(w[3 + i], max(0.0, 1.0 - s), 1.0 + s) for i, s in enumerate(strengths)]
    low_bits, high_bits = _POSTERIZE_BITS
    return PixelParameters(
        flip=_chance(w[0], config.flip_probability),
        jitter=_chance(w[1], config.jitter_probability),
        jitter_order=orders[uint32_below(w[2], len(_ORDERS))],
        factors=torch.stack(factors, dim=-1),
        hue=_between(w[6], -config.hue, config.hue),
        photometric=_chance(w[7], config.photometric_probability),
        posterize_bits=uint32_below(w[8], high_bits - low_bits + 1) + low_bits,
        sharpness=_between(w[9], *_SHARPNESS),
        solarize_threshold=uint32_below(w[10], _SOLARIZE_LEVELS),
        grayscale=_chance(w[11], config.grayscale_probability),
    )


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def luminance(pixels: Tensor) -> Tensor:
    """``0.2989 R + 0.587 G + 0.114 B`` as ``[N, 1, H, W]``; torchvision's ``rgb_to_grayscale``."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def blend_(pixels: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation, each image its own: ``clamp(f * x + (1 - f) * target, 0, 255)``.

    The target is black (``kind`` 0), the image's mean luminance (1) or each pixel's luminance (2). torchvision's
    ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` on float images, to 1e-3 levels; PIL's
    ImageEnhance, which rounds the target and truncates the result, to 1.25 levels for factors up to 2.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        kind: ``[N]`` int64.
        factor: ``[N]`` float.
    """
    gray = luminance(pixels)
    rest = 1.0 - factor
    # Row by row: the sum of an image does not depend on how many images or threads there are.
    level = gray.mean(dim=3).mean(dim=(1, 2)) * rest * (kind == CONTRAST)
    target = gray.mul_(_per_image(rest * (kind == SATURATION))).add_(_per_image(level))
    return torch.addcmul(target, pixels, _per_image(factor), out=pixels).clamp_(0.0, 255.0)


def shift_hue_(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by ``turns`` (1 = all the way round) at fixed HSV saturation and value.

    torchvision's ``adjust_hue`` on float images to 1e-2 levels. PIL's HSV keeps hue and saturation in 8 bits: its
    result differs by 0.7 levels on average, 11 at most on the test images.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        turns: ``[N]`` float in [-0.5, 0.5].
    """
    red, green, blue = pixels.unbind(dim=1)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - smallest
    # 0 where that channel is the largest, 1 elsewhere. torch.where is many times slower than arithmetic on the CPU.
    not_red, not_green = ((largest - channel).mul_(1e30).clamp_(max=1.0) for channel in (red, green))
    sextant = torch.lerp((blue - red).add_(chroma, alpha=2.0), (red - green).add_(chroma, alpha=4.0), not_green)
    sextant = torch.lerp(green - blue, sextant, not_red)
    # Grey pixels have no hue and no chroma: any finite sextant leaves them as they are.
    sextant = sextant.div_(chroma.clamp(min=1e-6)).add_((turns * 6.0)[:, None, None]).remainder_(6.0)
    # Trapezoids over the sextant 0..6: red is high around 0, green around 2, blue around 4.
    ramp = (sextant - 3.0).abs_().sub_(1.0).clamp_(0.0, 1.0)
    red.copy_(torch.addcmul(smallest, chroma, ramp))
    ramp = (sextant - 2.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    green.copy_(torch.addcmul(smallest, chroma, ramp))
    ramp = sextant.sub_(4.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    blue.copy_(torch.addcmul(smallest, chroma, ramp))
    return pixels


def posterize_(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` ``[N]`` of every integer level. PIL's ``ImageOps.posterize``, exactly."""
    step = _per_image(torch.exp2((8 - bits).to(pixels.dtype)))
    return pixels.div_(step).floor_().mul_(step)


def sharpen_(pixels: Tensor, factor: Tensor) -> Tensor:
    """``floor(s + f * (x - s))`` where ``s`` is the image smoothed by [[1,1,1],[1,5,1],[1,1,1]]/13, rounded.

    The outermost pixels stay, as do images with a side below 3. Integer levels in and out. PIL's
    ``ImageEnhance.Sharpness`` to 1 level (equal but for float32 rounding of whole numbers).

    Args:
        pixels: ``[N, 3, H, W]`` float, integer levels.
        factor: ``[N]`` float.
    """
    if min(pixels.shape[-2:]) < 3:
        return pixels
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :]
    rows += pixels[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth += rows[..., 2:]
    inside = pixels[..., 1:-1, 1:-1]
    smooth.add_(inside, alpha=4.0).div_(13.0).round_()
    inside.sub_(smooth).mul_(_per_image(factor)).add_(smooth).clamp_(0.0, 255.0).floor_()
    return pixels


def solarize_(pixels: Tensor, threshold: Tensor) -> Tensor:
    """``255 - x`` where ``x >= threshold`` ``[N]``. PIL's ``ImageOps.solarize``, exactly."""
    inverted = (pixels >= _per_image(threshold.to(pixels.dtype))).to(pixels.dtype)
    return pixels.sub_(inverted, alpha=255.0).abs_()


def autocontrast_(pixels: Tensor) -> Tensor:
    """Stretch every channel to 0..255: ``floor(255 * (x - low) / (high - low))``; a flat channel stays.

    Integer levels in and out. PIL's ``ImageOps.autocontrast`` to 1 level, below this one where PIL's float64
    look-up table falls just short of a whole number.
    """
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    low = torch.where(flat, 0.0, low)
    span = torch.where(flat, 255.0, high - low)
    return pixels.sub_(low).mul_(255.0).div_(span).floor_()


@dataclass(kw_only=True)
class _Jitter:
    """The jitters of every image, gate included, ready to apply. ``K`` is the number of blends in use."""

    kinds: Tensor  # [N, K] int64: which blend comes k-th
    factors: Tensor  # [N, K] float32: its factor
    blends_first: Tensor  # [N] int64: blends that come before the hue shift
    hue: Tensor  # [N] float32

    def __getitem__(self, index: Tensor) -> "_Jitter":
        return _Jitter(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def _plan_jitter(p: PixelParameters, config: AugmentConfig) -> _Jitter:
    strengths = (config.brightness, config.contrast, config.saturation)
    used = [kind for kind in (BRIGHTNESS, CONTRAST, SATURATION) if strengths[kind] > 0]
    step = p.jitter_order.argsort(dim=1)  # [N, 4]: the step at which each jitter comes
    kinds = torch.tensor(used, dtype=torch.int64, device=step.device)[step[:, used].argsort(dim=1)]
    return _Jitter(
        kinds=kinds,
        factors=torch.where(p.jitter[:, None], p.factors.gather(1, kinds), 1.0),
        blends_first=(step[:, used] < step[:, HUE:]).sum(dim=1),
        hue=torch.where(p.jitter, p.hue, 0.0),
    )


def _jitter_(pixels: Tensor, jitter: _Jitter, *, shift_hue: bool, blends_first: int | None) -> Tensor:
    """The jitters in each image's own order: the blends before the hue shift, the shift, the blends after it.

    ``blends_first``: how many blends come before the shift, where that is the same for every image; None: it is not,
    and every image takes the identity (factor 1) for the blends that are not its own on that side of the shift.
    """
    count = jitter.kinds.shape[1]
    mixed = blends_first is None and shift_hue
    first = count if blends_first is None or not shift_hue else blends_first
    for i in range(first):
        own = jitter.factors[:, i]
        blend_(pixels, jitter.kinds[:, i], torch.where(jitter.blends_first > i, own, 1.0) if mixed else own)
    if shift_hue:
        shift_hue_(pixels, jitter.hue)
    for i in range(0 if mixed else first, count):
        own = jitter.factors[:, i]
        blend_(pixels, jitter.kinds[:, i], torch.where(jitter.blends_first <= i, own, 1.0) if mixed else own)
    return pixels


def _photometric_(pixels: Tensor, p: PixelParameters) -> Tensor:
    """Round to levels, then posterize, sharpness, solarize, autocontrast, in VISSL's order."""
    pixels = posterize_(pixels.round_(), p.posterize_bits)
    pixels = sharpen_(pixels, p.sharpness)
    return autocontrast_(solarize_(pixels, p.solarize_threshold))


def _augment_all(
    crops: Tensor,
    p: PixelParameters,
    jitter: _Jitter,
    config: AugmentConfig,
    *,
    blends_first: int | None = None,
    jittered: bool = True,
    photometric: bool | None = None,
) -> Tensor:
    """``[N, 3, H, W]`` uint8, flipped where it should be, to normalised float32, of one set of images.

    ``blends_first``, ``jittered`` and ``photometric`` say what is true of all of them; None means mixed.
    """
    pixels = crops.to(torch.float32, memory_format=torch.contiguous_format)
    if jittered and config.jitter_probability > 0:
        _jitter_(pixels, jitter, shift_hue=config.hue > 0, blends_first=blends_first)
    if photometric is None and config.photometric_probability > 0:
        pixels = torch.where(_per_image(p.photometric), _photometric_(pixels.clone(), p), pixels)
    elif photometric:
        _photometric_(pixels, p)
    if config.grayscale_probability > 0:
        pixels.lerp_(luminance(pixels), _per_image(p.grayscale.to(pixels.dtype)))  # weights 0 and 1: exact
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (config.mean, config.std))
    return pixels.sub_(mean * 255.0).div_(std * 255.0)


def _augment_mixed(crops: Tensor, p: PixelParameters, jitter: _Jitter, config: AugmentConfig) -> Tensor:
    """All images at once, every operation under masks: no host sync."""
    if config.flip_probability > 0:
        crops = torch.where(_per_image(p.flip), crops.flip(-1), crops)
    return _augment_all(crops, p, jitter, config)


def _uniform_sets(
    p: PixelParameters, jitter: _Jitter, config: AugmentConfig
) -> Iterator[tuple[Tensor, int, bool, bool]]:
    """Split CPU images into sets that need the same operations: ``(indices, blends_first, jittered, photometric)``."""
    jittered = p.jitter if config.jitter_probability > 0 else torch.zeros_like(p.jitter)
    photometric = p.photometric if config.photometric_probability > 0 else torch.zeros_like(p.photometric)
    key = torch.where(jittered, 1 + (jitter.blends_first if config.hue > 0 else 0), 0) * 2 + photometric
    for value in key.unique().tolist():  # host sync: CPU only
        yield (key == value).nonzero()[:, 0], value // 2 - 1, value >= 2, value % 2 == 1


def augment(
    crops: Tensor,
    parameters: PixelParameters,
    config: AugmentConfig,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Apply flip, jitter, photometric operations, grayscale and normalisation, in this order.

    On the GPU every image passes through every operation that the config uses, under masks, without a host sync; on
    the CPU images are first sorted into sets that need the same operations. Both give the same pixels.

    Args:
        crops: ``[N, 3, H, W]`` uint8.
        parameters: tensors with leading dimension ``[N]`` on the same device.
        config: says which operations can occur at all, and the normalisation ``(x / 255 - mean) / std``.
        dtype: of the result; the arithmetic is float32.
        channels_last: memory format of the result.

    Returns:
        ``[N, 3, H, W]``.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    jitter = _plan_jitter(parameters, config)
    if crops.device.type != "cpu" or torch.compiler.is_compiling():
        return _augment_mixed(crops, parameters, jitter, config).to(dtype=dtype, memory_format=memory_format)
    count, channels, height, width = crops.shape
    # Filled image by image: writing whole rows of dimension 0 is many times faster than through permuted strides.
    shape = (count, height, width, channels) if channels_last else (count, channels, height, width)
    output = torch.empty(shape, dtype=dtype)
    images = max(1, _CPU_PASS_PIXELS // max(1, height * width))
    for indices, blends_first, jittered, photometric in _uniform_sets(parameters, jitter, config):
        for part in indices.split(images):
            pixels = _augment_all(
                _flip_selected(crops.index_select(0, part), parameters.flip[part]),
                parameters[part],
                jitter[part],
                config,
                blends_first=blends_first,
                jittered=jittered,
                photometric=photometric,
            ).to(dtype)
            output.index_copy_(0, part, pixels.permute(0, 2, 3, 1).contiguous() if channels_last else pixels)
    return output.permute(0, 3, 1, 2) if channels_last else output


def _flip_selected(crops: Tensor, flip: Tensor) -> Tensor:
    """Mirror, in place, the CPU images that ask for it."""
    selected = flip.nonzero()[:, 0]
    return crops.index_copy_(0, selected, crops.index_select(0, selected).flip(-1))
