"""The headers of a tar file: name, offset and size of every member.

Supported are uncompressed POSIX ustar, PAX and GNU tar files, with long names. The reader is stricter than ``tarfile``,
which treats a damaged header as the end of the archive: here everything that could hide members is an error.
"""

import os
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from sslfast.data.left_out import UNPACK
from sslfast.data.sharded import ShardError

_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # of PAX records and of long names
_LONGEST_NUMBER = 20
_COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_REMEDY = "write the shard again, or get a good copy"
# Type flags, POSIX.1-1988 to 2001 and GNU.
_REGULAR = frozenset("0\x007")
_ODD = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe"}
_WITHOUT_DATA = frozenset({*_ODD, "5"})
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = "5", "L", "K", "x", "g", "S"


class Member(NamedTuple):
    """A member of a tar file that is not a folder."""

    name: str
    """Relative, without ``./``; bytes that are not UTF-8 as surrogate escapes."""
    offset: int
    """Where its bytes begin."""
    size: int
    problem: str
    """Why it is not a regular file; empty for regular files."""


def walk_tar(path: str, within: Member | None = None) -> Iterator[Member]:
    """Every member of a tar file except folders, in the order of the file; ``within``: of the tar file that this member
    of it is.

    One pass over the headers; the contents are not read. ShardError, naming the position, if the file is empty, not a
    tar file, truncated, or has data after its end mark.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read ({error.strerror or error})") from None
    try:
        yield from _Walk(descriptor, path, within).members()
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read ({error.strerror or error})") from None
    finally:
        os.close(descriptor)


class _Walk:
    def __init__(self, descriptor: int, path: str, within: Member | None) -> None:
        self.descriptor, self.is_inner, self.path = (
            descriptor,
            within is not None,
            path if within is None else f"{path}/{within.name}",
        )
        self.first = 0 if within is None else within.offset
        self.size = os.fstat(descriptor).st_size if within is None else within.offset + within.size
        self.position = self.first

    def members(self) -> Iterator[Member]:
        if self.size == self.first:
            raise ShardError(f"shard {self.path} is empty (0 bytes): {_REMEDY}")
        long_name: bytes | None = None
        shared: dict[bytes, bytes] = {}
        pax = shared
        while True:
            start = self.position
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
                    pax = {**shared, **self._records(text, start)}
                elif kind == _PAX_GLOBAL:
                    shared = pax = {**shared, **self._records(text, start)}
                continue
            is_sparse = kind == _SPARSE or any(key.startswith(b"GNU.sparse.") for key in pax)
            if kind == _SPARSE:
                extended = header[482]
                while extended:
                    extended = self._take(_BLOCK, "a sparse member")[504]
            if b"size" in pax:
                size = self._number(pax[b"size"], start, base=10)
            name = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name or _short_name(header)
            long_name, pax = None, shared
            offset = self.position
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
        data = os.pread(self.descriptor, min(count, self.size - self.position), self.position)
        self.position += count
        if len(data) < count:
            raise self._truncated(what)
        return data

    def _skip(self, count: int, what: str) -> None:
        self.position += count
        if self.position > self.size:
            raise self._truncated(what)

    def _check_end(self) -> None:
        """After the block of zeros that ends an archive there are only zeros."""
        while data := os.pread(self.descriptor, min(1 << 20, self.size - self.position), self.position):
            if data.count(0) != len(data):
                raise ShardError(
                    f"shard {self.path} has data after its end mark at byte {self.position} (joined with cat?): write "
                    "it again, or keep the parts separate"
                )
            self.position += len(data)

    def _check_sum(self, header: bytes, start: int) -> None:
        """The checksum: sum of the header's bytes with its own field as spaces, unsigned or (old programs) signed."""
        others = header[:148] + b" " * 8 + header[156:]
        signed = sum(others) - 256 * sum(byte >= 128 for byte in others)
        try:
            stored = int(header[148:156].strip(b" \0") or b"0", 8)
        except ValueError:
            stored = -1
        if stored not in (sum(others), signed):
            if start == self.first:
                raise ShardError(
                    f"{self.path} is not a tar file, or is compressed: shards are read at random offsets, so they must "
                    f"be plain .tar{self._unpack()}"
                )
            raise self._damaged(start)

    def _number(self, text: bytes, start: int, *, base: int = 8) -> int:
        """Digits, or (GNU, 8 GiB and more) a first byte of 0x80 and a big-endian number."""
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
        records, at = {}, 0
        while at < len(text):
            digits, _, _ = text[at : at + _LONGEST_NUMBER].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            key, equals, value = text[at + len(digits) + 1 : at + length].partition(b"=")
            if at + length > len(text) or not equals or not value.endswith(b"\n"):
                raise self._damaged(start)
            records[key] = value[:-1]
            at += length
        return records

    def _unpack(self) -> str:
        """What makes a tar file of a file of this name."""
        head = os.pread(self.descriptor, 6, self.first)
        packed = next((suffix for magic, suffix in _COMPRESSED.items() if head.startswith(magic)), None)
        if packed is None or self.is_inner:
            return f"; {_REMEDY}"
        file = shlex.quote(self.path)
        return f"; run `mv {file} {file}{packed} && {UNPACK[packed].removesuffix(' -k')} {file}{packed}`"

    def _truncated(self, what: str) -> ShardError:
        return ShardError(
            f"shard {self.path} is truncated: {what} needs {self.position:,} bytes, the file has {self.size:,}: "
            f"{_REMEDY}"
        )

    def _damaged(self, start: int) -> ShardError:
        return ShardError(f"shard {self.path} is damaged: no valid header at byte {start:,}: {_REMEDY}")


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _clean(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
