"""An image file without the parts that its pixels do not need, and what those parts say about the pixels.

Comments, profiles, thumbnails, text, EXIF and XMP are left out before a decoder sees the file, so that none of them can
make an image bad, expensive, or turned twice. What remains decodes to the pixels as stored. The orientation is read
here and applied in one place, after decoding (:mod:`sslfast.data.images`).
"""

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from sslfast.data.exif import ORIENTATION_TAG, Directory, exif_orientation, read_directory, xmp_orientation
from sslfast.data.jpeg import JpegScan, scan_jpeg

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb warning
_MOST_TEXT = 1 << 20
"""Bytes of text or EXIF that are looked at for an orientation."""


PORTABLE_HEADER = 1 << 16
_PORTABLE = re.compile(rb"P[1-6][\s#]")
_COMMENT = re.compile(rb"#[^\r\n]*")


class BadImageError(ValueError):
    """An image file that must not be trained on. ``reason`` is one short line without the path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Stripped:
    """A file for the decoder, and what was read from the rest."""

    data: bytes
    orientation: int = 1
    """EXIF orientation that the pixels have yet to be given."""
    bits: int = 8
    """Stored bits a channel, where the decoder's 16-bit values do not fill their range or it is not known to."""
    significant: int | None = None
    """PNG's sBIT: the bits a channel that the encoder was given."""
    inverted: bool = False
    """0 is white, and the decoder does not take care of it."""
    key: tuple[int, ...] | None = None
    """Gray level or colour, as stored, that stands for full transparency."""
    in_planes: bool = False
    """Every channel is stored by itself."""
    several: bool = False
    """There are further pictures in the file."""
    described: str = ""
    """The kind of pixels, for messages."""
    is_supported: bool = True
    """Whether Pillow reads this kind, and to right pixels."""
    jpeg: JpegScan | None = field(default=None, repr=False)


def strip(data: bytes, *, header: bool = False) -> Stripped:
    """The parts of an image file that its pixels need. Raises BadImageError where what is needed is damaged.

    Args:
        data: the file.
        header: look no further than to where the pixels of a JPEG or PNG begin; ``data`` may be cut off after that.
    """
    check_portable(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data, header)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data, header)
    for magic, method in _FORMATS:
        if data.startswith(magic):
            return method(data)
    if data[4:8] == b"ftyp":
        return _avif(data)
    return Stripped(data)


def check_portable(head: bytes) -> None:
    """BadImageError for a PBM, PGM or PPM whose header does not end in its first ``PORTABLE_HEADER`` bytes, ``head``:
    Pillow reads comments there byte by byte, minutes of them."""
    if _PORTABLE.match(head):
        words = _COMMENT.sub(b"", head[:PORTABLE_HEADER]).split(None, 4)
        if len(words) < (3 if head[1:2] in b"14" else 4):
            raise BadImageError("damaged header: the size of the picture is missing, or behind long comments")


def _jpeg(data: bytes, header: bool) -> Stripped:
    scan = scan_jpeg(data, header=header)
    if scan.state == "damaged":
        raise BadImageError(f"damaged: {scan.reason}")
    return Stripped(
        _without(data, scan.unneeded),
        orientation=scan.orientation,
        jpeg=scan,
        several=scan.several,
        described=f"JPEG of {len(scan.components)} x {scan.precision} bits",
        is_supported=not scan.frame or (scan.precision == 8 and len(scan.components) in (1, 3, 4)),
    )


def _without(data: bytes, parts: list[tuple[int, int]]) -> bytes:
    """The data without the given (start, end), which are in order."""
    if not parts:
        return data
    kept, position = [], 0
    for start, end in parts:
        kept.append(data[position:start])
        position = end
    return b"".join([*kept, data[position:]])


