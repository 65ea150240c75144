"""The policy for every kind of image file: what it decodes to, or why it is rejected."""

import io
import os
import socket
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from sslfast.data.images import (
    MAX_PIXELS,
    ORIENTATION,
    BadImageError,
    decode_full,
    decode_pixels,
    open_image,
    quiet_pillow,
    read_bytes,
    require_strict_pillow,
)
from sslfast.data.listing import identify
from sslfast.data.manifest import Manifest
from sslfast.data.verify import check_images
from tests.pictures import encoded, picture, pixels

RGB = pixels(31, 23)


def same(data: bytes, expected: np.ndarray, tolerance: float = 0) -> None:
    decoded = decode_full(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (*expected.shape[:2], 3)
    assert np.abs(decoded.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_decode_exactly(format: str) -> None:
    same(encoded(Image.fromarray(RGB), format), RGB)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000", "MPO"])
def test_lossy_formats_decode_closely(format: str) -> None:
    options = {} if format == "JPEG2000" else {"quality": 95}
    assert np.abs(decode_full(encoded(Image.fromarray(RGB), format, **options)).astype(int) - RGB).mean() < 6


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grayscale_and_bilevel_become_three_equal_channels(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    same(encoded(image, "PNG"), np.asarray(image.convert("RGB")))


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(RGB).quantize(16)
    same(encoded(image, "PNG"), np.asarray(image.convert("RGB")))


def test_transparency_is_composited_on_white() -> None:
    rgba = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    rgba[:, :10, 3] = 255
    rgba[:, 10:20, 3] = 128
    expected = np.full_like(RGB, 255)
    expected[:, :10] = RGB[:, :10]
    expected[:, 10:20] = np.round(RGB[:, 10:20] * (128 / 255) + 255 * (127 / 255))
    same(encoded(Image.fromarray(rgba), "PNG"), expected, tolerance=1)

    gray = np.dstack([RGB[..., 0], rgba[..., 3]])
    expected_gray = np.full_like(RGB, 255)
    expected_gray[:, :10] = RGB[:, :10, :1]
    decoded = decode_full(encoded(Image.fromarray(gray, "LA"), "PNG"))
    assert np.array_equal(decoded[:, :10], expected_gray[:, :10])
    assert np.array_equal(decoded[:, 20:], expected_gray[:, 20:])


def test_a_transparent_palette_entry_and_a_transparent_colour_become_white() -> None:
    indexed = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (16, 8)), "P")
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    expected = np.tile(np.array([[255, 255, 255], [200, 100, 50]], np.uint8), (16, 8, 1))
    same(encoded(indexed, "PNG", transparency=0), expected)
    same(encoded(indexed, "GIF", transparency=0), expected)

    flat = Image.new("RGB", (16, 16), (10, 20, 30))
    same(encoded(flat, "PNG", transparency=(10, 20, 30)), np.full((16, 16, 3), 255))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_the_high_byte(format: str) -> None:
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    same(encoded(Image.fromarray(values), format), np.repeat((values >> 8)[..., None], 3, axis=2))


def test_16_bit_rgb_keeps_the_high_byte() -> None:
    values = np.linspace(0, 65535, 9 * 8 * 3).astype(">u2").reshape(9, 8, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 8, 9, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    same(png, values >> 8)


def test_cmyk_jpeg_becomes_rgb() -> None:
    cmyk = Image.fromarray(RGB).convert("CMYK")
    decoded = decode_full(encoded(cmyk, "JPEG"))
    assert np.abs(decoded.astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_decode_to_their_first_frame(format: str) -> None:
    first, second = Image.new("RGB", (16, 16), (200, 40, 40)), Image.new("RGB", (16, 16), (0, 0, 250))
    data = encoded(first, format, save_all=True, append_images=[second])
    same(data, np.full((16, 16, 3), (200, 40, 40)), tolerance=3)


@pytest.mark.parametrize("orientation", sorted(ORIENTATION))
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright is not None
    same(data, np.asarray(upright))
    opened = open_image(data)
    assert (opened.width, opened.height) == upright.size


@pytest.mark.parametrize("value", [0, 9, 700])
def test_unknown_orientation_counts_as_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    same(encoded(Image.fromarray(RGB), "PNG", exif=exif), RGB)


def test_damaged_exif_counts_as_upright() -> None:
    data = encoded(Image.fromarray(RGB), "JPEG")
    damaged = data[:2] + b"\xff\xe1" + struct.pack(">H", 14) + b"Exif\0\0\xff\xff\xff\xff\xff\xff" + data[2:]
    with quiet_pillow():
        assert np.array_equal(decode_full(damaged), decode_full(data))


def test_scaled_jpeg_decoding_has_ceiled_sides_and_only_jpeg_has_it() -> None:
    image = picture(101, 77)
    scaled, factor = decode_pixels(open_image(encoded(image)), factor=4)
    assert (scaled.shape, factor) == ((20, 26, 3), 4)
    whole, factor = decode_pixels(open_image(encoded(image, "PNG")), factor=4)
    assert (whole.shape, factor) == ((77, 101, 3), 1)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_rejected(progressive: bool) -> None:
    data = encoded(picture(96, 80), progressive=progressive)
    for kept in [2, 20, 200, *range(300, len(data), 97), len(data) - 2, len(data) - 1]:
        with pytest.raises(BadImageError, match=r"damaged|not an image"):
            decode_full(data[:kept])


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_other_formats_cut_in_half_are_rejected(format: str) -> None:
    data = encoded(picture(96, 80), format)
    with pytest.raises(BadImageError, match=r"damaged|not an image"):
        decode_full(data[: len(data) // 2])


def test_a_png_with_a_flipped_bit_is_rejected() -> None:
    data = bytearray(encoded(picture(96, 80), "PNG"))
    data[len(data) // 2] ^= 4
    with pytest.raises(BadImageError, match="damaged"):
        decode_full(bytes(data))


def test_a_zero_filled_tail_is_rejected() -> None:
    data = encoded(picture(96, 80))
    with pytest.raises(BadImageError, match="damaged"):
        decode_full(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match=f"too small: {size[0]} x {size[1]}, smallest side is 8"):
        open_image(encoded(picture(*size), "PNG"))


def bomb(width: int, height: int) -> bytes:
    """A PNG header that promises far more pixels than the file has."""
    data = bytearray(encoded(picture(8, 8), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_rejected_without_a_warning(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet_pillow(), pytest.raises(BadImageError, match=rf"too large: .*{MAX_PIXELS}"):
            open_image(bomb(side, side))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pixels_without_a_white_level_are_rejected(mode: str) -> None:
    image = Image.new(mode, (16, 16))
    with pytest.raises(BadImageError, match=f"pixel format {mode} .*convert to 8 or 16 bits"):
        decode_full(encoded(image, "TIFF"))


@pytest.mark.parametrize("data", [b"text, renamed\n" * 50, b"\0" * 4096, b"%PDF-1.7 " * 30, b"%!PS-Adobe-3.0 EPSF\n"])
def test_other_files_are_not_images(data: bytes) -> None:
    with pytest.raises(BadImageError, match="not an image"):
        open_image(data)


def test_unreadable_and_empty_files(tmp_path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadImageError, match="empty file"):
        read_bytes(tmp_path / "empty.jpg")
    with pytest.raises(BadImageError, match="unreadable: No such file"):
        read_bytes(tmp_path / "gone.jpg")


def test_a_lenient_pillow_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    require_strict_pillow()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is True"):
        require_strict_pillow()


@settings(max_examples=100, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"]),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_decode_or_raise_the_one_error(format: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(picture(24, 20), format))
    for place, value in damage:
        data[int(place * len(data))] = value
    with quiet_pillow():
        try:
            shape, reason = decode_full(bytes(data)).shape, "good"
        except BadImageError as error:
            shape, reason = (1, 1, 3), error.reason
    assert shape[2] == 3
    assert reason
    assert "\n" not in reason


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "socket", "process memory", "a terabyte of nothing"])
def test_only_regular_files_of_bounded_size_are_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif what == "process memory":
        path.symlink_to("/proc/self/mem")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    start = time.perf_counter()
    with pytest.raises(BadImageError, match=r"^(unreadable|empty file|too large: a file of 1,099,511,627,776 bytes)"):
        read_bytes(path)
    for header in (True, False):
        assert isinstance(identify(str(path), read=header, header=header), str) or what == "process memory"
    assert time.perf_counter() - start < 1


def test_a_file_that_becomes_a_device_after_the_scan_is_bad(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture(), "PNG"))
    manifest = Manifest.scan(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to("/dev/zero")
    assert check_images(manifest, workers=0) == [("b.png", "unreadable: not a regular file")]
