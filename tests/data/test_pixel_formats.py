"""Every kind of pixels in every container and orientation: the right pixels, or a refusal that names the kind."""

import io
import itertools
import struct
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sslfast.data.images import BadImageError, decode_full, open_image
from sslfast.loaders.decode import decode_crops
from tests.pictures import UPRIGHT, bmp, encoded, pixels, png, png_chunk, tiff

RGB = pixels(30, 22)
GRAY = RGB[..., 0]
OPAQUE = np.full_like(GRAY, 255)
HALF = np.where(np.arange(30) < 15, 128, 255).astype(np.uint8) * np.ones_like(GRAY)
FOUR = GRAY >> 4
WIDE = GRAY.astype(np.uint16) * 256 + 77
WIDE_RGB = RGB.astype(np.uint16) * 256 + 77
COLOURS = (np.arange(768).reshape(3, 256) * 7 % 256).astype(np.uint8)


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colour = colour if colour.ndim == 3 else np.repeat(colour[..., None], 3, axis=2)
    share = alpha[..., None].astype(float) / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


def agree(data: bytes, expected: NDArray[np.uint8], tolerance: int = 0) -> None:
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    found = decode_full(data)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    opened = open_image(data)
    assert (opened.height, opened.width) == expected.shape[:2]
    (crop,) = decode_crops(opened, [np.array([3, 5, 19, 21])], [16])
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), found[5:21, 3:19])


def premultiplied(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    wide = colour if colour.ndim == 3 else colour[..., None]
    return np.dstack([np.round(wide * (alpha[..., None] / 255)).astype(np.uint8), alpha])


PALETTE = COLOURS.astype(int)
SHOWN = COLOURS[:, GRAY].transpose(1, 2, 0)

# name -> samples, bits, photometric, further tags, expected, tolerance
TIFFS = {
    "bilevel": (GRAY > 99, 1, 1, (), (GRAY > 99) * np.uint8(255), 0),
    "bilevel, 0 is white": (GRAY > 99, 1, 0, (), (GRAY <= 99) * np.uint8(255), 0),
    "gray 2": (GRAY >> 6, 2, 1, (), (GRAY >> 6) * 85, 0),
    "gray 2, 0 is white": (3 - (GRAY >> 6), 2, 0, (), (GRAY >> 6) * 85, 0),
    "gray 4": (FOUR, 4, 1, (), FOUR * 17, 0),
    "gray 4, 0 is white": (15 - FOUR, 4, 0, (), FOUR * 17, 0),
    "gray 8": (GRAY, 8, 1, (), GRAY, 0),
    "gray 8, 0 is white": (255 - GRAY, 8, 0, (), GRAY, 0),
    "gray 12": (GRAY.astype(np.uint16) * 16 + 9, 12, 1, (), GRAY, 0),
    "gray 16": (WIDE, 16, 1, (), GRAY, 0),
    "gray 16, 0 is white": (65535 - WIDE, 16, 0, (), GRAY, 0),
    "gray and alpha": (np.dstack([GRAY, HALF]), 8, 1, [(338, "H", [2])], on_white(GRAY, HALF), 1),
    "gray and premultiplied alpha": (premultiplied(GRAY, HALF), 8, 1, [(338, "H", [1])], on_white(GRAY, HALF), 2),
    "gray and something": (np.dstack([GRAY, HALF]), 8, 1, [(338, "H", [0])], GRAY, 0),
    "RGB 8": (RGB, 8, 2, (), RGB, 0),
    "RGB 16": (WIDE_RGB, 16, 2, (), RGB, 0),
    "RGB and alpha": (np.dstack([RGB, HALF]), 8, 2, [(338, "H", [2])], on_white(RGB, HALF), 1),
    "RGB and premultiplied alpha": (premultiplied(RGB, HALF), 8, 2, [(338, "H", [1])], on_white(RGB, HALF), 2),
    "RGB and something": (np.dstack([RGB, HALF]), 8, 2, [(338, "H", [0])], RGB, 0),
    "RGB 16 and alpha": (np.dstack([WIDE_RGB, WIDE * 0 + 65535]), 16, 2, [(338, "H", [2])], RGB, 0),
    "palette 4": (FOUR, 4, 3, [(320, "H", (PALETTE[:, :16] * 257).ravel())], COLOURS[:, FOUR].transpose(1, 2, 0), 0),
    "palette 8": (GRAY, 8, 3, [(320, "H", (PALETTE * 257).ravel())], SHOWN, 0),
    "palette written with 8 bits": (GRAY, 8, 3, [(320, "H", PALETTE.ravel())], SHOWN, 0),
    "CMYK": (np.dstack([255 - RGB, 0 * GRAY]), 8, 5, (), RGB, 0),
    "CMYK 16": (np.dstack([65535 - WIDE_RGB, 0 * WIDE]), 16, 5, (), RGB, 0),
    "YCbCr": (np.asarray(Image.fromarray(RGB).convert("YCbCr")), 8, 6, [(530, "H", [1, 1])], RGB, 4),
}  # fmt: skip
UNREADABLE = {("gray 12", ">"), ("gray 16, 0 is white", ">")}
"""What Pillow does not read: refused by name."""


@pytest.mark.parametrize("name", TIFFS)
def test_tiff(name: str) -> None:
    samples, bits, photometric, extra, expected, tolerance = TIFFS[name]
    for order, compression, orientation in itertools.product("<>", (1, 8), UPRIGHT):
        tags = [*extra, (274, "H", [orientation])]
        data = tiff(samples, bits=bits, photometric=photometric, order=order, compression=compression, extra=tags)
        if (name, order) in UNREADABLE:
            with pytest.raises(BadImageError, match=rf"pixel format not supported: .* TIFF of 1 x {bits} bits"):
                decode_full(data)
        else:
            agree(data, UPRIGHT[orientation](expected), tolerance)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [1, 8])