def _png(data: bytes, header: bool) -> Stripped:
    """Also verifies the checksums of what is kept; Pillow ignores those of the pixel data."""
    found = Stripped(b"")
    kept, position, colour, is_complete = [data[:8]], 8, -1, False
    exif = xmp = profile = None
    view = memoryview(data)
    while position + 12 <= len(data) and not is_complete:
        length, kind = struct.unpack_from(">I4s", data, position)
        begin, end = position + 8, position + 8 + length
        if end + 4 > len(data) or (header and kind == b"IDAT"):
            break
        is_needed = kind[:1].isupper() or kind == b"tRNS"
        if is_needed or kind in _PNG_READ:
            is_whole = zlib.crc32(view[position + 4 : end]) == struct.unpack_from(">I", data, end)[0]
            if is_needed and not is_whole:
                raise BadImageError(f"damaged: wrong checksum of PNG chunk {ascii(kind)[2:-1]} at byte {position}")
            kind = kind if is_whole else b""
        if kind == b"IHDR" and length >= 13:
            found.bits, colour = data[begin + 8], data[begin + 9]
            found.described = f"PNG of {found.bits} bits a channel, colour type {colour}"
        elif kind == b"tRNS" and colour in (0, 2):
            # Pillow compares the stored value with pixels that it has scaled to 8 bits.
            is_needed, count = False, 1 if colour == 0 else 3
            if length < 2 * count:
                raise BadImageError("damaged: PNG chunk tRNS is too short")
            found.key = struct.unpack_from(f">{count}H", data, begin)
        elif kind == b"sBIT" and length:
            found.significant = max(data[begin : begin + min(length, 1 if colour in (0, 4) else 3)])
        elif kind == b"acTL":
            found.several = True
        elif kind == b"eXIf" and exif is None:
            exif = data[begin : min(end, begin + _MOST_TEXT)]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            text = data[begin : min(end, begin + _MOST_TEXT)]
            if kind == b"iTXt" and text.startswith(b"XML:com.adobe.xmp\0"):
                xmp = _international(text)
            elif text.startswith(b"Raw profile type exif\0"):
                profile = _raw_profile(text[22:] if kind == b"tEXt" else _inflate(text[23:]))
        if is_needed:
            kept.append(data[position : end + 4])
        position, is_complete = end + 4, kind == b"IEND"
    if not is_complete:
        kept.append(data[position:])
    found.data = b"".join(kept)
    found.orientation = _orientation(exif or profile, xmp)
    return found


_PNG_READ = frozenset({b"sBIT", b"eXIf", b"tEXt", b"zTXt", b"iTXt"})


def _orientation(exif: bytes | None, xmp: bytes | None) -> int:
    value = exif_orientation(exif) if exif else None
    if value is None and xmp:
        value = xmp_orientation(xmp)
    return value or 1


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT)
    except zlib.error:
        return b""


def _international(text: bytes) -> bytes:
    """The content of an iTXt chunk whose keyword is XMP's: flag, method, language, translated keyword, text."""
    rest = text[len(b"XML:com.adobe.xmp\0") :]
    packed, parts = rest[:1] == b"\x01", rest[2:].split(b"\0", 2)
    return (_inflate(parts[2]) if packed else parts[2]) if len(parts) == 3 else b""


