"""The headers of a tar file: name, offset and size of every member.

Read are POSIX ustar and PAX and GNU tar files, with long names, uncompressed. The walk is stricter than ``tarfile``,
which takes a damaged header for the end of the archive: here whatever would hide members is an error.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from sslfast.data.source import SourceError

_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # of PAX records and of long names
_REMEDY = "write the shard again, or get a good copy"
# Type flags, POSIX.1-1988 to 2001 and GNU.
_REGULAR = frozenset("0\x007")
_ODD = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe"}
_WITHOUT_DATA = frozenset({*_ODD, "5"})
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = "5", "L", "K", "x", "g", "S"


class ShardError(SourceError):
    """A tar file that cannot be used, or is no longer the one that was indexed."""


class Member(NamedTuple):
    """A member of a tar file that is no folder."""

    name: str
    """Relative, without ``./``; bytes that are no UTF-8 as surrogate escapes."""
    offset: int
    """Where its bytes begin."""
    size: int
    problem: str
    """Why its bytes are not a file's; empty for regular files."""


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