def test_tiff_in_planes(bits: int, compression: int) -> None:
    data = tiff(RGB if bits == 8 else WIDE_RGB, bits=bits, photometric=2, compression=compression, planes=True)
    if bits == 16 and compression == 1:
        with pytest.raises(BadImageError, match=r"RGB TIFF of 3 x 16 bits, in planes without compression"):
            decode_full(data)
    else:
        agree(data, RGB)


PLANES = {
    "gray": (GRAY, 1, GRAY),
    "gray, 0 is white": (255 - GRAY, 0, GRAY),
    "RGB": (RGB, 2, RGB),
    "CMYK": (np.dstack([255 - RGB, 0 * GRAY]), 5, RGB),
    "YCbCr": (np.asarray(Image.fromarray(RGB).convert("YCbCr")), 6, RGB),
    "palette": (GRAY, 3, SHOWN),
}
READ_IN_PLANES = {
    *itertools.product(["RGB"], [None, 0, 1, 2], [8]), ("RGB", None, 1), ("RGB", 2, 1), ("CMYK", None, 1),
    ("CMYK", None, 8), ("CMYK", 0, 8), ("palette", 0, 8), ("gray", 0, 8), ("gray, 0 is white", 0, 8),
    ("YCbCr", None, 8),
}  # fmt: skip
"""(name, kind of a further channel, compression): the others are refused."""


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
@pytest.mark.parametrize("name", PLANES)
def test_tiff_in_planes_with_a_further_channel(name: str, extra: int | None) -> None:
    """Of alpha (1 associated, 2 not) and of what is neither; once gray with alpha had the alpha of another place."""
    samples, photometric, expected = PLANES[name]
    tags = [(530, "H", [1, 1])] if photometric == 6 else []
    tags += [(320, "H", (PALETTE * 257).ravel())] if photometric == 3 else []
    if extra is not None:
        samples = premultiplied(samples, HALF) if extra == 1 else np.dstack([samples, HALF])
        tags.append((338, "H", [extra]))
        expected = on_white(expected, HALF) if extra else expected
    if samples.ndim == 2:
        return  # one plane
    for order, compression in itertools.product("<>", (1, 8)):
        data = tiff(
            samples, bits=8, photometric=photometric, order=order, compression=compression, planes=True, extra=tags
        )
        if (name, extra, compression) in READ_IN_PLANES:
            agree(data, expected, 4 if photometric == 6 else 2 if extra else 0)
            continue
        with pytest.raises(
            BadImageError,
            match=rf"^(damaged, or )?pixel format not supported: .* of {samples.shape[2]} x 8 bits.*; (store|convert)",
        ):
            decode_full(data)