def _raw_profile(text: bytes) -> bytes | None:
    """ImageMagick's form of EXIF: a line break, the name, the length, and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None


# Tags of a TIFF directory that pixels need: size, layout, compression with its options, and meaning of the samples.
_TIFF_NEEDED = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347}
    | {512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 50674, 0xBC01}
)
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL, _SAMPLES, _PLANAR, _INKS, _FORMAT = 258, 259, 262, 266, 277, 284, 332, 339
_EXTRA = 338
_COUNTS, _COLOURS, _TILE, _SUBSAMPLING, _XMP = 279, 320, (322, 323), 530, 700
_PHOTOMETRICS = {
    0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB",
    9: "ICCLAB", 10: "ITULAB", 32803: "colour filter array", 32844: "LogL", 32845: "LogLuv", 34892: "linear raw",
}  # fmt: skip


def _tiff(data: bytes) -> Stripped:
    """The same directory with fewer entries, in place, and no further directory after it.

    Pillow applies orientations above 1 to some layouts and compressions by itself, once or twice: it never sees one.
    """
    directory = read_directory(data)
    found = Stripped(data)
    if directory is None:
        return found
    kept, tags, xmp = [], {}, b""
    for entry in directory.entries(data):
        if entry.tag in _TIFF_NEEDED:
            kept.append(data[entry.position : entry.position + directory.entry_size])
        if entry.tag == _XMP:
            xmp = data[entry.values : entry.values + min(entry.count, _MOST_TEXT)]
        elif entry.tag in _TIFF_NEEDED or entry.tag == ORIENTATION_TAG:
            tags[entry.tag] = directory.integers(data, entry)
            if entry.tag == _COLOURS:
                place = entry.values
    end = directory.start + directory.count * directory.entry_size
    offset = 8 if directory.big else 4
    found.several = any(data[end : end + offset])
    count = struct.pack(directory.order + ("Q" if directory.big else "H"), len(kept))
    table = b"".join([count, *kept, bytes(offset)])
    start = directory.start - len(count)
    found.data = b"".join([data[:start], table, data[start + len(table) :]])
    colours = tags.get(_COLOURS, ())
    if colours and max(colours) < 256:  # written with 8 bits instead of 16, which would be black
        wide = struct.pack(f"{directory.order}{len(colours)}H", *(257 * value for value in colours))
        found.data = b"".join([found.data[:place], wide, found.data[place + len(wide) :]])
    stated = tags.get(ORIENTATION_TAG, ())
    value = stated[0] if len(stated) == 1 else 0
    found.orientation = value if 1 <= value <= 8 else _orientation(None, xmp if ORIENTATION_TAG not in tags else b"")
    _check_tiff(found, directory, tags)
    return found


def _check_tiff(found: Stripped, directory: Directory, tags: dict[int, tuple[int, ...]]) -> None:
    """Name what Pillow cannot read, and what it would read without an error to wrong pixels."""

    def first(tag: int, default: int) -> int:
        return (tags.get(tag) or (default,))[0]

    bits, photometric, format = tags.get(_BITS) or (1,), first(_PHOTOMETRIC, 0), first(_FORMAT, 1)
    compression, samples = first(_COMPRESSION, 1), first(_SAMPLES, 1)
    found.bits = bits[0]
    found.in_planes = samples > 1 and first(_PLANAR, 1) == 2
    found.inverted = photometric == 0 and bits[0] == 16
    words = f"{_PHOTOMETRICS.get(photometric, f'photometric {photometric}')} TIFF of {samples} x {bits[0]} bits"
    kind = {2: ", signed", 3: ", floating point", 4: ", untyped", 5: ", complex", 6: ", complex"}.get(format, "")
    found.described = words + kind
    # Signed samples of more bits come in a mode of their own.
    if (format == 2 and bits[0] <= 8) or max(bits) != min(bits) or (photometric == 5 and first(_INKS, 1) != 1):
        found.is_supported = False
    elif found.in_planes and not _reads_planes(bits[0], photometric, compression, tags.get(_EXTRA) or ()):
        found.described += ", in planes" + " without compression" * (compression == 1)
        found.is_supported = False
    elif photometric == 6 and compression == 1:
        width, height = first(256, 0), first(257, 0)
        if (tags.get(_SUBSAMPLING) or (2, 2)) != (1, 1) and sum(tags.get(_COUNTS, ())) < 3 * width * height:
            found.described, found.is_supported = f"{found.described}, subsampled without compression", False
    if first(_TILE[0], 0) * first(_TILE[1], 0) > MAX_PIXELS:
        raise BadImageError(f"too large: tiles of {first(_TILE[0], 0)} x {first(_TILE[1], 0)} pixels")


def _reads_planes(bits: int, photometric: int, compression: int, extra: tuple[int, ...]) -> bool:
    """Whether Pillow reads channels that are stored one after the other, to right pixels.

    Without compression it takes a letter of the mode's name for each plane, which only RGB, RGBA and CMYK have; with
    compression it writes the alpha of gray and of palettes where its modes LA and PA do not look for it.
    """
    if compression == 1:
        return bits == 8 and ((photometric in (2, 5) and not extra) or (photometric == 2 and extra == (2,)))
    return not (extra and (photometric == 6 or (photometric in (0, 1, 3) and any(extra))))


def _webp(data: bytes) -> Stripped:
    """As it is: Pillow hands EXIF and XMP over without a look at them."""
    exif = xmp = None
    several, position = False, 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        part = slice(position + 8, position + 8 + min(length, _MOST_TEXT))
        if kind == b"EXIF" and exif is None:
            exif = data[part]
        elif kind == b"XMP ":
            xmp = data[part]
        several |= kind == b"ANMF"
        position += 8 + length + length % 2
    return Stripped(data, orientation=_orientation(exif, xmp), several=several)


_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)


def _avif(data: bytes) -> Stripped:
    """Without its EXIF item: ``irot`` and ``imir``, which Pillow passes on as an orientation, are what holds."""
    return Stripped(_EXIF_ITEM.sub(rb"\1skip", data, count=64))


def _jpeg2000(data: bytes) -> Stripped:
    """Without the box of the resolution. The bits a channel and the size that costs memory are the codestream's."""
    found = Stripped(data)
    start = data.find(b"\xff\x4f\xff\x51")
    header = data.find(b"jp2h", 0, max(start, 0))
    if header >= 0:
        found.data = b"".join([data[:header], data[header:start].replace(b"res ", b"free"), data[start:]])
    if 0 <= start <= len(data) - 43:
        right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
        if (right - left) * (bottom - top) > MAX_PIXELS:
            raise BadImageError(f"too large: {right - left} x {bottom - top}, at most {MAX_PIXELS} pixels")
        found.bits = (data[start + 42] & 0x7F) + 1
        found.described = f"JPEG 2000 of {struct.unpack_from('>H', data, start + 40)[0]} x {found.bits} bits"
    return found


