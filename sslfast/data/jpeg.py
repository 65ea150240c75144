"""A scan of a JPEG file's markers: its properties, and damage that is visible without decoding.

JPEG has no checksum. Decoders fill what they cannot read with grey or with shifted pixels and report success, so the
only cheap signs of damage are markers in positions where none can be (ITU-T T.81, annex B).

Detected: reserved, frame and start markers inside the entropy-coded data, restart markers that are out of order or were
not announced, tables or scans after a sequential image is complete, an end marker before the end. When n bytes are
overwritten at random, a share of about ``1 - (1 - 1/256)**n`` is detected: 86% of damaged sectors of 512 bytes, all of
4 KiB. Not detected: single flipped bits, blocks of zeros, and everything else that looks like coded data.
"""

import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sslfast.data.exif import exif_orientation, xmp_orientation
from sslfast.ops import crops

_SOI, _EOI, _SOS, _DRI, _APP0, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE
_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_SEQUENTIAL_HUFFMAN, _PROGRESSIVE_HUFFMAN = (0xC0, 0xC1), 0xC2
_BEFORE_A_SCAN = frozenset({0xC4, 0xCC, _SOS, 0xDB, _DRI})  # tables and the scan itself
_APPLICATIONS = frozenset({0xFE, *range(0xE0, 0xF0)})  # and comments
_ANYWHERE = _APPLICATIONS | {0xDC}  # and the number of lines
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_EXIF_SEGMENTS = 16  # a directory is at the start of its block
_MOST_SEGMENTS = 100_000  # a profile of 16 MiB has 255
_MOST_SCANS = 500  # libjpeg-turbo's advice; every scan costs a pass over the whole image


