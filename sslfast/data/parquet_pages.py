"""One page of a Parquet column of bytes: what a value costs that is read alone, in place of its row group.

pyarrow reads whole row groups. Here the page headers of a column chunk are read once, and then the page that holds a
row. Writers put a whole row group of images into one page (the dictionary of 100 rows, which is what ``datasets``
writes, has no limit below 1,024 rows), so of a large page only the places of the values are kept, and a value costs
the parts of 64 KiB that it lies in: Snappy compresses each of them alone.

Flat columns of BYTE_ARRAY are read, plain and dictionary encoded, data pages of both versions, with every codec that
pyarrow has; for anything else the functions return None, and the row group is read. The format: Apache Parquet,
https://github.com/apache/parquet-format (Encodings.md, parquet.thrift).
"""

import os
import struct
import threading
from collections import OrderedDict
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_HEADER = 1 << 14
"""Bytes that are read for a page header, which may hold the smallest and largest value."""
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_PLAIN, _DICTIONARY_ENCODINGS = 0, (2, 8)
_MOST_PAGE = 1 << 30
_PART = 1 << 16
_LARGE = 1 << 18
"""Pages of more bytes are not kept in memory, where their parts can be read alone."""
_CACHE_BYTES = 256 << 20
_CACHE_CHUNKS = 16_384
"""Row groups of which the places of pages are known."""


class Chunk(NamedTuple):
    """A column chunk, and where its pages begin."""

    codec: Any
    """``pyarrow.Codec``; None: not compressed."""
    levels: int
    """Definition level of a value that is not null."""
    dictionary: "Page | None"
    pages: list["Page"]
    starts: NDArray[np.int64]
    """``[len(pages) + 1]`` first row of each page in the row group, and the number of rows."""


class Page(NamedTuple):
    """A page: place of its bytes, and what its header says."""

    offset: int
    packed: int
    """Bytes in the file."""
    size: int
    """Bytes uncompressed."""
    values: int
    """Values, with nulls."""
    encoding: int
    level_bytes: int | None
    """Of the second version: bytes of the levels, which are not compressed."""
    is_packed: bool


class Parts:
    """A page in its file, whose parts of 64 KiB are read alone."""

    def __init__(self, file: str, offset: int, size: int, codec: Any, starts: NDArray[np.int64]) -> None:
        self.file, self.offset, self.size, self.codec, self.starts = file, offset, size, codec, starts

    def read(self, start: int, end: int) -> memoryview:
        """A range of the uncompressed page; OSError, ValueError where it is damaged or gone."""
        first, last = start // _PART, -(-end // _PART)
        count = int(self.starts[last] - self.starts[first])
        with open(self.file, "rb", buffering=0) as opened:
            data = os.pread(opened.fileno(), count, self.offset + int(self.starts[first]))
        if len(data) < count:
            raise ValueError("cut off")
        if self.codec is not None and count:
            size = min(last * _PART, self.size) - first * _PART
            data = self.codec.decompress(_as_varint(size) + data, decompressed_size=size, asbytes=True)
        return memoryview(data)[start - first * _PART : end - first * _PART]


class Values:
    """The values of a page: of a small one in memory, of a large one in the file."""

    def __init__(self, data: bytes | Parts, places: NDArray[np.int64]) -> None:
        self.data = data
        self.places = places
        """``[rows, 2]`` start and end of each value, -1 for null."""

    @property
    def nbytes(self) -> int:
        """Memory."""
        held = self.data.starts.nbytes if isinstance(self.data, Parts) else len(self.data)
        return held + self.places.nbytes

    def value(self, position: int) -> memoryview | None:
        """One value; OSError, ValueError where it is read from the file, and that is damaged."""
        start, end = map(int, self.places[position])
        if start < 0:
            return None
        return self.data.read(start, end) if isinstance(self.data, Parts) else memoryview(self.data)[start:end]


def chunk_pages(file: str, opened: Any, group: int, name: str) -> Chunk | None:
    """Where the pages of a column are in a row group; None where only pyarrow reads it."""
    schema, metadata = opened.schema, opened.metadata
    index = next((at for at in range(len(schema)) if schema.column(at).path == name), None)
    if index is None or schema.column(index).max_repetition_level or schema.column(index).physical_type != "BYTE_ARRAY":
        return None
    column = metadata.row_group(group).column(index)
    if column.file_path:
        return None
    try:
        codec = None if column.compression == "UNCOMPRESSED" else _codec(column.compression)
        return _find_pages(file, column, schema.column(index).max_definition_level, codec)
    except (ValueError, OSError):  # of codecs that this pyarrow lacks
        return None


