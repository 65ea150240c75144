"""The zip source: images are members of one .zip file, each read by two ``pread``."""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import MAX_BYTES, SUFFIXES, BadImageError, OnBadImage
from sslfast.data.left_out import suffix_of
from sslfast.data.manifest import Manifest
from sslfast.data.members import folder_classes, list_members, visible
from sslfast.data.pool import map_threads
from sslfast.data.source import HASHED_BYTES, Changes, ImageSource, SourceError, content_hash, is_file

_LOCAL_HEADER = 30
_COLUMNS = ("offset", "stored", "crc")
_REMEDY = "write the file again, or get a good copy"


@dataclass(kw_only=True, eq=False, repr=False)
class ZipSource(ImageSource):
    """Members of a .zip file, stored or deflated.

    The first-level folder in a name is the class; if all images lie in folders of one folder (``zip -r train.zip
    train``), the one below it. Labels of other members count as in tar files.
    """

    name: ClassVar[str] = "zip"

    archive_bytes: int
    """Size of the .zip file."""
    offsets: NDArray[np.int64]
    """``[num_rows]`` where the local header of each row's member begins."""
    stored: NDArray[np.int64]
    """``[num_rows]`` bytes of each row in the file; as many as it has where it is not compressed."""
    crc: NDArray[np.int64]
    """``[num_rows]`` CRC-32 of the contents."""
    sizes: NDArray[np.int64]
    """``[num_rows]`` bytes of the contents."""
    deflated: NDArray[np.bool_]
    """``[num_rows]`` whether a row is compressed."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ".zip")

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        ignored: Counter[str] = Counter()
        members, size = _directory(path, ignored)
        with path.open("rb", buffering=0) as file:

            def read(name: str, count: int) -> bytes:
                info = members[name]
                if info.flag_bits & 1:
                    raise BadImageError("encrypted member of a zip file: unpack it with its password")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise BadImageError(f"compressed by method {info.compress_type} of a zip file: unpack it")
                if info.file_size > MAX_BYTES:
                    raise BadImageError(f"too large: a file of {info.file_size:,} bytes, at most {MAX_BYTES:,}")
                is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
                packed = _stored(file.fileno(), info.header_offset, info.compress_size if is_deflated else count)
                return _unpacked(packed, is_deflated, count, info.file_size, info.CRC)

            sizes = {name: info.file_size for name, info in members.items()}
            found = list_members(
                str(path),
                sizes,
                read,
                folders=folder_classes([name for name in members if suffix_of(name) in SUFFIXES]),
            )
        images = sorted(found.images, key=lambda image: image.path)
        infos = [members[image.path] for image in images]
        source = cls(
            root=path,
            paths=[image.path for image in images],
            archive_bytes=size,
            offsets=np.array([info.header_offset for info in infos], dtype=np.int64),
            stored=np.array([info.compress_size for info in infos], dtype=np.int64),
            crc=np.array([info.CRC for info in infos], dtype=np.int64),
            sizes=np.array([info.file_size for info in infos], dtype=np.int64),
            deflated=np.array([info.compress_type == zipfile.ZIP_DEFLATED for info in infos], dtype=np.bool_),
        )
        return Manifest.from_images(
            source,
            images,
            excluded=found.bad,
            ignored=ignored + found.ignored,
            on_bad_image=on_bad_image,
            numbered=found.has_labels,
        )

    def read(self, row: int) -> bytes:
        """SourceError: the file is gone, unreadable, or its size is not what was indexed; BadImageError: the member's
        checksum does not fit."""
        return self._read(row, int(self.sizes[row]))

    def _read(self, row: int, count: int) -> bytes:
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
            try:
                now = os.fstat(descriptor).st_size
                if now != self.archive_bytes:
                    raise SourceError(
                        f"{self.root} changed while it was in use ({self.archive_bytes} -> {now} bytes): put the old "
                        "one back, or start a new run"
                    )
                wanted = int(self.stored[row]) if self.deflated[row] else count
                packed = _stored(descriptor, int(self.offsets[row]), wanted)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(
                f"{self.root} cannot be read ({error.strerror or error}): put it back, or start a new run"
            ) from None
        return _unpacked(packed, bool(self.deflated[row]), count, int(self.sizes[row]), int(self.crc[row]))

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """By the directory of the .zip file; where that is unchanged, contents are compared only if asked."""
        changes = Changes()
        members, _ = _directory(self.root, Counter())
        known = {*self.paths, *(path for path, _ in manifest.excluded)}
        for row, path in enumerate(self.paths):
            info = members.get(path)
            if info is None:
                changes.missing.append((path, ""))
            elif (info.file_size, info.CRC) != (self.sizes[row], self.crc[row]):
                changes.changed.append((path, "other content"))
            elif info.header_offset != self.offsets[row]:
                changes.changed.append((path, "at another place in the file, which was written again"))
        changes.added = [(path, "") for path in members if path not in known and suffix_of(path) in SUFFIXES]
        if contents and not (changes.missing or changes.changed):

            def hash_of(row: int) -> str:
                try:
                    return content_hash(self._read(row, min(int(self.sizes[row]), HASHED_BYTES)))
                except BadImageError as error:
                    return error.reason

            for row, now in map_threads(hash_of, range(len(self)), progress=False, title=""):
                if now != manifest.sha1[row]:
                    changes.changed.append((self.paths[row], "same size, other content"))
        return changes

    def take(self, rows: NDArray[np.int64]) -> Self:
        tables = {name: getattr(self, name)[rows] for name in ("offsets", "stored", "crc", "sizes", "deflated")}
        return replace(super().take(rows), **tables)

    def columns(self) -> Mapping[str, Iterable[object]]:
        return {"offset": self.offsets, "stored": self.stored, "crc": self.crc, "deflated": self.deflated.astype(int)}

    def notes(self) -> Iterable[tuple[object, ...]]:
        return [("source", self.name), ("zip", self.archive_bytes)]

    @classmethod
    def parse(
        cls,
        *,
        root: Path,
        paths: Sequence[str],
        sizes: NDArray[np.int64],
        notes: Sequence[Sequence[str]],
        columns: Mapping[str, Sequence[str]],
    ) -> Self:
        offsets, stored, crc = (np.array([int(value) for value in columns[name]], dtype=np.int64) for name in _COLUMNS)
        return cls(
            root=root,
            paths=paths,
            archive_bytes=next(int(note[1]) for note in notes if note[0] == "zip"),
            offsets=offsets,
            stored=stored,
            crc=crc,
            sizes=sizes,
            deflated=np.array([value == "1" for value in columns["deflated"]], dtype=np.bool_),
        )


def _directory(path: Path, ignored: Counter[str]) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """The visible members that are files, by name, and the size of the .zip file; SourceError where it is unusable."""
    members: dict[str, zipfile.ZipInfo] = {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): name a .zip file") from None
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise SourceError(f"{path} is not a whole zip file ({error}; {size:,} bytes): {_REMEDY}") from None
    for info in infos:
        stated = info.filename if "/" in info.filename else info.filename.replace("\\", "/")  # of programs of Windows
        name = "/".join(part for part in stated.split("/") if part not in ("", "."))
        if stated.endswith("/") or not visible(name, ignored):
            continue
        if name in members:
            raise SourceError(
                f"{path} has two members named {name!r}: names are identities, so write it again without one of them"
            )
        members[name] = info
    return members, size


def _stored(descriptor: int, offset: int, count: int) -> bytes:
    """The bytes of a member as they are in the file."""
    header = os.pread(descriptor, _LOCAL_HEADER, offset)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise BadImageError("damaged: no member of the zip file begins where its directory says")
    start = offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    data = os.pread(descriptor, count, start)
    if len(data) < count:
        raise BadImageError("damaged: the zip file ends within it")
    return data


def _unpacked(packed: bytes, is_deflated: bool, count: int, size: int, crc: int) -> bytes:
    """The first ``count`` of a member's ``size`` bytes; its checksum is compared where all are asked for."""
    data = packed[:count]
    if is_deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, count) if count else b""
        except zlib.error as error:
            raise BadImageError(f"damaged: {error}") from None
    if len(data) < count or (count == size and zlib.crc32(data) != crc):
        raise BadImageError("damaged: its checksum in the zip file does not fit")
    return data