@pytest.mark.parametrize(
    ("samples", "bits", "photometric", "extra", "reason"),
    [
        (GRAY.view(np.int8), 8, 1, [(339, "H", [2])], "MinIsBlack TIFF of 1 x 8 bits, signed"),
        (GRAY.astype(np.int16), 16, 1, [(339, "H", [2])], r"pixel format I \(TIFF\) has no defined white level"),
        (GRAY.astype(np.uint32), 32, 1, [], r"pixel format I \(TIFF\) has no defined white level"),
        (GRAY.astype(np.float32), 32, 1, [(339, "H", [3])], r"pixel format F \(TIFF\) has no defined white level"),
        (GRAY.astype(np.float64), 64, 1, [(339, "H", [3])], "MinIsBlack TIFF of 1 x 64 bits, floating point"),
        (GRAY.astype(np.float16), 16, 1, [(339, "H", [3])], "MinIsBlack TIFF of 1 x 16 bits, floating point"),
        (np.dstack([WIDE, WIDE]), 16, 1, [(338, "H", [2])], "MinIsBlack TIFF of 2 x 16 bits"),
        (RGB, 8, 8, [], r"pixel format LAB \(TIFF\)"),
        (np.dstack([RGB, GRAY]), 8, 5, [(332, "H", [2])], "CMYK TIFF of 4 x 8 bits"),
        (GRAY, 8, 32803, [], "colour filter array TIFF of 1 x 8 bits"),
        (RGB[:11, :15], 8, 6, [(256, "I", [30]), (257, "I", [22])], "YCbCr TIFF of 3 x 8 bits, subsampled without"),
    ],
)
def test_tiffs_without_right_pixels_are_refused_by_name(samples, bits, photometric, extra, reason: str) -> None:
    with pytest.raises(BadImageError, match=rf"{reason}.*convert to 8 or 16 bits"):
        decode_full(tiff(samples, bits=bits, photometric=photometric, extra=extra))


def webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp_animation(size: tuple[int, int], place: tuple[int, int], frame: bytes, *, alpha: bool) -> bytes:
    """A WebP file whose one frame lies at ``place`` (even numbers)."""
    numbers = [place[0] // 2, place[1] // 2, 29, 21, 100]
    header = bytes([2 | alpha << 4, 0, 0, 0]) + b"".join((side - 1).to_bytes(3, "little") for side in size)
    body = b"".join(number.to_bytes(3, "little") for number in numbers) + b"\0" + frame[12:]
    chunks = [(b"VP8X", header), (b"ANIM", b"\x10\x20\x30\xff\0\0"), (b"ANMF", body)]
    whole = b"WEBP" + b"".join(webp_chunk(*chunk) for chunk in chunks)
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


@pytest.mark.parametrize("kind", ["GIF of gray", "GIF", "GIF with a transparent colour", "WebP", "WebP with alpha"])
def test_beside_a_first_frame_that_does_not_cover_the_picture_is_white(kind: str) -> None:
    left, top = 6, 4
    expected = np.full((22 + 8, 30 + 10, 3), 255, np.uint8)
    inside = expected[top : top + 22, left : left + 30]
    if kind.startswith("GIF"):
        stored = Image.fromarray(GRAY, "P")
        stored.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3) if "gray" in kind else COLOURS.T.tobytes())
        inside[:] = np.asarray(stored.convert("RGB"))
        options = {"transparency": int(GRAY[4, 4])} if "transparent" in kind else {}
        if options:
            inside[GRAY[4, 4] == GRAY] = 255
        data = bytearray(encoded(stored, "GIF", optimize=False, **options))
        at = data.index(b"," + struct.pack("<4H", 0, 0, 30, 22))
        data[at + 1 : at + 5] = struct.pack("<2H", left, top)
        data[6:10] = struct.pack("<2H", 40, 30)
    else:
        inside[:] = RGB
        frame = encoded(Image.fromarray(RGB), "WEBP", lossless=True)
        data = webp_animation((40, 30), (left, top), frame, alpha="alpha" in kind)
    agree(bytes(data), expected)


