"""Reading an image file: what is converted, what is rejected, and its pixels as 8-bit RGB.

One policy for every kind of file. "Converted" files are trained on; "bad" files raise :class:`BadImageError`, and the
caller follows ``--on-bad-image error|skip``. "Scan" means that the header shows it when the manifest is written;
"decode" means that only decoding the pixels shows it.

================================================ ============================================================ =======
file                                             policy                                                       seen at
================================================ ============================================================ =======
JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, AVIF,      accepted, recognised by content and not by suffix
JPEG 2000, MPO; HEIC and HEIF where pillow-heif
is installed, which makes 8 bits of 10 and 12
grayscale, bilevel, YCbCr, HSV                   converted to RGB
CMYK / YCCK (of a JPEG as inverted, Adobe's way) converted to RGB, without colour profile
palette                                          converted to RGB through its palette
transparency (RGBA, LA, palette, tRNS)           composited on white; the alpha of a BMP that is 0 everywhere is none
16 bits a channel                                the high byte is kept (``value >> 8``); another white level:
                                                 ``Decoding.white_level``
fewer bits in 16: maximum of a PGM or PPM, TIFF  ``value * 256 // (white + 1)``, white is their largest
of 12 bits, PNG's sBIT and no larger value       value
animated, multi-picture                          first frame, white beside it
orientation 2 to 8 (EXIF, TIFF, else XMP; AVIF's applied, once; a damaged EXIF block counts as "upright"
irot and imir)
other metadata, whatever its state               left out before decoding (:mod:`sslfast.data.stripped`)
unreadable (permission, dangling link, device)   bad: ``unreadable: ...``                                     scan
a file of more than ``MAX_BYTES`` = 1 GiB        bad: ``too large ...``                                       scan
zero bytes                                       bad: ``empty file``                                          scan
not an image, whatever its suffix                bad: ``not an image ...``                                    scan
a side below ``MIN_SIDE`` = 8 pixels             bad: ``too small ...``                                       scan
more than ``MAX_PIXELS`` = 89,478,485 pixels     bad: ``too large ...`` (decompression bombs; cut into tiles) scan
more than ``Decoding.max_pixels``                bad: ``too large ...``                                       decode
damaged header                                   bad: ``damaged ...``                                         scan
truncated or damaged pixels, wrong PNG checksum  bad: ``damaged ...``                                         decode
JPEG with a marker inside its pixel data         bad: ``damaged ...`` (see :mod:`sslfast.data.jpeg`)          decode
32-bit integer or float pixels, CIELAB, signed   bad: ``pixel format ...`` (no defined white level)           decode
layouts that Pillow lacks or misreads            bad: ``pixel format not supported ...``, which names them    decode
================================================ ============================================================ =======

Not detected: flipped bits or zeros inside a JPEG's entropy-coded data (the format has no checksum, and libjpeg fills
the rest of the image with plausible pixels), and damage from before the file was encoded. Pillow's module-level
settings are never changed; its default ``LOAD_TRUNCATED_IMAGES`` = False is required.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from sslfast.data.deep import FULL, deep_samples, is_deep_colour, stated_white, to_8_bits
from sslfast.data.exif import exif_orientation
from sslfast.data.jpeg import JpegScan
from sslfast.data.stripped import (
    MAX_PIXELS,
    PORTABLE_HEADER,
    BadImageError,
    Stripped,
    check_portable,
    strip,
)
from sslfast.files import open_without_waiting

_HAS_AVIF = find_spec("PIL.AvifImagePlugin") is not None  # Pillow 11.3 and later
HAS_HEIF = find_spec("pillow_heif") is not None
_BUILT_IN = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", *(["AVIF"] if _HAS_AVIF else []), "JPEG2000")
"""Formats that Pillow opens by itself."""
FORMATS = (*_BUILT_IN, *(["HEIF"] if HAS_HEIF else []))
SUFFIXES = frozenset(
    f".{name}"
    for names in (
        "jpg jpeg jpe jfif mpo png gif bmp dib webp tif tiff ppm pgm pbm pnm jp2 j2k",
        "avif",
        "heic heif hif" if HAS_HEIF else "",
    )
    for name in names.split()
)
_HEIF = re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL)
MIN_SIDE = 8
MAX_BYTES = 1 << 30
"""Largest file that is read: more than any image of ``MAX_PIXELS`` needs."""

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


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What the policy leaves to the user. It belongs to the data: all loaders and evaluations of a run use the same."""

    white_level: int | None = None
    """Sample value that is white in files of 16 bits a channel; None: 65535. Scanners and cameras of 10, 12 or 14 bits
    often store 0 to 1023, 4095 or 16383. Files that state their own level keep it: a PGM or PPM with another maximum, a
    TIFF of 12 bits, a PNG whose sBIT chunk names fewer bits and that has no larger value."""
    max_pixels: int | None = None
    """Images of more pixels are bad; None: 89,478,485. An image just below that takes 0.3 to 1.6 GB of memory while it
    is decoded, of 16 bits with a white level up to 2.3 GB, in each of the decoding processes or threads."""

    def __post_init__(self) -> None:
        if self.white_level is not None and not 255 <= self.white_level <= 65535:
            raise ValueError(f"white_level must be in [255, 65535], got {self.white_level}")
        if self.max_pixels is not None and not MIN_SIDE**2 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"max_pixels must be in [{MIN_SIDE**2}, {MAX_PIXELS}], got {self.max_pixels}")


