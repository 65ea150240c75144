"""rgb_to_lab: sRGB pixels to CIE Lab, the colour space that colorization predicts in."""

import torch
from torch import Tensor

from sslfast.ops import _library

_XYZ_OVER_WHITE = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721749),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def rgb_to_lab(pixels: Tensor) -> Tensor:
    """CIE 1976 L*a*b* of sRGB pixels, white D65, observer 2 degrees.

    ``linear = x / 12.92`` up to 0.04045, else ``((x + 0.055) / 1.055)**2.4``; ``X, Y, Z`` over the white's by sRGB's
    matrix; ``f(t) = t**(1/3)`` above ``216/24389``, else ``(24389/27 t + 16) / 116``; ``L = 116 f(Y) - 16``,
    ``a = 500 (f(X) - f(Y))``, ``b = 200 (f(Y) - f(Z))``. Within 1e-3 of the same in float64, and within 0.02 of
    scikit-image's ``rgb2lab``, whose white point differs. One pass over the bytes. Not differentiable.
    Source: IEC 61966-2-1 (sRGB), CIE 15 (Lab); colorization: Zhang et al., ECCV 2016, section 2.

    Args:
        pixels: ``[N, 3, H, W]`` float32, float64, bfloat16 or float16 on the 0..1 scale, which is not enforced. Memory
            that is neither contiguous nor channels_last is copied first.

    Returns:
        ``[N, 3, H, W]`` float32 in the memory format of ``pixels``: L in 0..100, a in -86.2..98.2, b in -107.9..94.5.

    Raises:
        ValueError: ``pixels`` require a gradient, which the op does not provide.
        RuntimeError: wrong dtype or shape.
    """
    _library.check_arguments("rgb_to_lab", {"pixels": pixels})
    if pixels.dim() == 4 and not pixels.is_contiguous() and pixels.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.sslfast.rgb_to_lab(pixels.permute(0, 2, 3, 1), True).permute(0, 3, 1, 2)
    return torch.ops.sslfast.rgb_to_lab(pixels, False)


def rgb_to_lab_reference(pixels: Tensor) -> Tensor:
    """The same in torch, in float64 for float64 pixels: the specification of :func:`rgb_to_lab`."""
    x = pixels if pixels.dtype == torch.float64 else pixels.to(torch.float32)
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,njhw->nihw", torch.tensor(_XYZ_OVER_WHITE, dtype=x.dtype, device=x.device), linear)
    root = xyz.clamp(min=0) ** (1 / 3)
    fx, fy, fz = torch.where(xyz > 216 / 24389, root, (24389 / 27 * xyz + 16) / 116).unbind(1)
    return torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=1)


@torch.library.register_fake("sslfast::rgb_to_lab")
def _(pixels: Tensor, channels_last: bool) -> Tensor:
    torch._check(
        pixels.dim() == 4 and pixels.shape[3 if channels_last else 1] == 3,
        lambda: (
            f"rgb_to_lab: pixels must have shape {'[N, H, W, 3]' if channels_last else '[N, 3, H, W]'}, "
            f"got {list(pixels.shape)}"
        ),
    )
    return pixels.new_empty(pixels.shape, dtype=torch.float32)
