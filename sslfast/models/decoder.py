"""Decoder from res5 to pixels, for the methods that reconstruct images."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import interpolate

_LEAST_CHANNELS = 32


class Decoder(nn.Module):
    """Maps ``[B, in_features, h, w]`` to ``[B, out_channels, ceil(H / out_stride), ceil(W / out_stride)]``.

    A 1x1 convolution to ``width`` channels; then, for every halving of the stride, nearest-neighbour upsampling and a
    3x3 convolution to half the channels (32 at least), each with BatchNorm and ReLU; a 3x3 convolution to the output.
    Upsampling before the convolution avoids the checkerboard artefacts of transposed convolutions (Odena et al. 2016),
    and its gradient is deterministic, unlike that of bilinear upsampling on CUDA devices.

    Args:
        in_features: channels of the map.
        out_channels: of the output, which has no activation.
        in_stride: pixels of the image per pixel of the map along a side, a power of two.
        out_stride: the same for the output, a power of two, at most ``in_stride``.
        width: channels of the first map.

    Raises:
        ValueError: a stride that is no power of two or ``out_stride`` above ``in_stride``, or a width below 1.
    """

    def __init__(
        self, in_features: int, out_channels: int, *, in_stride: int, out_stride: int = 1, width: int = 512
    ) -> None:
        super().__init__()
        for name, stride in (("in_stride", in_stride), ("out_stride", out_stride)):
            if stride < 1 or stride & (stride - 1):
                raise ValueError(f"{name} must be a power of two, got {stride}")
        if out_stride > in_stride:
            raise ValueError(f"out_stride must be at most in_stride={in_stride}, got {out_stride}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        halvings = (in_stride // out_stride).bit_length() - 1
        widths = [max(width >> k, min(width, _LEAST_CHANNELS)) for k in range(halvings + 1)]
        self.strides = [in_stride >> (k + 1) for k in range(halvings)]
        self.enter = _block(in_features, widths[0], kernel_size=1)
        self.blocks = nn.ModuleList(_block(widths[k], widths[k + 1], kernel_size=3) for k in range(halvings))
        self.leave = nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """``maps`` of images of ``size`` (height, width)."""
        x = self.enter(maps)
        for stride, block in zip(self.strides, self.blocks, strict=True):
            x = block(interpolate(x, size=[-(-side // stride) for side in size], mode="nearest"))
        return cast(Tensor, self.leave(x))


def _block(in_channels: int, out_channels: int, *, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