DEFAULT_DECODING = Decoding()


@dataclass
class ImageHeader:
    """Size after orientation, and the EXIF orientation that the stored picture has yet to be given."""

    width: int
    height: int
    orientation: int


@dataclass
class OpenImage(ImageHeader):
    """A file whose header has been read and whose pixels have not."""

    image: ImageFile.ImageFile
    stripped: Stripped
    decoding: Decoding = field(default_factory=Decoding)
    peak: int | None = None
    """Of 16 bits a channel, once decoded: the largest sample value, of colours rounded up to ``256 n - 1``."""
    white: int | None = None
    """Of 16 bits a channel, once decoded: the sample value that became white."""

    @property
    def jpeg(self) -> JpegScan | None:
        """Of a JPEG: the result of the marker scan."""
        return self.stripped.jpeg


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


@contextmanager
def open_image_file(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file, opened once, and its size; BadImageError where it is none, cannot be read, or is too large.

    Type and size are those of what was opened, so a link that changes its target in between does no harm; opening
    neither waits for a pipe's writer nor starts a device.
    """
    try:
        with open_without_waiting(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("unreadable: not a regular file")
            if status.st_size > MAX_BYTES:
                raise BadImageError(f"too large: a file of {status.st_size:,} bytes, at most {MAX_BYTES:,}")
            yield file, status.st_size
    except OSError as error:
        raise BadImageError(f"unreadable: {error.strerror or error}") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes, as many as it had when it was opened; BadImageError where it cannot be read or is empty."""
    with open_image_file(path) as (file, size):
        data = file.read(size)
    if not data:
        raise BadImageError("empty file")
    return data


def open_header(file: IO[bytes]) -> None:
    """Apply every rule of the policy that needs only the header. Raises BadImageError."""
    if file.read(4).startswith(_METADATA_FIRST):
        for most in _HEADER_BYTES:
            file.seek(0)
            data = file.read(most)
            try:
                _open_pillow(io.BytesIO(strip(data, header=True).data))
                return
            except BadImageError:
                if len(data) < most:
                    break
    else:
        file.seek(0)
        check_portable(file.read(PORTABLE_HEADER))
        file.seek(0)
        try:
            _open_pillow(file)
            return
        except BadImageError:
            file.seek(0)
            data = file.read(MAX_BYTES)
    _opened(strip(data, header=True), DEFAULT_DECODING)


_METADATA_FIRST = (b"\xff\xd8", b"\x89PNG")
"""Formats that may have megabytes of metadata before the header of their pixels."""
_HEADER_BYTES = (1 << 14, 1 << 18, MAX_BYTES)


def _open_pillow(file: IO[bytes]) -> ImageFile.ImageFile:
    is_heif = HAS_HEIF and _HEIF.match(file.read(12)) is not None
    if is_heif:
        _add_heif()
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS if is_heif else _BUILT_IN)
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


@cache
def _add_heif() -> None:
    """Have Pillow open HEIF; here, since importing the package takes 0.1 s."""
    import_module("pillow_heif").register_heif_opener()


def check_size(width: int, height: int, decoding: Decoding = DEFAULT_DECODING) -> None:
    """BadImageError if the size is outside of what the policy allows."""
    most = decoding.max_pixels or MAX_PIXELS
    if min(width, height) < MIN_SIDE:
        raise BadImageError(f"too small: {width} x {height}, smallest side is {MIN_SIDE}")
    if width * height > most:
        raise BadImageError(f"too large: {width} x {height}, at most {most} pixels")


def open_image(data: bytes, decoding: Decoding = DEFAULT_DECODING) -> OpenImage:
    """Header, size after EXIF orientation; no pixel is decoded for JPEG. Raises BadImageError."""
    return _opened(strip(data), decoding)


def _opened(stripped: Stripped, decoding: Decoding) -> OpenImage:
    try:
        image = _open_pillow(io.BytesIO(stripped.data))
    except BadImageError as error:
        if stripped.described and error.reason.startswith(("not an image", "damaged header")):
            raise BadImageError(_not_supported(stripped, "damaged, or " * stripped.is_supported)) from None
        raise
    if not stripped.is_supported:
        raise BadImageError(_not_supported(stripped))
    check_size(*image.size, decoding)
    orientation = stripped.orientation
    if image.format == "AVIF":
        orientation = exif_orientation(image.info.get("exif", b"")) or 1
    width, height = image.size
    if ORIENTATION[orientation][0]:
        width, height = height, width
    return OpenImage(width, height, orientation, image, stripped, decoding)


