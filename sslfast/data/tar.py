"""Tar shards: where the members of a tar file are, and an image's bytes by one read, be it a file or a member.

Read are POSIX ustar and PAX and GNU tar files, with long names, uncompressed. The walk is stricter than ``tarfile``,
which takes a damaged header for the end of the archive: here whatever would hide members is an error.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import read_bytes

SUFFIX = ".tar"
_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # of PAX records and of long names
_REMEDY = "write the shard again, or get a good copy"
# Type flags, POSIX.1-1988 to 2001 and GNU.
_REGULAR = frozenset("0\x007")
_ODD = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe"}
_WITHOUT_DATA = frozenset({*_ODD, "5"})
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = "5", "L", "K", "x", "g", "S"


class ShardError(ValueError):
    """A tar file that cannot be used, or is no longer the one that was indexed. Not about one image: never skipped."""


class ImageLocation(NamedTuple):
    """Where the bytes of an image are: a file of its own, or ``size`` bytes from ``offset`` on in a tar file."""

    file: str
    member: str = ""
    """Name inside the tar file; empty: ``file`` is the image."""
    offset: int = 0
    size: int = 0
    shard_bytes: int = 0
    """Size of the tar file when it was indexed."""

    def __str__(self) -> str:
        return f"{self.file}/{self.member}" if self.member else self.file


class Member(NamedTuple):
    """A member of a tar file that is no folder."""

    name: str
    """Relative, without ``./``; bytes that are no UTF-8 as surrogate escapes."""
    offset: int
    """Where its bytes begin."""
    size: int
    problem: str
    """Why its bytes are not a file's; empty for regular files."""


@dataclass(kw_only=True)
class Shards:
    """The tar files behind a manifest, and where each row is in them."""

    paths: list[str]
    """Relative posix paths, sorted; one empty path where the manifest's root is the tar file itself."""
    bytes: NDArray[np.int64]
    """``[len(paths)]`` sizes."""
    modified: NDArray[np.int64]
    """``[len(paths)]`` times of the last change in ns. A copy may have another: then contents are compared."""
    index: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """``[N]`` shard of each row; rows of a shard follow one another."""
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """``[N]`` where each row's bytes begin."""

    def take(self, rows: NDArray[np.int64]) -> "Shards":
        """The same for some of the rows, numbered anew."""
        return replace(self, index=self.index[rows], offsets=self.offsets[rows])

    def location(self, root: str, path: str, row: int, size: int) -> ImageLocation:
        """Where a row is, given its path in the manifest and its size."""
        shard = int(self.index[row])
        name = self.paths[shard]
        file, member = (f"{root}/{name}", path[len(name) + 1 :]) if name else (root, path)
        return ImageLocation(file, member, int(self.offsets[row]), size, int(self.bytes[shard]))


def read_image_bytes(place: ImageLocation) -> bytes:
    """The bytes of an image.

    A member takes an open, a look at the tar file's size, and one read. Nothing stays open, so any number of shards,
    threads and processes will do.

    Raises:
        BadImageError: the file cannot be read or is empty.
        ShardError: the tar file is gone, unreadable, or of another size than when it was indexed.
    """
    if not place.member:
        return read_bytes(place.file)
    try:
        descriptor = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            now = os.fstat(descriptor).st_size
            data = os.pread(descriptor, place.size, place.offset) if now == place.shard_bytes else b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ShardError(
            f"shard {place.file} cannot be read ({error.strerror or error}): put it back, or start a new run"
        ) from None
    if now != place.shard_bytes or len(data) != place.size:
        raise ShardError(
            f"shard {place.file} changed while it was in use ({place.shard_bytes} -> {now} bytes): put the old one "
            "back, or start a new run"
        )
    return data


