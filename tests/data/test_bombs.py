"""Small files that ask for much time or memory, in every format: one short error, or the pixels, at a bounded cost.

All are decoded in one child process, which reports what became of each, the seconds, and how far its memory grew.
"""

import io
import json
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslfast.data.images import FORMATS, MAX_PIXELS, BadImageError, decode_full, open_header, quiet_pillow
from tests.pictures import encoded, picture, png_chunk

SECONDS, MEGABYTES = 20.0, 400  # of the slowest machines; the files take 0.1 s and some MB
HUGE = 1 << 30


def patched(data: bytes, at: int, new: bytes) -> bytes:
    assert at >= 0
    return data[:at] + new + data[at + len(new) :]


def huge_jpeg() -> bytes:
    data = encoded(picture())
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500))


def huge_png() -> bytes:
    data = encoded(picture(), "PNG")
    body = b"IHDR" + struct.pack(">II", HUGE, HUGE) + data[24:29]
    return data[:12] + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def huge_webp() -> bytes:
    size = ((1 << 24) - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size + encoded(picture(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def huge_bmp() -> bytes:
    return patched(encoded(picture(), "BMP"), 18, struct.pack("<ii", HUGE, HUGE))


def tiff(entries: list[tuple[int, str, int]], strip: bytes = b"", following: int = 0) -> bytes:
    """One directory with single values; the strip follows it."""
    start = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries = sorted([*entries, (273, "I", start), (279, "I", len(strip))])
    kinds = {"H": 3, "I": 4}
    rows = [
        struct.pack("<HHI" + kind + ("xx" if kind == "H" else ""), tag, kinds[kind], 1, v) for tag, kind, v in entries
    ]
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(rows) + struct.pack("<I", following) + strip


def gray_tiff(width: int, height: int, compression: int, strip: bytes, following: int = 0) -> bytes:
    shape = [(256, "I", width), (257, "I", height), (258, "H", 8), (259, "H", compression), (262, "H", 1)]
    return tiff([*shape, (277, "H", 1), (278, "I", height)], strip, following)


def many_directories() -> bytes:
    """A chain of 20,000, the last of which begins it again."""
    first = gray_tiff(16, 16, 1, bytes(256))
    count, size = 20_000, 2 + 12 + 4
    start = len(first)
    chain = b"".join(
        struct.pack("<HHHIII", 1, 256, 4, 1, 16, start + size * (k + 1) if k + 1 < count else 8) for k in range(count)
    )
    return gray_tiff(16, 16, 1, bytes(256), start) + chain


def huge_jpeg_2000() -> bytes:
    data = encoded(picture(), "JPEG2000")
    at = data.index(b"ihdr") + 4
    data = patched(data, at, struct.pack(">II", HUGE, HUGE))
    return patched(data, data.index(b"\xff\x51") + 6, struct.pack(">II", HUGE, HUGE))


def huge_avif() -> bytes:
    data = encoded(picture(), "AVIF")
    return patched(data, data.index(b"ispe") + 8, struct.pack(">II", HUGE, HUGE))


def many_frames(format: str, count: int) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((16, 16), k % 255, np.uint8)) for k in range(count)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes 2,000 times."""
    data = encoded(picture(256, 256), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 2000 + data[-2:]


def segments(marker: bytes, body: bytes, count: int) -> bytes:
    data = encoded(picture())
    return data[:2] + (marker + struct.pack(">H", len(body) + 2) + body) * count + data[2:]


def png_with(*chunks: bytes) -> bytes:
    data = encoded(picture(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def longer_pixels() -> bytes:
    """The pixel data of 16 x 16 gray levels unpacks to 256 MiB."""
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 28), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


TEXT = zlib.compress(bytes(1 << 28), 9)  # 256 MiB
BOMBS: dict[str, Callable[[], bytes]] = {
    "JPEG of 4 gigapixels": huge_jpeg,
    "JPEG with 20,000 EXIF segments": lambda: segments(b"\xff\xe1", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", 20_000),
    "JPEG with 3,000 parts of a profile": lambda: segments(b"\xff\xe2", b"ICC_PROFILE\0\1\xff" + bytes(5000), 3000),
    "JPEG with 100,000 comments": lambda: segments(b"\xff\xfe", b"x", 100_000),
    "JPEG with 2,000 scans": many_scans,
    "PNG of an exapixel": huge_png,
    "PNG text": lambda: png_with(png_chunk(b"zTXt", b"a\0\0" + TEXT)),
    "PNG international text": lambda: png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TEXT)),
    "PNG profile": lambda: png_with(png_chunk(b"iCCP", b"a\0\0" + TEXT)),
    "PNG with 200,000 chunks": lambda: png_with(*[png_chunk(b"tEXt", b"a\0b")] * 200_000),
    "PNG whose data unpack to 256 MiB": longer_pixels,
    "PNG of 5,000 frames": lambda: many_frames("PNG", 5000),
    "GIF of 4 gigapixels": lambda: patched(encoded(picture(), "GIF"), 6, struct.pack("<HH", 65535, 65535)),
    "GIF of 5,000 frames": lambda: many_frames("GIF", 5000),
    "BMP of an exapixel": huge_bmp,
    "BMP of negative size": lambda: patched(encoded(picture(), "BMP"), 18, struct.pack("<ii", HUGE, -HUGE)),
    "WebP of 281 terapixels": huge_webp,
    "WebP of 500 frames": lambda: many_frames("WEBP", 500),
    "TIFF of an exapixel": lambda: gray_tiff(HUGE, HUGE, 8, zlib.compress(bytes(99))),
    "TIFF strip of 256 MiB": lambda: gray_tiff(64, 64, 8, TEXT),
    "TIFF with one row more than memory": lambda: gray_tiff((1 << 32) - 1, 1, 8, TEXT),
    "TIFF of 20,000 directories in a circle": many_directories,
    "TIFF with a tag of 4 billion values": lambda: patched(
        gray_tiff(16, 16, 1, bytes(256)), 8 + 2 + 12 * 2 + 4, struct.pack("<II", (1 << 32) - 1, 8)
    ),
    "PPM of a quadrillion pixels": lambda: b"P6 99999999 99999999 255\n" + bytes(99),
    "PPM with a header of digits": lambda: b"P6 " + b"9" * (1 << 20),
    "PBM plain with a comment of 64 MiB": lambda: b"P1\n#" + b"x" * (1 << 26),
    "JPEG 2000 of an exapixel": huge_jpeg_2000,
    **(
        {"AVIF of an exapixel": huge_avif, "AVIF of 50 frames": lambda: many_frames("AVIF", 50)}
        if "AVIF" in FORMATS
        else {}
    ),
    "ICO of 65,535 pictures": lambda: b"\0\0\1\0\xff\xff" + bytes(16) * 65535,
    "PSD of 90 gigapixels": lambda: (
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3) + bytes(99)
    ),
}
DECODED = (
    *("segments", "parts", "comments", "frames", "text", "profile", "chunks"),
    "directories",
)
"""Words in the names of those that a decoder has to read."""


def child() -> None:
    for name, make in BOMBS.items():
        data = make()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        outcome = ""
        with quiet_pillow():
            for read in (lambda data: open_header(io.BytesIO(data)), decode_full):
                try:
                    read(data)
                except BadImageError as error:
                    outcome = error.reason
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([name, outcome, seconds, (after - before) / 1024]), flush=True)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, float, float]]:
    command = [sys.executable, "-m", "tests.data.test_bombs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    found = {
        name: (outcome, seconds, grown) for name, outcome, seconds, grown in map(json.loads, done.stdout.splitlines())
    }
    assert done.returncode == 0, f"ended with {done.returncode} after {list(found)[-1:]}\n{done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(outcomes: dict[str, tuple[str, float, float]], name: str) -> None:
    outcome, seconds, grown = outcomes[name]
    assert seconds < SECONDS
    assert grown < MEGABYTES
    assert len(outcome) < 200
    assert "\n" not in outcome
    if any(word in name for word in DECODED):
        assert outcome == ""
    if "pixel" in name:
        assert outcome.startswith(("too large: ", "damaged", "not an image"))


def test_the_limit_of_pixels_is_a_bound_on_memory() -> None:
    assert MAX_PIXELS * 3 < 300 << 20


if __name__ == "__main__":
    child()
