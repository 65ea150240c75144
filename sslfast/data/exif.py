"""The one number of EXIF and XMP that pixels need: the orientation. Nothing else in them is parsed.

Whatever is damaged, truncated or absurd in them counts as "no orientation", and costs no more than a pass over at most
65,535 entries.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

ORIENTATION_TAG = 0x0112
_UNITS = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Type of a TIFF entry -> its struct format, for unsigned integers."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([0-9])")


@dataclass
class Entry:
    """One entry of a TIFF directory."""

    tag: int
    kind: int
    count: int
    position: int
    """Of its 12 or 20 bytes in the file."""
    values: int
    """Position of its values."""


@dataclass
class Directory:
    """The first directory of a TIFF file, or of an EXIF block, which is one."""

    order: str
    """``<`` or ``>``."""
    big: bool
    """BigTIFF: 8-byte offsets."""
    start: int
    """Position of the first entry."""
    count: int

    @property
    def entry_size(self) -> int:
        return 20 if self.big else 12

    def entries(self, data: bytes) -> Iterator[Entry]:
        """The entries that are whole."""
        head, inline = ("HHQ", 8) if self.big else ("HHI", 4)
        for index in range(self.count):
            position = self.start + index * self.entry_size
            if position + self.entry_size > len(data):
                return
            tag, kind, count = struct.unpack_from(self.order + head, data, position)
            place = position + self.entry_size - inline
            if _SIZES.get(kind, 1) * count > inline:
                (place,) = struct.unpack_from(f"{self.order}{'Q' if self.big else 'I'}", data, place)
            yield Entry(tag, kind, count, position, place)

    def integers(self, data: bytes, entry: Entry, most: int = 65_536) -> tuple[int, ...]:
        """The values of an entry of unsigned integers, () where it is of another type, cut off or absurdly long."""
        unit = _UNITS.get(entry.kind)
        if unit is None or not 0 < entry.count <= most:
            return ()
        layout = f"{self.order}{entry.count}{unit}"
        if entry.values + struct.calcsize(layout) > len(data):
            return ()
        return struct.unpack_from(layout, data, entry.values)


def read_directory(data: bytes) -> Directory | None:
    """The first directory of TIFF data; None where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None or len(data) < 8:
        return None
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    except (struct.error, OverflowError):
        return None
    return Directory(order, big, start + (8 if big else 2), count) if count <= 65_535 else None


def exif_orientation(data: bytes) -> int | None:
    """The orientation of an EXIF block, 1 for values that do not exist; None where it states none."""
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    directory = read_directory(data)
    found = None
    if directory is not None:
        for entry in directory.entries(data):
            if entry.tag == ORIENTATION_TAG:
                values = directory.integers(data, entry, most=1)
                found = values[0] if values and 1 <= values[0] <= 8 else 1
    return found


def xmp_orientation(data: bytes) -> int | None:
    """The orientation of an XMP packet; None where it states none."""
    match = _XMP.search(data)
    value = int(match[1]) if match else None
    return value if value is None or 1 <= value <= 8 else 1
