"""Pixels that Python code hands over, as the image file that loaders decode: a PPM or PGM, a header before the pixels.

So whatever reads the image files of a source (loaders, evaluations, ``prepare_beton``, ``verify_images``) reads these,
by the same policy, and a decoder does no more than copy.
"""

from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from sslfast.data.images import BadImageError, plain_pixels
from sslfast.data.source import SourceError

_HINT = (
    "sslfast makes the views itself, from whole 8-bit images: give the dataset without transform (transform=None), or "
    "with one that returns PIL images"
)
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
_IMAGE_KEYS = ("image", "img", "pixels", "picture", "jpg", "png")


def image_of(item: Any) -> Any:
    """The image of a dataset's item: the item, or the first of a tuple, or what a mapping has under ``image``, ..."""
    if isinstance(item, tuple | list) and item:
        return item[0]
    if isinstance(item, dict):
        return next((item[key] for key in _IMAGE_KEYS if key in item), item)
    return item


def image_file(value: Any) -> bytes:
    """An image file of ``value``.

    Args:
        value: ``PIL.Image`` (as it is: orientation tags are not applied), uint8 array ``[H, W]`` or ``[H, W, C]``,
            uint8 tensor ``[H, W]`` or ``[C, H, W]``, C in 1, 3, 4 (the last one is composited on white), or the bytes
            of an image file.

    Raises:
        SourceError: it is something else, as every item will be.
        BadImageError: the pixels have no defined white level.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        value.load()
        if value.mode in _DEEP:
            file = BytesIO()
            value.save(file, "PNG", compress_level=0)
            return file.getvalue()
        return _portable(np.asarray(plain_pixels(value)))
    if isinstance(value, torch.Tensor):
        array: Any = value.detach().cpu()
        what, channels = f"{value.dtype} tensors {list(value.shape)}", 0
    elif isinstance(value, np.ndarray):
        array, what, channels = value, f"{value.dtype} arrays {list(value.shape)}", -1
    else:
        raise SourceError(
            f"its items are {type(value).__module__}.{type(value).__qualname__}, and not an image or (image, label, "
            "...): return a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]"
        )
    if array.dtype not in (np.uint8, torch.uint8):
        raise SourceError(f"its items are {what}: {_HINT}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[channels] not in (1, 3, 4)):
        raise SourceError(
            f"its items are {what}: arrays must be [H, W] or [H, W, 3], tensors [H, W] or [3, H, W], as in torchvision"
        )
    pixels = np.asarray(array)
    if channels == 0 and pixels.ndim == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = np.asarray(plain_pixels(Image.fromarray(np.ascontiguousarray(pixels))))
    return _portable(pixels)


def _portable(pixels: np.ndarray[Any, Any]) -> bytes:
    """``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]`` as PGM or PPM."""
    height, width = pixels.shape[:2]
    if not width or not height:
        raise BadImageError(f"empty image: {width} x {height}")
    is_colour = pixels.ndim == 3 and pixels.shape[2] == 3
    return b"P%d\n%d %d\n255\n" % (6 if is_colour else 5, width, height) + pixels.tobytes()
