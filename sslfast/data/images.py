"""Reading an image file: what is converted, what is rejected, and its pixels as 8-bit RGB.

One policy for every kind of file. "Converted" files are trained on; "bad" files raise :class:`BadImageError`, and the
caller follows ``--on-bad-image error|skip``. "Scan" means that the header shows it when the manifest is written;
"decode" means that only decoding the pixels shows it.

=============================================== ============================================================ ========
file                                            policy                                                       seen at
=============================================== ============================================================ ========
JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, AVIF,     accepted, recognised by content and not by suffix
JPEG 2000, MPO
grayscale, bilevel, YCbCr, HSV                  converted to RGB
CMYK / YCCK (also Adobe's inverted JPEGs)       converted to RGB, without colour profile
palette                                         converted to RGB through its palette
transparency (RGBA, LA, palette, tRNS)          composited on white
16 bits a channel                               the high byte is kept (``value >> 8``)
animated, multi-picture                         first frame
EXIF orientation 2 to 8                         applied; a damaged EXIF block counts as "upright"
unreadable (permission, dangling link, device)  bad: ``unreadable: ...``                                     scan
zero bytes                                      bad: ``empty file``                                          scan
not an image, whatever its suffix               bad: ``not an image ...``                                    scan
a side below ``MIN_SIDE`` = 8 pixels            bad: ``too small ...``                                       scan
more than ``MAX_PIXELS`` = 89,478,485 pixels    bad: ``too large ...`` (decompression bombs; cut into tiles) scan
damaged header                                  bad: ``damaged ...``                                         scan
truncated or damaged pixels, wrong PNG checksum bad: ``damaged ...``                                         decode
JPEG with a marker inside its pixel data        bad: ``damaged ...`` (see :mod:`sslfast.data.jpeg`)          decode
32-bit integer or float pixels, CIELAB          bad: ``pixel format ...`` (no defined white level)           decode
=============================================== ============================================================ ========

Not detected: flipped bits or zeros inside a JPEG's entropy-coded data (the format has no checksum, and libjpeg fills
the rest of the image with plausible pixels), and damage from before the file was encoded. Pillow's module-level
settings are never changed; its default ``LOAD_TRUNCATED_IMAGES`` = False is required.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from sslfast.data.jpeg import JpegScan, scan_jpeg

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")  # MPO comes as JPEG
SUFFIXES = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif mpo png gif bmp dib", "webp tif tiff ppm pgm pbm pnm avif jp2 j2k")
    for name in names.split()
)
MIN_SIDE = 8
MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb warning

# EXIF orientation -> what makes the stored image upright: transpose, then flip vertically, then horizontally.
ORIENTATION = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class BadImageError(ValueError):
    """An image file that must not be trained on. ``reason`` is one short line without the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class ImageHeader:
    """Size after orientation, and the EXIF orientation that the stored picture has yet to be given."""

    width: int
    height: int
    orientation: int


@dataclass
class OpenImage(ImageHeader):
    """A file whose header has been read and whose pixels have not."""

    image: Image.Image
    jpeg: JpegScan | None = None
    """Of a JPEG: the result of the marker scan."""


def silence_pillow() -> None:
    """Turn off warnings (large image, odd EXIF): the policy above decides. For worker processes of this package."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # Decoded pixels are passed to torch without a copy and never written to.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """:func:`silence_pillow` inside the block only."""
    with warnings.catch_warnings():
        silence_pillow()
        yield


def require_strict_pillow() -> None:
    """Raise ValueError if the process configured Pillow to fill in the missing part of truncated files."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, so truncated images would train as half-grey pictures: "
            "remove the line that sets it"
        )


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes; BadImageError where it cannot be read or is empty."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from None
    if not data:
        raise BadImageError("empty file")
    return data


def open_header(file: IO[bytes]) -> Image.Image:
    """Read the header and apply every rule of the policy that needs only the header. Raises BadImageError."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImageError("not an image, or of a format that is not supported") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"too large: more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on damaged headers
        raise BadImageError(f"damaged header: {_one_line(error)}") from None
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """BadImageError if the size is outside of what the policy allows."""
    if min(width, height) < MIN_SIDE:
        raise BadImageError(f"too small: {width} x {height}, smallest side is {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImageError(f"too large: {width} x {height}, at most {MAX_PIXELS} pixels")


def open_image(data: bytes) -> OpenImage:
    """Header, size after EXIF orientation; no pixel is decoded for JPEG. Raises BadImageError."""
    image = open_header(io.BytesIO(data))
    jpeg: JpegScan | None = None
    if image.format == "PNG":
        _check_png(data)
    elif isinstance(image, JpegImagePlugin.JpegImageFile):
        jpeg = scan_jpeg(data)
        if jpeg.state == "damaged":
            raise BadImageError(f"damaged: {jpeg.reason}")
    try:
        orientation = image.getexif().get(0x0112, 1)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block says nothing about the pixels
        orientation = 1
    orientation = orientation if orientation in ORIENTATION else 1
    width, height = image.size
    if ORIENTATION[orientation][0]:
        width, height = height, width
    return OpenImage(width, height, orientation, image, jpeg)


def decode_pixels(opened: OpenImage, *, factor: int = 1) -> tuple[NDArray[np.uint8], int]:
    """Decode the pixels as stored, that is before orientation; consumes ``opened``.

    Args:
        opened: the image.
        factor: 1, 2, 4 or 8: a JPEG may be decoded at 1 / factor of its size (libjpeg's scaled DCT, cheaper).

    Returns:
        uint8 ``[H, W, 3]``, or ``[H, W, 1]`` for grayscale, and the factor that was applied (1 for other formats).
        Sides are ``ceil(side / factor)``. Raises BadImageError.
    """
    image = opened.image
    try:
        if factor > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(None, (max(image.width // factor, 1), max(image.height // factor, 1)))
        else:
            factor = 1
        plain = _plain(image)
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on damaged data
        raise BadImageError(f"damaged: {_one_line(error)}") from None
    array: NDArray[np.uint8] = np.asarray(plain)
    return array.reshape(*array.shape[:2], -1), factor


def decode_full(data: bytes) -> NDArray[np.uint8]:
    """``[H, W, 3]`` the whole upright image by the same policy, for evaluation and previews. Raises BadImageError."""
    opened = open_image(data)
    pixels, _ = decode_pixels(opened)
    transpose, flip_vertical, flip_horizontal = ORIENTATION[opened.orientation]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    pixels = pixels[:: -1 if flip_vertical else 1, :: -1 if flip_horizontal else 1]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _check_png(data: bytes) -> None:
    """Verify the checksums of the critical chunks; Pillow ignores those of the pixel data."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data) or kind == b"IEND":
            return
        if (
            kind[:1].isupper()
            and zlib.crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]
        ):
            raise BadImageError(f"damaged: wrong checksum of PNG chunk {kind.decode('latin-1')} at byte {position}")
        position = end + 4


def _plain(image: Image.Image) -> Image.Image:
    """Decode the pixels into mode ``RGB`` or ``L`` (8 bits)."""
    image.load()
    mode = image.mode
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if mode in ("RGB", "L"):
        return image
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PPM", "PNG")):
        # Pillow opens 16-bit PGM files as 32-bit integers that hold 16-bit values.
        values: NDArray[Any] = np.asarray(image)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
        return image.convert("RGB")
    raise BadImageError(f"pixel format {mode} ({image.format}) has no defined white level: convert to 8 or 16 bits")


def _one_line(error: Exception) -> str:
    """The message of a decoder's exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


OnBadImage = Literal["error", "skip"]