def _codec(compression: str) -> Any:
    name = compression.lower()
    name = "lz4_raw" if name == "lz4" else name
    codec = import_module("pyarrow").Codec
    if not codec.is_available(name):
        raise ValueError(f"no codec {name}")
    return codec(name)


def _find_pages(file: str, column: Any, levels: int, codec: Any) -> Chunk | None:
    """The pages of a column chunk; None where this module does not read it.

    Args:
        file: path.
        column: ``pyarrow.parquet.ColumnChunkMetaData``.
        levels: definition level of a value that is not null; the column has no lists.
        codec: ``pyarrow.Codec``, None for no compression.
    """
    first = column.dictionary_page_offset if column.has_dictionary_page else None
    position = column.data_page_offset if first is None else min(first, column.data_page_offset)
    end = position + column.total_compressed_size
    dictionary, pages, rows = None, [], [0]
    with open(file, "rb", buffering=0) as opened:
        while position < end and rows[-1] < column.num_values:
            head = os.pread(opened.fileno(), min(_HEADER, end - position), position)
            try:
                fields, length = _struct(head, 0)
                kind, size, packed = fields[1], fields[2], fields[3]
                position += length
                if kind == _DATA:
                    page = Page(position, packed, size, fields[5][1], fields[5][2], None, True)
                elif kind == _DATA_2:
                    two = fields[8]
                    page = Page(position, packed, size, two[1], two[4], two[5] + two[6], two.get(7, True))
                elif kind == _DICTIONARY:
                    dictionary = Page(position, packed, size, fields[7][1], _PLAIN, 0, True)
            except (KeyError, IndexError, ValueError, TypeError):
                return None
            if not 0 <= packed <= end - position or not 0 <= size <= _MOST_PAGE:
                return None
            position += packed
            if kind in (_DATA, _DATA_2):
                is_known = page.encoding == _PLAIN or (page.encoding in _DICTIONARY_ENCODINGS and dictionary)
                if not is_known or page.values < 0:
                    return None
                pages.append(page)
                rows.append(rows[-1] + page.values)
    if rows[-1] != column.num_values:
        return None
    return Chunk(codec, levels, dictionary, pages, np.array(rows, dtype=np.int64))


def read_page(file: str, chunk: Chunk, at: int) -> Values | None:
    """The values of a page; None where it is damaged."""
    try:
        with open(file, "rb", buffering=0) as opened:
            page = chunk.pages[at]
            data, levels, start = _unpacked(opened.fileno(), chunk, page)
            present = np.ones(page.values, dtype=bool)
            if chunk.levels:
                present = _numbers(levels, chunk.levels.bit_length(), page.values) == chunk.levels
            count = int(present.sum())
            if page.encoding == _PLAIN:
                found = _plain(data, start, count)
            elif chunk.dictionary is None:
                return None
            else:
                width = data[start] if count else 0
                chosen = _numbers(memoryview(data)[start + 1 :], width, count)
                page = chunk.dictionary
                data, _, start = _unpacked(opened.fileno(), chunk, page)
                found = _plain(data, start, page.values)[chosen]
            parts = _parts(file, opened.fileno(), chunk, page) if len(data) > _LARGE else None
    except (OSError, ValueError, IndexError, struct.error):
        return None
    places = np.full((len(present), 2), -1, dtype=np.int64)
    places[present] = found
    return Values(parts or data, places)