def walk_tar(path: str) -> Iterator[Member]:
    """Every member of a tar file but the folders, in the file's order, each with the place of its bytes.

    One pass over the headers; the bytes between them are not read. ShardError, naming the place, where the file is
    empty, no tar file, cut short, or goes on behind its end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read ({error.strerror or error})") from None
    try:
        yield from _Walk(descriptor, path).members()
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read ({error.strerror or error})") from None
    finally:
        os.close(descriptor)


class _Walk:
    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor, self.path = descriptor, path
        self.size = os.fstat(descriptor).st_size
        self.place = 0

    def members(self) -> Iterator[Member]:
        if self.size == 0:
            raise ShardError(f"shard {self.path} is empty (0 bytes): {_REMEDY}")
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        while True:
            start = self.place
            header = self._take(_BLOCK, "a header")
            if not any(header):
                self._check_end()
                return
            self._check_sum(header, start)
            kind = chr(header[156])
            size = self._number(header[124:136], start)
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                if size > _LONGEST_HEADER:
                    raise self._damaged(start)
                text = self._take(size, "a long name")
                self._skip(-size % _BLOCK, "a long name")
                if kind == _LONG_NAME:
                    long_name = text.rstrip(b"\0")
                elif kind == _PAX:
                    pax = self._records(text, start)
                continue
            is_sparse = kind == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in pax)
            if kind == _SPARSE:
                extended = header[482]
                while extended:
                    extended = self._take(_BLOCK, "a sparse member")[504]
            if b"size" in pax:
                size = self._number(pax[b"size"], start, base=10)
            name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name or _short_name(header)
            long_name, pax = None, {}
            offset = self.place
            shown = name.decode("utf-8", "surrogateescape")
            if kind not in _WITHOUT_DATA:
                self._skip(size, f"member {shown!r}")
                self._skip(-size % _BLOCK, f"member {shown!r}")
            if kind == _FOLDER or name.endswith(b"/"):
                continue
            problem = "a sparse member" if is_sparse else _ODD.get(kind, "")
            if not problem and kind not in _REGULAR:
                problem = f"a member of type {kind!r}"
            yield Member(_clean(shown), offset, size, problem)

    def _take(self, count: int, what: str) -> bytes:
        data = os.pread(self.descriptor, count, self.place)
        self.place += count
        if len(data) < count:
            raise self._truncated(what)
        return data

    def _skip(self, count: int, what: str) -> None:
        self.place += count
        if self.place > self.size:
            raise self._truncated(what)

    def _check_end(self) -> None:
        """Behind the block of zeros that ends an archive there are only more of them."""
        while data := os.pread(self.descriptor, 1 << 20, self.place):
            if data.count(0) != len(data):
                raise ShardError(
                    f"shard {self.path} goes on behind its end mark at byte {self.place} (joined with cat?): write it "
                    "again, or keep the parts apart"
                )
            self.place += len(data)

    def _check_sum(self, header: bytes, start: int) -> None:
        """Unsigned sum of the header's bytes, its own field read as spaces; some old programs added signed ones."""
        others = header[:148] + b" " * 8 + header[156:]
        signed = sum(others) - 256 * sum(byte >= 128 for byte in others)
        try:
            stored = int(header[148:156].strip(b" \0") or b"0", 8)
        except ValueError:
            stored = -1
        if stored not in (sum(others), signed):
            if start == 0:
                raise ShardError(
                    f"{self.path} is no tar file, or a compressed one: shards are read at any place, so they must be "
                    "plain .tar"
                )
            raise self._damaged(start)

    def _number(self, text: bytes, start: int, *, base: int = 8) -> int:
        """Digits, or (GNU, 8 GiB and more) big-endian behind a first byte of 0x80."""
        try:
            is_binary = base == 8 and text[0] == 0x80
            value = int.from_bytes(text[1:], "big") if is_binary else int(text.strip(b" \0") or b"0", base)
        except ValueError:
            value = -1
        if value < 0:
            raise self._damaged(start)
        return value

    def _records(self, text: bytes, start: int) -> dict[bytes, bytes]:
        """``LENGTH KEY=VALUE`` lines of a PAX header."""
        records = {}
        while text:
            digits, _, _ = text.partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = text[len(digits) + 1 : length].partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self._damaged(start)
            records[key] = value[:-1]
            text = text[length:]
        return records

    def _truncated(self, what: str) -> ShardError:
        return ShardError(
            f"shard {self.path} was cut short: {what} needs {self.place:,} bytes, the file has {self.size:,}: {_REMEDY}"
        )

    def _damaged(self, start: int) -> ShardError:
        return ShardError(f"shard {self.path} is damaged: no valid header at byte {start:,}: {_REMEDY}")


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def shard_index(names: Sequence[str], paths: Sequence[str]) -> NDArray[np.int64]:
    """``[N]`` the shard whose name each path begins with; ValueError where there is none.

    Sorted paths of a shard follow one another.
    """
    prefixes = {f"{name}/" if name else "": index for index, name in enumerate(names)}
    found = np.empty(len(paths), dtype=np.int64)
    prefix, index = "\0", -1
    for row, path in enumerate(paths):
        if not path.startswith(prefix):
            cuts = [0, *(place + 1 for place, letter in enumerate(path) if letter == "/")]
            prefix = next((path[:cut] for cut in cuts if path[:cut] in prefixes), "\0")
            if prefix == "\0":
                raise ValueError(f"{path!r} is in none of the shards")
            index = prefixes[prefix]
        found[row] = index
    return found