def indexed(alpha: bytes) -> bytes:
    return png_chunk(b"PLTE", COLOURS.T.tobytes()) + png_chunk(b"tRNS", alpha)


KEYED = {
    "gray 1": (GRAY > 99, 1, 0, (1,), (GRAY > 99) * np.uint8(255)),
    "gray 2": (GRAY >> 6, 2, 0, (2,), (GRAY >> 6) * 85),
    "gray 4": (FOUR, 4, 0, (9,), FOUR * 17),
    "gray 8": (GRAY, 8, 0, (int(GRAY[4, 4]),), GRAY),
    "gray 16": (WIDE, 16, 0, (int(WIDE[4, 4]),), GRAY),
    "RGB 8": (RGB, 8, 2, tuple(map(int, RGB[4, 4])), RGB),
    "RGB 16": (WIDE_RGB, 16, 2, tuple(map(int, WIDE_RGB[4, 4])), RGB),
}


@pytest.mark.parametrize("name", KEYED)
def test_png_with_a_transparent_level(name: str) -> None:
    samples, bits, colour, key, plain = KEYED[name]
    expected = plain.copy()
    expected[(samples.reshape(*GRAY.shape, -1) == key).all(axis=2)] = 255
    chunk = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))
    agree(png(samples, bits=bits, colour=colour, extra=chunk), expected)
    agree(png(samples, bits=bits, colour=colour), plain)
    if bits == 16:  # the same high byte and another low one
        other = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *(value ^ 1 for value in key)))
        agree(png(samples, bits=16, colour=colour, extra=other), plain)


def test_png_with_alpha_and_palettes() -> None:
    agree(png(np.dstack([GRAY, HALF]), bits=8, colour=4), on_white(GRAY, HALF), 1)
    agree(png(np.dstack([RGB, HALF]), bits=8, colour=6), on_white(RGB, HALF), 1)
    wide = HALF.astype(np.uint16) * 257
    agree(png(np.dstack([WIDE, wide]), bits=16, colour=4), on_white(GRAY, HALF), 1)
    agree(png(np.dstack([WIDE_RGB, wide]), bits=16, colour=6), on_white(RGB, HALF), 1)
    alpha = bytes(range(256))
    expected = on_white(COLOURS[:, GRAY].transpose(1, 2, 0), np.frombuffer(alpha, np.uint8)[GRAY])
    agree(png(GRAY, bits=8, colour=3, extra=indexed(alpha)), expected, 1)


def portable(magic: str, maximum: int, samples: NDArray[np.generic]) -> bytes:
    head = f"{magic} {samples.shape[1]} {samples.shape[0]} {maximum}\n".encode()
    if magic in ("P2", "P3"):
        return head + b" ".join(b"%d" % value for value in samples.ravel())
    return head + samples.astype(">u2" if maximum > 255 else np.uint8).tobytes()