def _parts(file: str, descriptor: int, chunk: Chunk, page: Page) -> Parts | None:
    """The parts of a page; None where they depend on each other."""
    ahead = page.level_bytes or 0
    offset, count, size = page.offset + ahead, page.packed - ahead, page.size - ahead
    if chunk.codec is None or not page.is_packed:
        starts = np.minimum(np.arange(-(-size // _PART) + 1, dtype=np.int64) * _PART, size)
        return Parts(file, offset, size, None, starts)
    if chunk.codec.name != "snappy":
        return None
    found = _snappy_parts(os.pread(descriptor, count, offset), size)
    return None if found is None else Parts(file, offset, size, chunk.codec, found)


def _snappy_parts(data: bytes, size: int) -> NDArray[np.int64] | None:
    """Where each part of 64 KiB of the uncompressed bytes begins in compressed ones, and their end; None where an
    element crosses the border of a part (https://github.com/google/snappy, format_description.txt)."""
    total, at = _varint(data, 0)
    starts, done, border = [at], 0, _PART
    while done < size:
        tag = data[at]
        kind, length, back, at = tag & 3, (tag >> 2) + 1, 0, at + 1
        if kind == 0:
            if length > 60:
                extra = length - 60
                length, at = int.from_bytes(data[at : at + extra], "little") + 1, at + extra
            at += length
        elif kind == 1:
            length, back, at = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at], at + 1
        else:
            extra = 2 if kind == 2 else 4
            back, at = int.from_bytes(data[at : at + extra], "little"), at + extra
        if back > done - (border - _PART) or done + length > border:
            return None
        done += length
        if done in (border, size):
            starts.append(at)
            border += _PART
    return np.array(starts, dtype=np.int64) if total == size and at == len(data) else None


def _as_varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _unpacked(descriptor: int, chunk: Chunk, page: Page) -> tuple[bytes, memoryview, int]:
    """Uncompressed bytes, the definition levels, and where the values begin in the bytes."""
    stored = os.pread(descriptor, page.packed, page.offset)
    if len(stored) < page.packed:
        raise ValueError("cut off")
    ahead = page.level_bytes or 0
    levels, body, size = memoryview(stored)[:ahead], stored[ahead:], page.size - ahead
    if chunk.codec is not None and page.is_packed and size:
        body = chunk.codec.decompress(body, decompressed_size=size, asbytes=True)
    start = 0
    if page.level_bytes is None and chunk.levels:
        start = 4 + int.from_bytes(body[:4], "little")
        levels = memoryview(body)[4:start]
    return body, levels, start


def _plain(data: bytes, start: int, count: int) -> NDArray[np.int64]:
    """``[count, 2]`` start and end of values that follow their lengths."""
    places = np.empty((count, 2), dtype=np.int64)
    for index in range(count):
        (length,) = struct.unpack_from("<I", data, start)
        start += 4
        places[index] = start, start + length
        start += length
    if start > len(data):
        raise ValueError("cut off")
    return places


def _numbers(data: memoryview, width: int, count: int) -> NDArray[np.int64]:
    """``[count]`` numbers of ``width`` bits in runs and bit-packed groups (the hybrid encoding)."""
    parts, total, at = [np.zeros(0 if width else count, dtype=np.int64)], 0 if width else count, 0
    while total < count:
        header, at = _varint(data, at)
        length = (header >> 1) * (8 if header & 1 else 1)
        if header & 1:
            taken = (header >> 1) * width
            bits = np.unpackbits(np.frombuffer(data, np.uint8, taken, at), bitorder="little")
            part = bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
        else:
            taken = -(-width // 8)
            part = np.full(min(length, count - total), int.from_bytes(data[at : at + taken], "little"), dtype=np.int64)
        if length == 0:
            raise ValueError("an empty run")
        at += taken
        total += length
        parts.append(part)
    return np.concatenate(parts)[:count]


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number without an end")


def _zigzag(data: Any, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a structure in Thrift's compact protocol by their ids, and where it ends; other kinds of values
    than numbers, booleans and structures are passed over."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        step, kind = head >> 4, head & 15
        number, at = (number + step, at) if step else _zigzag(data, at)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind == 3:
            fields[number], at = data[at], at + 1
        elif kind in (4, 5, 6):
            fields[number], at = _zigzag(data, at)
        elif kind == 7:
            at += 8
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = _struct(data, at)
        else:
            raise ValueError("a kind of value that page headers do not have")
    return fields, at + 1


class Cache:
    """The decoded pages and row groups that were used last, of one process."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._parts: OrderedDict[Any, list[Any]] = OrderedDict()
        self._bytes = 0
        self._chunks: OrderedDict[Any, Chunk | None] = OrderedDict()

    def get(self, key: Any, read: Any) -> list[Any]:
        """What ``read()`` gave for this key."""
        self._check_process()
        with self._lock:
            if key not in self._parts:
                self._parts[key] = read()
                self._bytes += sum(part.nbytes for part in self._parts[key])
            self._parts.move_to_end(key)
            while len(self._parts) > 1 and self._bytes > _CACHE_BYTES:
                self._bytes -= sum(part.nbytes for part in self._parts.popitem(last=False)[1])
            return self._parts[key]

    def pages(self, key: Any, find: Any) -> Chunk | None:
        """Where the pages of a row group are."""
        self._check_process()
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = find()
            self._chunks.move_to_end(key)
            if len(self._chunks) > _CACHE_CHUNKS:
                self._chunks.popitem(last=False)
            return self._chunks[key]

    def _check_process(self) -> None:
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._start()
