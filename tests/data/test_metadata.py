"""Metadata that no pixel needs never makes a picture bad, turns it, or costs more than its bytes."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sslfast.data.exif import exif_orientation, xmp_orientation
from sslfast.data.images import BadImageError, decode_full, open_header
from sslfast.data.jpeg import scan_jpeg
from tests.pictures import UPRIGHT, encoded, jpeg_segment, picture, pixels, png, png_chunk, tiff

RGB = pixels(30, 22)
GRAY = RGB[..., 0]
PNG = png(RGB, bits=8, colour=2)
JPEG = encoded(Image.fromarray(RGB))
BOMB = zlib.compress(bytes(1 << 24))


def exif(orientation: int, order: str = "<", kind: int = 3, count: int = 1, tail: bytes = b"") -> bytes:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", orientation).ljust(4, b"\0")
    return magic + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, count) + value + bytes(4) + tail


CHUNKS = {
    "text that unpacks to 16 MiB": png_chunk(b"zTXt", b"a\0\0" + BOMB),
    "international text that does": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "raw profile that does": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "raw profile that is none": png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nxyz"),
    "profile that does": png_chunk(b"iCCP", b"a\0\0" + BOMB),
    "profile without a name": png_chunk(b"iCCP", b""),
    "profile of an unknown method": png_chunk(b"iCCP", b"a\0\7abc"),
    "many texts": png_chunk(b"tEXt", b"a\0" + b"x" * 50) * 5000,
    "wrong checksum": png_chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "wrong checksum of EXIF": png_chunk(b"eXIf", exif(6))[:-1] + b"?",
    "short gamma": png_chunk(b"gAMA", b"1"),
    "short chromaticity": png_chunk(b"cHRM", b"1"),
    "short size": png_chunk(b"pHYs", b""),
    "short intent": png_chunk(b"sRGB", b""),
    "short animation": png_chunk(b"acTL", b""),
    "animation of no frame": png_chunk(b"acTL", bytes(8)),
    "short frame": png_chunk(b"fcTL", b""),
    "frame outside": png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 9, 90, 90, 90, 90, 0, 0, 0, 0)),
    "unknown": png_chunk(b"prVt", b"x" * 1000),
    "EXIF that is none": png_chunk(b"eXIf", b"nonsense"),
    "empty EXIF": png_chunk(b"eXIf", b""),
    "EXIF that points away": png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "EXIF with a directory cut off": png_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "empty significant bits": png_chunk(b"sBIT", b""),
    "empty histogram": png_chunk(b"hIST", b""),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_png_chunks(name: str) -> None:
    chunk, start = CHUNKS[name], time.perf_counter()
    for data in (PNG[:33] + chunk + PNG[33:], PNG[:-12] + chunk + PNG[-12:]):
        assert np.array_equal(decode_full(data), RGB)
        open_header(io.BytesIO(data))
    assert time.perf_counter() - start < 2


SEGMENTS = {
    "long EXIF in many segments": jpeg_segment(0xE1, b"Exif\0\0" + b"x" * 60000) * 300,
    "many comments": jpeg_segment(0xFE, b"") * 20000,
    "short JFIF": jpeg_segment(0xE0, b"JFIF\0"),
    "thumbnail that is none": jpeg_segment(0xE0, b"JFXX\0\x10\xff\xd8\xff"),
    "short Adobe": jpeg_segment(0xEE, b"Adobe"),
    "index of pictures that is none": jpeg_segment(0xE2, b"MPF\0" + b"x" * 50),
    "index of pictures cut off": jpeg_segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "profile without a number": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "profile in part": jpeg_segment(0xE2, b"ICC_PROFILE\0\3\7abc"),
    "Photoshop block cut off": jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\1x"),
    "EXIF that is none": jpeg_segment(0xE1, b"Exif\0\0nonsense"),
    "EXIF whose thumbnail points to itself": jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "EXIF with an absurd count": jpeg_segment(0xE1, b"Exif\0\0" + exif(6, count=2**32 - 1)),
    "XMP that is none": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xff"),
    "bytes between segments": b"\0\1\2",
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_jpeg_segments(name: str) -> None:
    data, start = JPEG[:2] + SEGMENTS[name] + JPEG[2:], time.perf_counter()
    assert np.array_equal(decode_full(data), decode_full(JPEG))
    open_header(io.BytesIO(data))
    assert time.perf_counter() - start < 2


def test_absurdly_many_segments_and_scans_are_refused() -> None:
    with pytest.raises(BadImageError, match="more than 100000 metadata segments"):
        decode_full(JPEG[:2] + jpeg_segment(0xFE, b"") * 100_001 + JPEG[2:])
    data = encoded(picture(64, 64), progressive=True)
    last = data.rindex(b"\xff\xda")
    assert scan_jpeg(data[:last] + data[last:-2] * 490 + b"\xff\xd9").state == "whole"
    with pytest.raises(BadImageError, match="more than 500 scans"):
        decode_full(data[:last] + data[last:-2] * 500 + b"\xff\xd9")


TAGS = {
    "resolution in centimetres, of two values": [(296, "H", [3]), (282, "I", [1, 2]), (283, "B", [1, 2, 3])],
    "XMP of the wrong type": [(700, "H", [1, 2, 3, 4])],
    "profile of the wrong type": [(34675, "I", [1, 2, 3])],
    "profile": [(34675, "B", [7] * 70000)],
    "EXIF that points away": [(34665, "I", [2**32 - 1]), (34853, "I", [2**31])],
    "further directories that point to this one": [(330, "I", [8, 8, 8])],
    "orientation that does not exist": [(274, "H", [77])],
    "orientation of two values": [(274, "H", [6, 6])],
    "unknown": [(65000, "I", [1] * 500), (65001, "B", [])],
}


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("compression", [1, 8])
def test_tiff_tags(name: str, compression: int) -> None:
    data = tiff(GRAY, bits=8, photometric=1, compression=compression, extra=TAGS[name])
    assert np.array_equal(decode_full(data)[..., 0], GRAY)
    open_header(io.BytesIO(data))


def test_further_directories_of_a_tiff_are_not_read() -> None:
    data = bytearray(tiff(GRAY, bits=8, photometric=1))
    (count,) = struct.unpack_from("<H", data, 8)
    for target in (8, 2**32 - 1, 10):  # itself, nowhere, nonsense
        struct.pack_into("<I", data, 10 + 12 * count, target)
        assert np.array_equal(decode_full(bytes(data))[..., 0], GRAY)


def test_a_tile_that_is_larger_than_any_image_is_refused() -> None:
    tiles = [(322, "I", [60000]), (323, "I", [60000]), (324, "I", [8]), (325, "I", [100])]
    with pytest.raises(BadImageError, match="too large: tiles of 60000 x 60000 pixels"):
        decode_full(tiff(GRAY, bits=8, photometric=1, compression=8, extra=tiles))


def test_avif_with_damaged_exif() -> None:
    block = Image.Exif()
    block[0x010F], block[0x0112] = "maker", 6
    data = encoded(Image.fromarray(RGB), "AVIF", exif=block.tobytes())
    place = data.index(b"maker")
    start = max(data.rfind(magic, 0, place) for magic in (b"II*\0", b"MM\0*"))
    damaged = data[:start] + b"??" + data[start + 2 :]
    assert np.array_equal(decode_full(damaged), decode_full(data))
    assert decode_full(damaged).shape == (30, 22, 3)
    open_header(io.BytesIO(damaged))


def test_jpeg_2000_with_damaged_resolution_and_a_hidden_size() -> None:
    data = encoded(Image.fromarray(RGB), "JPEG2000", irreversible=False)
    place = data.index(b"jp2h")
    (length,) = struct.unpack_from(">I", data, place - 4)
    end = place - 4 + length
    box = struct.pack(">I4sI4sH", 18, b"res ", 10, b"resc", 1)
    damaged = data[: place - 4] + struct.pack(">I", length + len(box)) + data[place:end] + box + data[end:]
    assert np.array_equal(decode_full(damaged), RGB)
    size = data.index(b"\xff\x4f\xff\x51") + 8
    with pytest.raises(BadImageError, match="too large: 60000 x 60000"):
        decode_full(data[:size] + struct.pack(">II", 60000, 60000) + data[size + 8 :])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_is_read_from_any_valid_block(order: str, kind: int) -> None:
    for orientation, turn in UPRIGHT.items():
        block = exif(orientation, order, kind, tail=b"x" * 100)
        assert exif_orientation(block) == exif_orientation(b"Exif\0\0Exif\0\0" + block) == orientation
        expected = turn(RGB)
        assert np.array_equal(decode_full(PNG[:33] + png_chunk(b"eXIf", block) + PNG[33:]), expected)
        assert np.array_equal(decode_full(PNG[:-12] + png_chunk(b"eXIf", block) + PNG[-12:]), expected)
        raw = b"Raw profile type exif\0\nexif\n  10\n" + (b"Exif\0\0" + block).hex().encode() + b"\n"
        assert np.array_equal(decode_full(PNG[:33] + png_chunk(b"tEXt", raw) + PNG[33:]), expected)


@pytest.mark.parametrize("cut", range(27))
def test_an_orientation_that_is_cut_off_counts_as_none(cut: int) -> None:
    block = exif(6)[:cut]
    assert exif_orientation(block) == (6 if cut >= 22 else None)


def test_orientation_of_xmp() -> None:
    assert xmp_orientation(b'<a tiff:Orientation="8"/>') == xmp_orientation(b"<tiff:Orientation>8</x>") == 8
    assert xmp_orientation(b"tiff:Orientation='9'") == 1
    assert xmp_orientation(b"nothing") is None