def _not_supported(stripped: Stripped, doubt: str = "") -> str:
    planes = stripped.in_planes and not stripped.is_supported
    remedy = "store its channels together (tiffcp -p contig)" if planes else "convert to 8 or 16 bits"
    return f"{doubt}pixel format not supported: {stripped.described}; {remedy}"


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
        array = _decode(opened)
    except (MemoryError, BadImageError):
        raise
    except Exception as error:  # decoders raise arbitrary exceptions on damaged data
        raise BadImageError(f"damaged: {_one_line(error)}") from None
    return array.reshape(*array.shape[:2], -1), factor


def decode_full(data: bytes, decoding: Decoding = DEFAULT_DECODING) -> NDArray[np.uint8]:
    """``[H, W, 3]`` the whole upright image by the same policy, for evaluation and previews. Raises BadImageError."""
    opened = open_image(data, decoding)
    pixels, _ = decode_pixels(opened)
    transpose, flip_vertical, flip_horizontal = ORIENTATION[opened.orientation]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    pixels = pixels[:: -1 if flip_vertical else 1, :: -1 if flip_horizontal else 1]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _decode(opened: OpenImage) -> NDArray[np.uint8]:
    """The pixels as stored: 8 bits, ``[H, W]`` gray or ``[H, W, 3]`` RGB."""
    image, stripped, level = opened.image, opened.stripped, opened.decoding.white_level
    stated, key = stated_white(image, stripped), stripped.key
    low_bytes = key is not None or (level or FULL) < FULL or (stripped.significant or 16) < 16
    samples = deep_samples(image, stripped, low_bytes=low_bytes)
    if samples is None:
        frame = _first_frame(image, stripped.data)
        image.load()
        array = stored = np.asarray(plain_pixels(image))
        if frame is not None:  # beside it is nothing, which Pillow fills with colour 0
            left, top, right, bottom = frame
            array = np.full_like(stored, 255)
            array[top:bottom, left:right] = stored[top:bottom, left:right]
            stored = array
        if is_deep_colour(image, stripped):
            opened.peak, opened.white = int(array.max()) * 256 + 255, FULL
        elif key is not None and stripped.bits < 8:  # Pillow scales the levels
            key = tuple(value * 255 // (2**stripped.bits - 1) for value in key)
    else:
        colours = samples[..., :3] if samples.ndim == 3 else samples
        opened.peak, significant = int(colours.max()), stripped.significant or 16
        own = 2**significant - 1 if opened.peak < 2**significant else FULL
        opened.white = stated or level or own
        stored = samples if not stripped.inverted else opened.white - np.minimum(samples, opened.white)
        array = to_8_bits(stored, opened.white)
        if array.ndim == 3 and array.shape[2] == 4:
            array[..., 3] = samples[..., 3] >> 8
            array = np.asarray(_on_white(Image.fromarray(array)))
    if key is not None:
        array = array.copy()
        array[(stored.reshape(*stored.shape[:2], -1) == np.array(key)).all(axis=2)] = 255
    return array


def _first_frame(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the first frame of a GIF or WebP animation that does not cover the picture."""
    frame = (0, 0, *image.size)
    if image.format == "GIF" and image.tile:
        frame = image.tile[0][1] or frame
    elif image.format == "WEBP":
        at = 12
        while at + 24 <= len(data) and data[at : at + 4] != b"ANMF":
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            at += 8 + size + size % 2
        if at + 24 <= len(data):
            x, y, width, height = (int.from_bytes(data[at + 8 + 3 * i :][:3], "little") for i in range(4))
            frame = (2 * x, 2 * y, 2 * x + width + 1, 2 * y + height + 1)
    return None if frame == (0, 0, *image.size) else frame


def plain_pixels(image: Image.Image) -> Image.Image:
    """Loaded pixels of 8 bits in mode ``RGB`` or ``L``."""
    mode = image.mode
    if mode == "La":
        image = image.convert("LA")
    if has_transparency(image):
        return _on_white(image.convert("RGBA"))
    if mode in ("RGB", "L"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBA"):
        return image.convert("RGB")
    raise BadImageError(f"pixel format {mode} ({image.format}) has no defined white level: convert to 8 or 16 bits")


def has_transparency(image: Image.Image) -> bool:
    """Whether there is an alpha channel, be it of the palette, or a transparent colour. Pillow 10.0 does not say.

    Of a BMP, where programs leave it 0, one that is not 0 everywhere.
    """
    if image.format == "BMP" and image.mode == "RGBA":
        return image.getchannel("A").getextrema() != (0, 0)
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return "transparency" in image.info or image.mode in ("LA", "PA", "RGBA") or palette.endswith("A")


def _on_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _one_line(error: Exception) -> str:
    """The message of a decoder's exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


OnBadImage = Literal["error", "skip"]
