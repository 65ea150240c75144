"""The pixel operations of the view stage in torch: the readable specification of ``render_views``.

Everything works on float32 ``[N, 3, H, W]`` RGB pixels on the 0..255 scale, with one parameter per image and no
Python loop over images. Names ending in ``_`` modify their first argument in place and return it.

Agreement with torchvision.transforms.v2.functional (float images) and with PIL, in levels of 255, is stated at each
function and held by ``tests/views/test_augment.py``.
"""

import math

import torch
from torch import Tensor

from sslfast.ops.view_parameters import ViewParameter, neutral_parameters

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple((a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3)
"""All 24 orders of the four jitters, lexicographic; ``ViewParameter.JITTER_ORDER`` is an index into them."""
MAX_BLUR_SIGMA = ViewParameter.BLUR_SIGMA.highest
"""Largest sigma of the Gaussian blur in pixels."""

_LUMINANCE = (0.2989, 0.587, 0.114)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def luminance(pixels: Tensor) -> Tensor:
    """``0.2989 R + 0.587 G + 0.114 B`` as ``[N, 1, H, W]``; torchvision's ``rgb_to_grayscale``."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def blend_(pixels: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation, chosen per image: ``clamp(f * x + (1 - f) * target, 0, 255)``.

    The target is black (``kind`` 0), the image's mean luminance (1) or each pixel's luminance (2). torchvision's
    ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation`` on float images, to 1e-3 levels (times a factor
    above 1); PIL's ImageEnhance, which rounds the target and truncates the result, to 1.25 levels for factors up to 2.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        kind: ``[N]`` int64.
        factor: ``[N]`` float.
    """
    gray = luminance(pixels)
    rest = 1.0 - factor
    # Row by row, so that the sum of an image does not depend on the number of images or threads.
    level = gray.mean(dim=3).mean(dim=(1, 2)) * rest * (kind == CONTRAST)
    target = gray.mul_(_per_image(rest * (kind == SATURATION))).add_(_per_image(level))
    return torch.addcmul(target, pixels, _per_image(factor), out=pixels).clamp_(0.0, 255.0)


def shift_hue_(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue by ``turns`` (1 = a full turn) at fixed HSV saturation and value.

    torchvision's ``adjust_hue`` on float images to 1e-2 levels. PIL's HSV keeps hue and saturation in 8 bits: its
    result differs by 0.7 levels on average, 11 at most on the test images.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        turns: ``[N]`` float in [-1, 1].
    """
    red, green, blue = pixels.unbind(dim=1)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    largest = torch.maximum(torch.maximum(red, green), blue)
    chroma = largest - smallest
    # 0 where that channel is the largest, 1 elsewhere. torch.where is many times slower than arithmetic on the CPU.
    not_red, not_green = ((largest - channel).mul_(1e30).clamp_(max=1.0) for channel in (red, green))
    sextant = torch.lerp((blue - red).add_(chroma, alpha=2.0), (red - green).add_(chroma, alpha=4.0), not_green)
    sextant = torch.lerp(green - blue, sextant, not_red)
    # Grey pixels have no hue and no chroma: any finite sextant leaves them unchanged.
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
    """Keep the upper ``bits`` ``[N]``, rounded down, of every integer level. PIL's ``ImageOps.posterize``, exactly."""
    step = _per_image(torch.exp2((8 - bits.floor()).to(pixels.dtype)))
    return pixels.div_(step).floor_().mul_(step)


def sharpen_(pixels: Tensor, factor: Tensor) -> Tensor:
    """``floor(s + f * (x - s))`` where ``s`` is the image smoothed by [[1,1,1],[1,5,1],[1,1,1]]/13, rounded.

    The outermost pixels are unchanged, as are images with a side below 3. Integer levels in and out. PIL's
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
    """Stretch every channel to 0..255: ``floor(255 * (x - low) / (high - low))``; a constant channel is unchanged.

    Integer levels in and out. PIL's ``ImageOps.autocontrast`` to 1 level, below this one where PIL's float64
    look-up table falls just short of a whole number.
    """
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    low = torch.where(flat, 0.0, low)
    span = torch.where(flat, 255.0, high - low)
    return pixels.sub_(low).mul_(255.0).div_(span).floor_()


def gaussian_blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Weighted mean of each pixel's neighbours, ``w(y, x) ~ exp(-(y**2 + x**2) / (2 sigma**2))``; sigma 0: unchanged.

    The kernel reaches ``r = ceil(3 sigma)`` pixels to each side (0.3 % of its mass lies beyond), at most the side minus
    one; the border is mirrored without repeating the outermost pixel. torchvision's ``gaussian_blur`` on float
    images with ``kernel_size=2 * r + 1``, to 1e-3 levels; with SimCLR's kernel of a tenth of the side (23 for 224
    pixels), to 0.5 levels up to sigma 2. PIL's GaussianBlur is three box blurs in 8 bits, which repeat the border: from
    sigma 1 on within 5 levels inside the test images, noise among them.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        sigma: ``[N]`` float in [0, 5], in pixels.
    """

    def mirrored(side: int) -> Tensor:  # [N, 1, side, side]: row y holds the weights of output pixel y
        reach = min(math.ceil(3 * MAX_BLUR_SIGMA), side - 1)
        taps = torch.arange(-reach, reach + 1, device=pixels.device)
        radius = (3.0 * sigma).ceil()[:, None]
        weights = (-0.5 * (taps / sigma.clamp(min=1e-30)[:, None]).square()).exp() * (taps.abs() <= radius)
        weights /= weights.sum(dim=1, keepdim=True)
        sources = (torch.arange(side, device=pixels.device)[:, None] + taps).abs()
        sources = torch.where(sources < side, sources, 2 * side - 2 - sources)  # [side, taps]
        shape = (len(sigma), side, len(taps))
        matrix = pixels.new_zeros(len(sigma), side, side)
        return matrix.scatter_add_(2, sources.expand(shape), weights[:, None].expand(shape))[:, None]

    height, width = pixels.shape[-2:]
    return mirrored(height) @ pixels @ mirrored(width).mT


def jitter_(pixels: Tensor, parameters: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, if its gate is open.

    Args:
        pixels: ``[N, 3, H, W]`` float.
        parameters: ``[N, len(ViewParameter)]`` float.
    """
    order = torch.tensor(ORDERS, device=pixels.device)[parameters[:, ViewParameter.JITTER_ORDER].long()]  # [N, 4]
    gate = parameters[:, ViewParameter.JITTER] != 0
    four = slice(ViewParameter.BRIGHTNESS, ViewParameter.HUE + 1)
    neutral = torch.tensor(neutral_parameters()[four], dtype=torch.float32, device=pixels.device)
    values = torch.where(gate[:, None], parameters[:, four], neutral)
    for step in range(4):
        kind = order[:, step]
        factor = values.gather(1, kind[:, None])[:, 0]
        is_hue = kind == HUE
        shifted = shift_hue_(pixels.clone(), torch.where(is_hue, factor, 0.0))
        blend_(pixels, kind, torch.where(is_hue, 1.0, factor))
        moves = is_hue & (factor != 0)
        pixels.copy_(torch.where(_per_image(moves), shifted, pixels))
    return pixels


def photometric_(pixels: Tensor, parameters: Tensor) -> Tensor:
    """Round to levels, then posterize, sharpness, solarize, autocontrast, in VISSL's order."""
    pixels = posterize_(pixels.round_(), parameters[:, ViewParameter.POSTERIZE_BITS])
    pixels = sharpen_(pixels, parameters[:, ViewParameter.SHARPNESS])
    return autocontrast_(solarize_(pixels, parameters[:, ViewParameter.SOLARIZE_THRESHOLD]))


def augment(
    pictures: Tensor, parameters: Tensor, *, mean: tuple[float, ...], std: tuple[float, ...], blur: bool = True
) -> Tensor:
    """Flip, jitter, photometric operations, grayscale, blur, solarize and ``(x / 255 - mean) / std``, in this order.

    Args:
        pictures: ``[N, 3, H, W]`` uint8.
        parameters: ``[N, len(ViewParameter)]`` float.
        blur: False: every sigma is 0.

    Returns:
        ``[N, 3, H, W]`` float32.
    """

    def gate(parameter: ViewParameter) -> Tensor:
        return _per_image(parameters[:, parameter] != 0)

    flipped = torch.where(gate(ViewParameter.FLIP), pictures.flip(-1), pictures)
    pixels = jitter_(flipped.to(torch.float32), parameters)
    pixels = torch.where(gate(ViewParameter.PHOTOMETRIC), photometric_(pixels.clone(), parameters), pixels)
    pixels = torch.where(gate(ViewParameter.GRAYSCALE), luminance(pixels), pixels)
    if blur:
        pixels = gaussian_blur(pixels, parameters[:, ViewParameter.BLUR_SIGMA])
    pixels = solarize_(pixels, parameters[:, ViewParameter.LAST_SOLARIZE_THRESHOLD])
    center, spread = (torch.tensor(v, dtype=torch.float32, device=pixels.device)[:, None, None] for v in (mean, std))
    return (pixels - center * 255.0) / (spread * 255.0)
