"""render_views: the whole view stage, uint8 crops to network input, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslfast.ops import _library, pixels
from sslfast.ops.jigsaw_patches import jigsaw_patches_reference
from sslfast.ops.rotate90 import rotate90_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def render_views(
    crops: Tensor,
    parameters: Tensor,
    *,
    quarter_turns: Tensor | None = None,
    permutation: Tensor | None = None,
    offsets: Tensor | None = None,
    grid: int = 3,
    patch_size: int = 64,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    photometric: bool = True,
    blur: bool = True,
) -> Tensor:
    """Rotate every crop, cut it into jigsaw patches, augment each patch (or the whole crop), normalise.

    A picture is one patch, or the whole crop where ``permutation`` is None: then M = 1 and p = S, else M = grid**2.
    Order: ``rotate90`` of the crop, the patch of ``jigsaw_patches``, then per picture the operations of
    :func:`sslfast.ops.pixels.augment`, last ``(x / 255 - mean) / std``. The arithmetic is float32. Contrast takes the
    mean luminance, autocontrast the extremes and blur the borders of the picture, not of the crop. Each operation is
    that of torchvision.transforms.v2.functional and PIL, with the tolerances that ``sslfast/ops/pixels.py`` states.
    Source: PIRL section 3.1 (jigsaw patches, colour), SimCLR appendix A (blur).

    Args:
        crops: ``[B, 3, S, S]`` uint8. Non-contiguous memory is copied first.
        parameters: ``[B, M, len(ViewParameter)]`` fp32, for each picture by slot the numbers that
            :class:`~sslfast.ops.view_parameters.ViewParameter` declares, with their ranges.
        quarter_turns: ``[B]`` int64, counter-clockwise, modulo 4; None: not rotated.
        permutation: ``[B, grid**2]`` int64, cell that each slot shows; None: no jigsaw.
        offsets: ``[B, grid**2, 2]`` int64 (y, x) by cell; needed with ``permutation``.
        grid: cells per side; ignored without ``permutation``, like ``patch_size``.
        patch_size: p, side of a patch in pixels.
        mean, std: of the normalisation, per channel, on the 0..1 scale.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        channels_last: memory format of the pictures.
        photometric: False asserts that no picture has the photometric gate open, which saves shared memory on a GPU.
        blur: False asserts that every sigma is 0, which saves ``[B * M, 3, p, p]`` float32 on a GPU.

    Returns:
        ``[B * M, 3, p, p]``; picture ``b * M + j`` is slot ``j`` of sample ``b``.

    Raises:
        ValueError: an option out of range, tensors on different devices.
        RuntimeError: wrong dtype or shape; on CPU also a parameter, permutation or offset out of range (CUDA: a device
            trap).
    """
    options = {"quarter_turns": quarter_turns, "permutation": permutation, "offsets": offsets}
    given = {name: tensor for name, tensor in options.items() if tensor is not None}
    _library.check_arguments("render_views", {"crops": crops, "parameters": parameters, **given})
    _library.check_integers("render_views", patch_size=patch_size)
    _check(permutation, offsets, grid, mean, std, dtype)
    out: Tensor = torch.ops.sslfast.render_views(
        crops,
        parameters,
        quarter_turns,
        permutation,
        offsets,
        grid if permutation is not None else 0,
        patch_size,
        *(float(x) for x in mean),
        *(float(x) for x in std),
        dtype,
        channels_last,
        photometric,
        blur,
    )
    return out.permute(0, 3, 1, 2) if channels_last else out


def render_views_reference(
    crops: Tensor,
    parameters: Tensor,
    *,
    quarter_turns: Tensor | None = None,
    permutation: Tensor | None = None,
    offsets: Tensor | None = None,
    grid: int = 3,
    patch_size: int = 64,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    photometric: bool = True,
    blur: bool = True,
) -> Tensor:
    """The same in torch, operation by operation: the specification.

    Levels of the photometric operations may differ by one where float32 sums in another order cross a whole number.
    """
    _check(permutation, offsets, grid, mean, std, dtype)
    pictures = crops if quarter_turns is None else rotate90_reference(crops, quarter_turns)
    if permutation is not None and offsets is not None:
        pictures = jigsaw_patches_reference(pictures, permutation, offsets, grid=grid, patch_size=patch_size)
        pictures = pictures.flatten(0, 1)
    result = pixels.augment(pictures, parameters.flatten(0, 1), mean=tuple(mean), std=tuple(std), blur=blur)
    return result.to(dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _check_devices(
    crops: Tensor,
    parameters: Tensor,
    quarter_turns: Tensor | None,
    permutation: Tensor | None,
    offsets: Tensor | None,
) -> None:
    options = {"quarter_turns": quarter_turns, "permutation": permutation, "offsets": offsets}
    given = {name: tensor for name, tensor in options.items() if tensor is not None}
    _library.check_same_device("render_views", crops=crops, parameters=parameters, **given)


_STD = (1e-6, 1e6)
"""Lowest and highest: beyond, pixels would be infinite, NaN or all 0 in fp32."""


def _check(
    permutation: Tensor | None,
    offsets: Tensor | None,
    grid: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    if (permutation is None) != (offsets is None):
        raise ValueError(
            "render_views: a jigsaw needs permutation and offsets, a whole crop neither; give both or none"
        )
    _library.check_integers("render_views", grid=grid)
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence | Tensor) or isinstance(values, str) or len(values) != 3:
            raise ValueError(f"render_views: {name} must have 3 values, got {values!r}")
        _library.check_numbers("render_views", **{f"{name}[{i}]": value for i, value in enumerate(values)})
    if permutation is not None and grid < 1:
        raise ValueError(f"render_views: grid must be at least 1, got {grid=}")
    if not all(_STD[0] <= x <= _STD[1] for x in std):
        raise ValueError(f"render_views: std must be above 0, in [{_STD[0]:g}, {_STD[1]:g}], got {std=}")
    if not all(abs(x) <= _STD[1] for x in mean):
        raise ValueError(f"render_views: mean must be in [-{_STD[1]:g}, {_STD[1]:g}], got {mean=}")
    if dtype not in DTYPES:
        raise ValueError(f"render_views: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


@torch.library.register_fake("sslfast::render_views")
def _(
    crops: Tensor,
    parameters: Tensor,
    quarter_turns: Tensor | None,
    permutation: Tensor | None,
    offsets: Tensor | None,
    grid: int,
    patch_size: int,
    mean_r: float,
    mean_g: float,
    mean_b: float,
    std_r: float,
    std_g: float,
    std_b: float,
    dtype: torch.dtype,
    channels_last: bool,
    photometric: bool,
    blur: bool,
) -> Tensor:
    _check_devices(crops, parameters, quarter_turns, permutation, offsets)
    torch._check(
        crops.dim() == 4 and crops.shape[1] == 3,
        lambda: f"render_views: crops must have shape [B, 3, S, S], got {list(crops.shape)}",
    )
    count, side = (crops.shape[0] * grid**2, patch_size) if grid > 0 else (crops.shape[0], crops.shape[2])
    shape = (count, side, side, 3) if channels_last else (count, 3, side, side)
    return crops.new_empty(shape, dtype=dtype)