@pytest.mark.parametrize("maximum", [15, 255, 1023, 4095, 16383, 65535])
def test_portable_maps_keep_their_own_white_level(maximum: int) -> None:
    bits = maximum.bit_length()

    def level(values: NDArray[np.uint8]) -> NDArray[np.generic]:
        return values.astype(np.uint32) << (bits - 8) if bits >= 8 else values >> 4

    def plain(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return values if bits >= 8 else (values >> 4) * 17

    for gray, colour in (("P5", "P6"), ("P2", "P3")):
        agree(portable(gray, maximum, level(GRAY)), plain(GRAY), 1 if gray == "P2" else 0)
        agree(portable(colour, maximum, level(RGB)), plain(RGB), 1)
    with pytest.raises(BadImageError, match="damaged"):
        decode_full(portable("P5", maximum, level(GRAY))[:-3])


def with_exif(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    options = {} if format in ("PNG", "TIFF") else {"quality": 95}
    return encoded(Image.fromarray(RGB), format, exif=exif.tobytes(), **options)


def with_xmp(format: str, orientation: int) -> bytes:
    packet = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    if format == "PNG":
        return png(RGB, bits=8, colour=2, extra=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    options = {"tiffinfo": {700: packet}} if format == "TIFF" else {"xmp": packet, "quality": 95}
    return encoded(Image.fromarray(RGB), format, **options)


EVERYWHERE = [
    *((with_exif, format) for format in ("JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF")),
    *((with_xmp, format) for format in ("JPEG", "PNG", "WEBP", "TIFF")),
]


@pytest.mark.parametrize(("write", "format"), EVERYWHERE)
def test_orientation_in_every_format(write: Callable[[str, int], bytes], format: str) -> None:
    stored = np.asarray(Image.open(io.BytesIO(write(format, 1))).convert("RGB"))
    for orientation, turn in UPRIGHT.items():
        data = write(format, orientation)
        agree(data, turn(stored))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert upright is not None
        agree(data, np.asarray(upright.convert("RGB")))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_scaled_jpeg_is_turned_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels(160, 96)).resize((320, 192))
    opened = open_image(encoded(image, exif=exif))
    (crop,) = decode_crops(opened, [np.array([0, 0, opened.width, opened.height])], [24])
    turned = Image.fromarray(UPRIGHT[orientation](np.asarray(image)))
    expected = np.asarray(turned.resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 4


def test_jpeg_kinds() -> None:
    data = bytearray(encoded(Image.fromarray(RGB)))
    start = data.index(b"\xff\xc0")
    data[start + 4] = 12
    with pytest.raises(BadImageError, match=r"pixel format not supported: JPEG of 3 x 12 bits"):
        decode_full(bytes(data))
    for mode in ("CMYK", "L"):
        data = bytearray(encoded(Image.fromarray(RGB).convert(mode)))
        agree(bytes(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_2000_of_16_bits() -> None:
    agree(encoded(Image.fromarray(WIDE), "JPEG2000", irreversible=False), GRAY)
    agree(encoded(Image.fromarray(RGB), "JPEG2000", irreversible=False), RGB)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("colours", [0, 2, 3, 16, 256])
@pytest.mark.parametrize("kind", ["levels", "identity", "colours"])
def test_bmp_with_a_palette(bits: int, colours: int, kind: str) -> None:
    """Pillow alone reads indices of 4 and 8 bits as pixels of 8 and 1 where the palette is of certain grays."""
    count = min(colours or 1 << bits, 1 << bits)
    levels = np.linspace(0, 255, count).round() if kind == "levels" else np.arange(count)
    palette = COLOURS.T[:count] if kind == "colours" else np.repeat(levels.astype(np.uint8)[:, None], 3, axis=1)
    indices = GRAY.astype(int) % count
    data = bytearray(bmp(indices, bits=bits, palette=palette))
    if not colours:
        data[46:50] = bytes(4)  # as many as there can be
    agree(bytes(data), palette[indices])


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_the_alpha_of_a_bmp_that_is_0_everywhere_is_none(alpha: int) -> None:
    channel = np.full_like(GRAY, alpha)
    data = bmp(np.dstack([RGB[..., ::-1], channel]), bits=32, alpha=True)
    agree(data, on_white(RGB, channel) if alpha else RGB, 1)
    agree(bmp(np.dstack([RGB[..., ::-1], channel]), bits=32), RGB)