@dataclass
class JpegScan:
    """Result of :func:`scan_jpeg`."""

    state: Literal["whole", "odd", "damaged"] = "odd"
    """whole: all markers up to the end marker are valid. odd: the scan did not get that far; only a decoder can tell.
    damaged: a marker is where none can be."""
    reason: str = ""
    """Why it is damaged, in a few words."""
    end: int = 0
    """Number of bytes including the end marker, if the file is whole."""
    frame: int = 0
    """Low byte of the frame marker: 0xC0 and 0xC1 sequential, 0xC2 progressive, others rare."""
    precision: int = 0
    width: int = 0
    height: int = 0
    """As stored; 0 where the height comes after the first scan."""
    components: list[int] = field(default_factory=list)
    """Identifiers of the colour components."""
    jfif: bool = False
    adobe: int | None = None
    """Colour transform of Adobe's marker: 0 none, 1 YCbCr, 2 YCCK."""
    orientation: int = 1
    """That EXIF, or else XMP, states."""
    several: bool = False
    """Whether an index of further pictures (MPO) is present."""
    junk: bool = False
    """Whether there are bytes between two segments, which decoders skip."""
    unneeded: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of the segments before the first scan that no pixel depends on: comments, profiles, thumbnails."""

    @property
    def is_common(self) -> bool:
        """Whole, Huffman-coded, 8 bits, and unambiguously grayscale or YCbCr: every decoder treats it alike."""
        colour = (self.jfif or self.components == [1, 2, 3]) and self.adobe in (None, 1)
        return (
            self.state == "whole"
            and not self.junk
            and self.frame in (*_SEQUENTIAL_HUFFMAN, _PROGRESSIVE_HUFFMAN)
            and self.precision == 8
            and self.height > 0
            and (len(self.components) == 1 or (len(self.components) == 3 and colour))
        )


def scan_jpeg(data: bytes, *, header: bool = False) -> JpegScan:
    """Scan the markers of a JPEG file; tens of microseconds for a photograph of ImageNet's size.

    Args:
        data: the file.
        header: stop at the first scan.
    """
    scan, metadata = JpegScan(), _Metadata()
    with suppress(IndexError, struct.error):  # truncated: odd
        _walk(data, scan, metadata, header)
    scan.orientation = metadata.orientation()
    return scan


@dataclass
class _Metadata:
    """EXIF and XMP of the segments."""

    exif: list[bytes] = field(default_factory=list)
    xmp: bytes = b""

    def add(self, segment: bytes) -> None:
        if segment.startswith(b"Exif\0\0") and len(self.exif) < _EXIF_SEGMENTS:
            self.exif.append(segment if not self.exif else segment[6:])
        elif segment.startswith(_XMP):
            self.xmp = segment[len(_XMP) :]

    def orientation(self) -> int:
        value = exif_orientation(b"".join(self.exif)) if self.exif else None
        if value is None and self.xmp:
            value = xmp_orientation(self.xmp)
        return value or 1


def _walk(data: bytes, scan: JpegScan, metadata: _Metadata, header: bool) -> None:
    if data[:2] != b"\xff\xd8":
        return
    position, interval, scanned, scans, kind, start = 2, 0, 0, 0, _SOI, 0
    markers: _EntropyMarkers | None = None
    while True:
        if not scanned and position < len(data) and data[position] != 0xFF:
            after, scan.junk = data.find(b"\xff", position), True
            if after < 0:
                return
            scan.unneeded.append((position, after))
            position = after
        if position >= len(data) or data[position] != 0xFF:
            if scanned:  # no marker follows the segment, so it is not a segment
                scan.state, scan.reason = "damaged", f"marker {kind:02X} inside the pixel data at byte {start}"
            return
        while data[position] == 0xFF:  # any number of fill bytes
            position += 1
        kind = data[position]
        start = position - 1
        position += 1
        if kind == 0 and not scanned:
            scan.junk = True
            continue
        if kind == _EOI:
            if scanned and data.endswith(_END) and data.find(_START, position) < 0 and position < len(data):
                scan.state, scan.reason = "damaged", f"end marker inside the pixel data at byte {start}"
            elif scanned:
                scan.state, scan.end = "whole", position
            return
        if scanned and (
            kind not in _ANYWHERE
            and (kind not in _BEFORE_A_SCAN or (scan.frame in _SEQUENTIAL_HUFFMAN and scanned >= len(scan.components)))
        ):
            scan.state, scan.reason = "damaged", f"marker {kind:02X} inside the pixel data at byte {start}"
            return
        (length,) = struct.unpack_from(">H", data, position)
        end = position + length
        if kind in _FRAMES:
            scan.frame = kind
            scan.precision, scan.height, scan.width, count = struct.unpack_from(">BHHB", data, position + 2)
            scan.components = [data[position + 8 + 3 * index] for index in range(count)]
        elif kind == _APP0 and length >= 16 and data[position + 2 : position + 7] == b"JFIF\0":
            scan.jfif = True
        elif kind == _APP14 and length >= 14 and data[position + 2 : position + 7] == b"Adobe":
            scan.adobe = data[position + 13]
        elif kind in _APPLICATIONS and not scanned:
            if len(scan.unneeded) == _MOST_SEGMENTS:
                scan.state, scan.reason = "damaged", f"more than {_MOST_SEGMENTS} metadata segments"
                return
            scan.unneeded.append((start, end))
            if kind == _APP1:
                metadata.add(data[position + 2 : end])
            elif kind == _APP2 and data[position + 2 : position + 6] == b"MPF\0":
                scan.several = True
        elif kind == _DRI:
            (interval,) = struct.unpack_from(">H", data, position + 2)
        position = end
        if kind == _SOS:
            if header:
                return
            scans += 1
            if scans > _MOST_SCANS:
                scan.state, scan.reason = "damaged", f"more than {_MOST_SCANS} scans"
                return
            scanned += data[start + 4]
            markers = _EntropyMarkers(data) if markers is None else markers
            position, reason = markers.skip(end, interval)
            if reason:
                scan.state, scan.reason = "damaged", reason
                return
            if position < 0:
                return


class _EntropyMarkers:
    """Positions where 0xFF is followed by something else than the zero byte that coded data has there."""

    def __init__(self, data: bytes) -> None:
        if found := crops.find_markers(data):
            self.positions, self.kinds = (part.numpy() for part in found)
            return
        array = np.frombuffer(data, dtype=np.uint8)
        positions = np.flatnonzero(array[:-1] == 0xFF)
        kinds = array[positions + 1]
        is_marker = (kinds != 0) & (kinds != 0xFF)
        self.positions, self.kinds = positions[is_marker], kinds[is_marker]

    def skip(self, start: int, interval: int) -> tuple[int, str]:
        """The first marker at or after ``start`` that ends the coded data (-1: none), and what is wrong before it."""
        first = int(np.searchsorted(self.positions, start))
        kinds = self.kinds[first:]
        others = np.flatnonzero((kinds < 0xD0) | (kinds > 0xD7))
        count = int(others[0]) if len(others) else len(kinds)
        if count:
            restarts = kinds[:count]
            wrong = np.flatnonzero(restarts != 0xD0 + np.arange(count) % 8) if interval else np.zeros(1, np.int64)
            if len(wrong):
                at = first + int(wrong[0])
                return -1, f"restart marker {self.kinds[at]:02X} out of turn at byte {self.positions[at]}"
        return (int(self.positions[first + count]) if len(others) else -1), ""
