"""The scan of a JPEG's markers: valid files of every kind are whole, misplaced markers are damage."""

import random

import pytest
from PIL import Image

from sslfast.data.images import BadImageError, open_image
from sslfast.data.jpeg import scan_jpeg
from tests.pictures import encoded, picture

PHOTO = picture(320, 240)
SOUND = {
    "plain": {},
    "no subsampling": {"subsampling": 0},
    "half subsampling": {"subsampling": 1},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive with restart markers": {"progressive": True, "restart_marker_rows": 1},
    "comment and profile": {"comment": b"\xff\xd9\xff\xda", "icc_profile": b"\xff\xd8\xff\xc0" * 20000},
}


def entropy_start(data: bytes) -> int:
    """First byte of the first scan's coded data."""
    place = data.index(b"\xff\xda")
    return place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_valid_files_are_whole_and_common(kind: str, mode: str) -> None:
    data = encoded(PHOTO.convert(mode), **SOUND[kind])
    scan = scan_jpeg(data)
    assert (scan.state, scan.end, scan.is_common, scan.precision) == ("whole", len(data), True, 8)
    assert scan.frame == (0xC2 if "progressive" in kind else scan.frame)
    assert len(scan.components) == len(mode)
    open_image(data)


def test_what_decoders_may_disagree_on_is_not_common() -> None:
    assert not scan_jpeg(encoded(PHOTO.convert("CMYK"))).is_common
    rgb = scan_jpeg(encoded(PHOTO, keep_rgb=True))
    assert (rgb.state, rgb.is_common) == ("whole", False)


def test_trailing_bytes_and_second_images_are_left_out() -> None:
    data = encoded(PHOTO)
    for tail in (b"\0" * 100, b"\xff" * 5, b"SEFT trailer", data):
        scan = scan_jpeg(data + tail)
        assert (scan.state, scan.end, scan.is_common) == ("whole", len(data), True)
    two = encoded(PHOTO, "MPO", save_all=True, append_images=[PHOTO])
    assert scan_jpeg(two).state == "whole"


def test_a_truncated_file_or_another_format_is_odd() -> None:
    data = encoded(PHOTO)
    for cut in (0, 1, 2, 3, 20, 200, entropy_start(data), len(data) // 2, len(data) - 1, len(data) - 2):
        assert scan_jpeg(data[:cut]).state == "odd", cut
    assert scan_jpeg(encoded(PHOTO, "PNG")).state == "odd"
    assert scan_jpeg(b"\xff\xd8" + b"\xff" * 100).state == "odd"
    assert scan_jpeg(b"\xff\xd8\xff\xd9").state == "odd"


@pytest.mark.parametrize("marker", [0x01, 0x4F, 0xBF, 0xC0, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xE5, 0xF7, 0xFE])
def test_a_marker_inside_the_pixel_data_is_damage(marker: int) -> None:
    data = bytearray(encoded(PHOTO))
    middle = (entropy_start(bytes(data)) + len(data)) // 2
    data[middle : middle + 2] = bytes((0xFF, marker))
    scan = scan_jpeg(bytes(data))
    assert scan.state == "damaged"
    assert scan.reason.endswith(f"at byte {middle}")
    with pytest.raises(BadImageError, match=r"damaged: .* at byte"):
        open_image(bytes(data))


def test_restart_markers_must_be_in_order() -> None:
    data = bytearray(encoded(PHOTO, restart_marker_blocks=3))
    second = data.index(b"\xff\xd1", entropy_start(bytes(data)))
    data[second + 1] = 0xD3
    assert scan_jpeg(bytes(data)).reason == f"restart marker D3 out of turn at byte {second}"


def test_most_overwritten_blocks_are_detected() -> None:
    """The shares that the module states, of 64 damaged files each."""
    draw = random.Random(0)
    photographs = [picture(900, 700), Image.frombytes("RGB", (96, 96), draw.randbytes(96 * 96 * 3))]
    files = [encoded(image, quality=90) for image in photographs]
    for size, least in ((512, 0.75), (4096, 0.95)):
        noticed = 0
        for key in range(64):
            data = bytearray(files[key % 2])
            start = draw.randrange(entropy_start(bytes(data)), len(data) - size - 2)
            data[start : start + size] = draw.randbytes(size)
            noticed += scan_jpeg(bytes(data)).state == "damaged"
        assert noticed >= least * 64, size
