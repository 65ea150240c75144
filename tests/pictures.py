"""Small pictures for tests: smooth enough to compare after JPEG, different for every key."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(width: int, height: int, key: int = 0) -> NDArray[np.uint8]:
    """``[height, width, 3]`` colour waves."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [127.5 + 60 * np.sin(x / (7 + key % 5 + c)) + 60 * np.cos(y / (9 + key % 7 - c) + key) for c in range(3)]
    return np.stack(channels, axis=-1).round().clip(0, 255).astype(np.uint8)


def picture(width: int = 48, height: int = 40, key: int = 0) -> Image.Image:
    return Image.fromarray(pixels(width, height, key))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""Orientation -> what it does to a stored picture (TIFF 6.0, tag 274)."""


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(samples: NDArray[Any], *, bits: int, colour: int, extra: bytes = b"") -> bytes:
    """A PNG file of samples ``[H, W]`` or ``[H, W, C]`` as they are; ``extra``: chunks before the pixels."""
    height, width = samples.shape[:2]
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    elif bits == 8:
        rows = [row.astype(np.uint8).tobytes() for row in samples]
    else:
        rows = [packed(row, bits) for row in samples]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
            extra,
            png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            png_chunk(b"IEND", b""),
        ]
    )


def packed(row: NDArray[Any], bits: int) -> bytes:
    """Samples in the fewest bytes, high bits first."""
    text = "".join(f"{int(value):0{bits}b}" for value in row.ravel())
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


Tag = tuple[int, str, Sequence[int]]
"""Number, struct format of one value, values."""
_TIFF_TYPES = {"B": 1, "H": 3, "I": 4, "b": 6}


def tiff(
    samples: NDArray[Any],
    *,
    bits: int,
    photometric: int,
    order: str = "<",
    compression: int = 1,
    planes: bool = False,
    extra: Sequence[Tag] = (),
) -> bytes:
    """A TIFF file of samples ``[H, W]`` or ``[H, W, C]`` as they are; compression 1 none, 8 deflate."""
    height, width = samples.shape[:2]
    channels = samples[..., None] if samples.ndim == 2 else samples
    parts = [channels[..., c] for c in range(channels.shape[2])] if planes else [channels]
    if bits in (8, 16, 32, 64):
        strips = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    else:
        strips = [b"".join(packed(row, bits) for row in part) for part in parts]
    strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    count = channels.shape[2]
    tags: list[Tag] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [bits] * count),
        (259, "H", [compression]),
        (262, "H", [photometric]),
        (273, "I", [0] * len(strips)),
        (277, "H", [count]),
        (278, "I", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planes else 1]),
    ]
    tags = sorted({tag[0]: tag for tag in [*tags, *extra]}.values(), key=lambda tag: tag[0])
    place = 8 + 2 + 12 * len(tags) + 4
    values_at = place
    sizes = {tag: struct.calcsize(f"{order}{len(values)}{kind}") for tag, kind, values in tags}
    place += sum(size for size in sizes.values() if size > 4)
    starts = [place + sum(map(len, strips[:index])) for index in range(len(strips))]
    table, blob = b"", b""
    for tag, kind, values in tags:
        raw = struct.pack(f"{order}{len(values)}{kind}", *(starts if tag == 273 else values))
        table += struct.pack(f"{order}HHI", tag, _TIFF_TYPES[kind], len(values))
        table += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(f"{order}I", values_at + len(blob))
        blob += raw if len(raw) > 4 else b""
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return b"".join([magic, table, bytes(4), blob, *strips])


def bmp(samples: NDArray[Any], *, bits: int, palette: NDArray[Any] | None = None, alpha: bool = False) -> bytes:
    """A BMP file of samples ``[H, W]`` or ``[H, W, C]`` as they are, with a palette ``[N, 3]``, or masks of four
    channels in a header of 108 bytes."""
    rows = [packed(row, bits) if bits < 8 else row.astype(np.uint8).tobytes() for row in samples[::-1]]
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    colours = np.zeros((0, 3), np.uint8) if palette is None else palette
    table = b"".join(bytes([*map(int, colour[::-1]), 0]) for colour in colours)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000).ljust(68, b"\0") if alpha else b""
    height, width = samples.shape[:2]
    facts = (40 + len(masks), width, height, 1, bits, 3 if alpha else 0, len(body), 0, 0, len(colours), 0)
    head = struct.pack("<IiiHHIIiiII", *facts) + masks + table
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def write_folder(root: Path, names: list[str], *, width: int = 48, height: int = 40) -> Path:
    """One different JPEG per name."""
    for key, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(width + key % 3, height + key % 4, key)))
    return root