def _bmp(data: bytes) -> Stripped:
    """With one more colour, which no pixel has, in a palette of grays that Pillow would leave out: it then takes the
    indices of 4 or 8 bits for gray levels of 8 bits, or of two colours for levels of 1 bit."""
    if len(data) < 54:
        return Stripped(data)
    offset, size = struct.unpack_from("<II", data, 10)
    bits, compression = struct.unpack_from("<HI", data, 28)
    (colours,) = struct.unpack_from("<I", data, 46)
    count, start = colours or 1 << bits, 14 + size
    is_misread = size >= 40 and compression == 0 and ((bits == 4 and count <= 256) or (bits == 8 and count == 2))
    grays = (0, 255) if count == 2 else range(count)
    end = start + 4 * count
    if not is_misread or any(data[start + c : end : 4] != bytes(grays) for c in range(3)):
        return Stripped(data)
    begin = struct.pack("<I", (end if offset == start else offset) + 4)
    more = struct.pack("<I", count + 1)
    return Stripped(b"".join([data[:10], begin, data[14:46], more, data[50:end], b"\1\2\3\0", data[end:]]))


_FORMATS: tuple[tuple[bytes, Callable[[bytes], Stripped]], ...] = (
    (b"BM", _bmp),
    (b"II", _tiff),
    (b"MM", _tiff),
    (b"RIFF", _webp),
    (b"\xff\x4f\xff\x51", _jpeg2000),
    (b"\0\0\0\x0cjP  ", _jpeg2000),
)
