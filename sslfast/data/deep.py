"""Images of more than 8 bits a channel: their samples, and which sample value is white.

Pillow decodes gray of 16 bits as it is, and keeps the high byte alone of colours. Where that is not enough (white is
below 65535, or a transparent colour has to be found), a second pass of Pillow's decoder reads the low bytes: with the
byte order of its unpacker exchanged it keeps the other one.
"""

import io
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from sslfast.data.stripped import BadImageError, Stripped

FULL = 65_535
_ROWS = 64
"""Rows that are reduced at once: wide intermediate values of whole images take memory and time."""
_OTHER = "B" if sys.byteorder == "little" else "L"
_EXCHANGED = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", _OTHER))
}


def is_deep_colour(image: ImageFile, stripped: Stripped) -> bool:
    """Whether Pillow drops the low bytes of this image."""
    return image.format in ("PNG", "TIFF") and stripped.bits == 16 and not image.mode.startswith("I")


def deep_samples(image: ImageFile, stripped: Stripped, *, low_bytes: bool) -> NDArray[Any] | None:
    """Unsigned samples ``[H, W]`` or ``[H, W, 3 or 4]``; None for an image whose samples Pillow gives in 8 bits.

    Args:
        image: not loaded yet.
        stripped: the file.
        low_bytes: whether those of colours are needed.

    Raises:
        BadImageError: the low bytes are needed and Pillow has no unpacker for them.
    """
    if image.format == "PPM" and image.mode in ("L", "I", "RGB") and image.tile[0][0] == "ppm":
        return _portable(image, stripped, _arguments(image)[1])
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        image.load()
        return np.asarray(image).astype(np.uint16)
    if not (is_deep_colour(image, stripped) and low_bytes):
        return None
    raw = _arguments(image)[0]
    if raw == "LA;16B":  # has no counterpart; 32 bits a pixel are read as they are
        _set_rawmode(image, "RGBA")
        image.load()
        pairs = np.asarray(image).copy().view(">u2")
        return pairs[..., [0, 0, 0, 1]]
    if raw not in _EXCHANGED or stripped.in_planes:
        raise BadImageError(f"pixel format not supported with a white level: {stripped.described}")
    # In this order and in place: these arrays are what limits the size of an image.
    image.load()
    samples: NDArray[Any] = np.asarray(image).astype(np.uint16)
    samples <<= 8
    with Image.open(io.BytesIO(stripped.data), formats=[image.format or ""]) as again:
        _set_rawmode(again, _EXCHANGED[raw])
        samples |= np.asarray(again)
    return samples


def stated_white(image: ImageFile, stripped: Stripped) -> int | None:
    """The white level that the file itself states beyond doubt; None where the samples should fill 16 bits."""
    if image.format == "PPM":
        decoder = image.tile[0][0]
        maximum = int(_arguments(image)[1]) if decoder in ("ppm", "ppm_plain") and image.mode != "1" else FULL
        if maximum == FULL:
            return None
        return maximum if decoder == "ppm" else FULL  # Pillow scales the plain forms
    if image.format == "JPEG2000":
        return FULL if stripped.bits < 16 else None  # Pillow scales them
    return 2**stripped.bits - 1 if stripped.bits < 16 else None


def to_8_bits(samples: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """``value * 256 // (white + 1)``, at most 255: the high byte where white is 65535. Levels below 255 are scaled."""
    reduced = np.empty(samples.shape, np.uint8)
    for start in range(0, len(samples), _ROWS):
        part = samples[start : start + _ROWS].astype(np.uint32)
        scaled = (part * 255 + white // 2) // white if white < 255 else part * 256 // (white + 1)
        reduced[start : start + _ROWS] = np.minimum(scaled, 255)
    return reduced


def _portable(image: ImageFile, stripped: Stripped, maximum: int) -> NDArray[Any]:
    """Binary PGM and PPM: Pillow's decoder of these works in Python, byte by byte."""
    offset = image.tile[0][2]
    shape = (image.height, image.width) if image.mode in ("L", "I") else (image.height, image.width, 3)
    kind = np.dtype(np.uint8 if maximum < 256 else ">u2")
    count = int(np.prod(shape))
    if len(stripped.data) < offset + count * kind.itemsize:
        raise BadImageError("damaged: image file is truncated")
    samples = np.frombuffer(stripped.data, kind, count, offset).reshape(shape)
    return np.minimum(samples, maximum)


def _arguments(image: ImageFile) -> tuple[Any, ...]:
    """Of the decoder of the image's first part; the unpacker is the first one."""
    arguments = image.tile[0][3]
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _set_rawmode(image: ImageFile, rawmode: str) -> None:
    tiles: list[Any] = []
    for tile in image.tile:
        arguments = (rawmode, *tile[3][1:]) if isinstance(tile[3], tuple) else rawmode
        tiles.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.tile = tiles
