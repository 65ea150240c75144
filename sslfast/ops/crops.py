"""Square crops of images, resized in 8 bits by the compiled core: from pixels, or straight from a JPEG.

The filter is that of ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)`` for uint8, to the last bit,
computed while the rows of the image arrive, so that nothing larger than a few rows is kept. JPEGs are decoded by the
libjpeg-turbo that another library of this process is linked with (:func:`bind_libjpeg`): the core has no decoder.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sslfast.ops import _core

FUNCTIONS = (
    "jpeg_std_error",
    "jpeg_CreateDecompress",
    "jpeg_mem_src",
    "jpeg_read_header",
    "jpeg_start_decompress",
    "jpeg_crop_scanline",
    "jpeg_skip_scanlines",
    "jpeg_read_scanlines",
    "jpeg_destroy_decompress",
)
"""Of libjpeg-turbo, in the order of ``csrc/libjpeg.h``; the two that leave out pixels are its own."""

_OK, _MEMORY = 0, 2

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels as decoded."""


def bind_libjpeg(path: str) -> str:
    """Let :func:`crop_jpeg` use the libjpeg-turbo that a shared library is linked with.

    Args:
        path: of the shared library, which stays loaded.

    Returns:
        Why it cannot be used; empty where it can.
    """
    if _core.core is None:
        return "no compiled core"
    try:
        library = ctypes.CDLL(path)
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in FUNCTIONS]
    except (OSError, AttributeError):
        return "no shared libjpeg-turbo"
    _kept.append(library)
    if _core.core.sslfast_bind_libjpeg((ctypes.c_void_p * len(found))(*found)) != _OK:
        return "libjpeg of an unknown version"
    return ""


_kept: list[ctypes.CDLL] = []


def crop_jpeg(
    data: bytes,
    boxes: Sequence[Box],
    outs: Sequence[Tensor],
    *,
    size: tuple[int, int],
    channels: int,
    factor: int = 1,
    orientation: int = 1,
) -> bool:
    """Decode a JPEG and resize boxes of it; no more is computed than they need. Requires :func:`bind_libjpeg`.

    Args:
        data: the file: 8 bits, grayscale or YCbCr.
        boxes: non-empty, inside of the decoded image.
        outs: for every box a contiguous uint8 ``[3, S, S]``, which is filled.
        size: width and height of the stored image.
        channels: 1 (gray, repeated in the result) or 3.
        factor: 1, 2, 4 or 8: decode at 1 / factor of the size (sides ``ceil(side / factor)``).
        orientation: EXIF's, 1 to 8, to give to the crops.

    Returns:
        False where libjpeg reports an error or a warning, or the file is another one than told: what is in ``outs``
        then has no meaning.
    """
    assert _core.core is not None
    status = _core.core.sslfast_crop_jpeg(
        data, _int64(len(data)), _int64(size[0]), _int64(size[1]), channels, factor, orientation, *_targets(boxes, outs)
    )
    if status == _MEMORY:
        raise MemoryError(f"no memory for crops of a JPEG of {size[0]} x {size[1]} pixels")
    return bool(status == _OK)


def crop_pixels(pixels: Tensor, boxes: Sequence[Box], outs: Sequence[Tensor], *, orientation: int = 1) -> None:
    """Resize boxes of an image. Requires the compiled core.

    Args:
        pixels: contiguous uint8 ``[H, W, C]``, C 1 or 3.
        boxes, outs, orientation: as for :func:`crop_jpeg`.
    """
    assert _core.core is not None
    height, width, channels = pixels.shape
    status = _core.core.sslfast_crop_pixels(
        ctypes.c_void_p(pixels.data_ptr()), _int64(width), channels, orientation, *_targets(boxes, outs)
    )
    if status == _MEMORY:
        raise MemoryError(f"no memory for crops of an image of {width} x {height} pixels")


def find_markers(data: bytes) -> tuple[Tensor, Tensor] | None:
    """Positions (int64) in a JPEG where 0xFF is followed by something else than 0 and 0xFF, and what that is (uint8).
    None without the compiled core."""
    if _core.core is None:
        return None
    find = _core.core.sslfast_find_markers
    find.restype = ctypes.c_int64
    count = _FEW_MARKERS
    while True:
        room = count
        positions, kinds = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.uint8)
        places, after = ctypes.c_void_p(positions.data_ptr()), ctypes.c_void_p(kinds.data_ptr())
        count = find(data, _int64(len(data)), places, after, _int64(room))
        if count <= room:
            return positions[:count], kinds[:count]


_FEW_MARKERS = 256
_int64 = ctypes.c_int64


def _targets(boxes: Sequence[Box], outs: Sequence[Tensor]) -> tuple[ctypes.c_int64, object, object, object]:
    count = len(boxes)
    edges = (ctypes.c_int64 * (4 * count))(*(edge for box in boxes for edge in box))
    sizes = (ctypes.c_int64 * count)(*(out.shape[-1] for out in outs))
    places = (ctypes.c_void_p * count)(*(out.data_ptr() for out in outs))
    return _int64(count), edges, sizes, places
