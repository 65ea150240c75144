"""The .beton file: FFCV's format (version 2) with checksums and the manifest inside.

Layout, little-endian::

    header · fields image, label, row · [N] samples · pages of pixels
    manifest · settings (JSON) · [N] CRC-32 · footer · [N] allocations

FFCV's own reader uses the header, the fields, the samples and the allocations, and ignores what is between the last
page and the allocations. Sample ``i`` is row ``i`` of the manifest. No sample crosses a page boundary.
"""

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import BadImageError, OnBadImage
from sslfast.data.manifest import Manifest
from sslfast.data.source import Changes, ImageSource, SourceError, is_file

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True)
FIELDS = {"image": 2, "label": 1, "row": 1}
"""Name -> FFCV's number of the field type: 2 an RGB image, 1 an integer."""
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("", IMAGE), ("", "<i8"), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FOOTER = np.dtype(
    [
        ("manifest", "<u8"),
        ("settings", "<u8"),
        ("sums", "<u8"),
        ("texts_crc", "<u8"),
        ("identity", "S16"),
        ("magic", "S16"),
    ]
)
MAGIC = b"sslfast beton 1"
JPG, RAW = 0, 1
"""Values of ``mode``: a JPEG, or ``[height, width, 3]`` uint8."""
MAX_SIDE = 65535
_SAMPLES = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
_PAGE = 1 << 23


@dataclass(kw_only=True, eq=False, repr=False)
class BetonSource(ImageSource):
    """A .beton file: stored pixels and JPEGs that only the ffcv loader reads. ``root`` is what it was made of."""

    name: ClassVar[str] = "beton"
    loader: ClassVar[str | None] = "ffcv"

    archive: Path | None
    """The file; None in the manifest of a run, which knows it by ``archive_id`` only."""
    archive_id: str = ""
    """Identity of the stored bytes."""
    samples: NDArray[np.int64] | None = None
    """``[N]`` sample in the file of each row; None: all samples, in order."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ".beton")

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        """The manifest inside. What ``sslfast data prepare`` left out is not in the file, so it is no error."""
        with Beton(path) as beton:
            return beton.manifest

    def take(self, rows: NDArray[np.int64]) -> Self:
        return replace(super().take(rows), samples=self.sample(rows))

    def sample(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` samples in the file of some rows."""
        return rows if self.samples is None else self.samples[rows]

    def read(self, row: int) -> bytes:
        """The image as a file: the stored JPEG, or the stored pixels as a PPM. For thumbnails; the file is opened anew
        by the first call, and its checksum is verified."""
        if self.archive is None:
            raise SourceError(f"this manifest belongs to a .beton file made of {self.root}: give that file")
        return _opened(self.archive, self.archive_id).image_file(int(self.sample(np.array([row]))[0]))

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        if self.archive is None:
            raise ValueError(f"this manifest belongs to a .beton file made of {self.root}: give that file")
        with Beton(self.archive) as beton:
            is_same = beton.manifest.source.identity() == self.archive_id
        return Changes(changed=[] if is_same else [(self.archive.name, "written again")])

    def identity(self) -> str:
        return self.archive_id

    def notes(self) -> Iterable[tuple[object, ...]]:
        return []

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
        archive_id = next(note[1] for note in notes if note[0] == "archive")
        return cls(root=root, paths=paths, archive=None, archive_id=archive_id)

    @classmethod
    def wrote(cls, notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]) -> bool:
        return any(note[0] == "archive" for note in notes)

    def __str__(self) -> str:
        return str(self.root if self.archive is None else self.archive)


class Beton:
    """A .beton file of ``sslfast data prepare``, open for reading.

    Raises ValueError, in one line with the remedy, if it is missing, written by another program, truncated or edited.
    The pixels are not read here; their readers verify the checksums.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise ValueError(f"{self.path} {reason}: make it with `sslfast data prepare`") from None
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    def _read_tables(self) -> None:
        remedy = "make it again with `sslfast data prepare`"
        header = self._read(HEADER, 0, 1, f"{self.path} is not a .beton file: {remedy}")[0]
        foreign = f"{self.path} was not written by `sslfast data prepare` (it has no manifest of rows): {remedy}"
        if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
            raise ValueError(foreign)
        if self._read(FIELD, HEADER.itemsize, len(FIELDS), foreign).tobytes() != _fields().tobytes():
            raise ValueError(foreign)
        cut = f"{self.path} was cut short or edited: {remedy}"
        count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if os.fstat(self.descriptor).st_size != table + count * ALLOCATION.itemsize:
            raise ValueError(cut)
        footer = self._read(FOOTER, table - FOOTER.itemsize, 1, cut)[0]
        if footer["magic"] != MAGIC:
            raise ValueError(foreign)
        begin, middle, end = int(footer["manifest"]), int(footer["settings"]), int(footer["sums"])
        if not _SAMPLES <= begin <= middle <= end <= table:
            raise ValueError(cut)
        texts = self._read(np.dtype("<u1"), begin, end - begin, cut).tobytes()
        if zlib.crc32(texts) != footer["texts_crc"]:
            raise ValueError(cut)
        samples = self._read(SAMPLE, _SAMPLES, count, cut)
        allocations = self._read(ALLOCATION, table, count, cut)
        self.sums: NDArray[np.uint32] = self._read(np.dtype("<u4"), end, count, cut)
        """``[N]`` CRC-32 of each sample's bytes."""
        identity = _identity(samples, allocations, self.sums)
        if footer["identity"] != identity.encode():
            raise ValueError(cut)
        images = samples["f0"]
        self.modes: NDArray[np.uint8] = images["mode"].copy()
        """``[N]`` ``JPG`` or ``RAW``."""
        self.shapes: NDArray[np.int64] = np.stack((images["width"], images["height"]), axis=1).astype(np.int64)
        """``[N, 2]`` width and height."""
        self.offsets: NDArray[np.int64] = allocations["ptr"].astype(np.int64)
        """``[N]`` offset of each sample's bytes."""
        self.sizes: NDArray[np.int64] = allocations["size"].astype(np.int64)
        """``[N]`` number of each sample's bytes."""
        self.settings: dict[str, Any] = json.loads(texts[middle - begin :])
        """Settings of ``sslfast data prepare``, and the counts of what it did."""
        text = texts[: middle - begin].decode("utf-8", "surrogateescape")
        made_of = Manifest.parse(text, f"inside {self.path}")
        source = BetonSource(
            root=made_of.root,
            paths=made_of.paths,
            archive=self.path,
            archive_id=identity,
            decoding=made_of.source.decoding,
        )
        self.manifest = replace(made_of, source=source)
        """The rows; the source is this file."""
        if len(self.manifest) != count:
            raise ValueError(cut)

    def _read(self, kind: np.dtype[Any], offset: int, count: int, problem: str) -> NDArray[Any]:
        wanted = count * kind.itemsize
        data = bytearray(wanted)
        done = 0
        while done < wanted and offset >= 0:
            # One system call reads at most 2 GiB.
            got = os.preadv(self.descriptor, [memoryview(data)[done:]], offset + done)
            if got == 0:
                break
            done += got
        if done < wanted or offset < 0:
            raise ValueError(problem)
        return np.frombuffer(data, dtype=kind)

    def image_file(self, sample: int) -> bytes:
        """A sample as the bytes of a JPEG or PPM file; BadImageError where they are damaged."""
        size = int(self.sizes[sample])
        data = os.pread(self.descriptor, size, int(self.offsets[sample]))
        if len(data) != size or zlib.crc32(data) != self.sums[sample]:
            raise BadImageError("damaged: wrong checksum")
        if self.modes[sample] == JPG:
            return data
        width, height = self.shapes[sample].tolist()
        return f"P6\n{width} {height}\n255\n".encode() + data

    def __enter__(self) -> "Beton":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        descriptor, self.descriptor = getattr(self, "descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)


@lru_cache(maxsize=2)
def _opened(path: Path, identity: str) -> Beton:
    """A file that stays open; SourceError where it is no longer the one of that identity."""
    try:
        beton = Beton(path)
    except ValueError as error:
        raise SourceError(str(error)) from None
    if beton.manifest.source.identity() != identity:
        beton.close()
        raise SourceError(f"{path} is no longer the file that was opened before: start again")
    return beton


class BetonWriter:
    """Writes a .beton file atomically: into ``OUT.part`` next to it, renamed by :meth:`commit`.

    Leaving the ``with`` block without a commit deletes the part; the part of a killed process is overwritten by the
    next one. The part is locked, so two processes never write the same output.

    Args:
        path: the file to create or replace.
        capacity: maximum number of samples.
    """

    def __init__(self, path: str | os.PathLike[str], capacity: int) -> None:
        self.path = Path(path).absolute()
        self.part = self.path.with_name(self.path.name + ".part")
        self._page_size = _PAGE
        self._offset = -(-(_SAMPLES + capacity * SAMPLE.itemsize) // _PAGE) * _PAGE
        self._images = np.zeros(capacity, dtype=IMAGE)
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self._sums = np.zeros(capacity, dtype="<u4")
        self._count = 0
        self._committed = False

    def __enter__(self) -> "BetonWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(_open_locked(self.part), "wb", buffering=1 << 20)
        self._file.truncate(0)
        self._file.seek(self._offset)
        return self

    def add(self, mode: int, width: int, height: int, data: bytes, crc: int) -> None:
        """Append the next sample."""
        while len(data) > self._page_size:
            self._page_size *= 2
        if self._offset // self._page_size != (self._offset + len(data) - 1) // self._page_size:
            self._offset = -(-self._offset // self._page_size) * self._page_size
            self._file.seek(self._offset)
        self._file.write(data)
        row = self._count
        self._images[row] = (mode, width, height, self._offset)
        self._allocations[row] = (row, self._offset, len(data))
        self._sums[row] = crc
        self._offset += len(data)
        self._count += 1

    def commit(self, manifest: Manifest, settings: dict[str, Any]) -> None:
        """Write the tables, sync to disk, and rename the part to the output.

        Args:
            manifest: has one row for each added sample.
            settings: JSON values.
        """
        count = self._count
        samples = np.zeros(count, dtype=SAMPLE)
        samples["f0"], samples["f1"], samples["f2"] = self._images[:count], manifest.labels, np.arange(count)
        allocations, sums = self._allocations[:count], self._sums[:count]
        identity = _identity(samples, allocations, sums)
        text, notes = manifest.dump().encode("utf-8", "surrogateescape"), json.dumps(settings).encode()
        footer = np.zeros((), dtype=FOOTER)
        footer["manifest"] = self._offset
        footer["settings"] = self._offset + len(text)
        footer["sums"] = self._offset + len(text) + len(notes)
        footer["texts_crc"] = zlib.crc32(text + notes)
        footer["identity"], footer["magic"] = identity.encode(), MAGIC
        for part in (text, notes, sums.tobytes(), footer.tobytes()):
            self._file.write(part)
        header = np.zeros((), dtype=HEADER)
        header["version"], header["num_fields"], header["num_samples"] = VERSION, len(FIELDS), count
        header["page_size"], header["alloc_table_ptr"] = self._page_size, self._file.tell()
        self._file.write(allocations.tobytes())
        self._file.seek(0)
        for part in (header.tobytes(), _fields().tobytes(), samples.tobytes()):
            self._file.write(part)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.part, self.path)
        self._committed = True
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Deleted while locked; after a commit the name may already belong to another process.
            if not self._committed:
                self.part.unlink(missing_ok=True)
        finally:
            try:
                self._file.close()
            except OSError:
                # On a full disk flushing the buffer fails again; the first error is being raised already.
                if kind is None:
                    raise


def _open_locked(path: Path) -> int:
    """Descriptor of the file at ``path``, created if missing, locked by this process until it is closed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ValueError(f"{path} is being written by another process: wait for it, or stop it") from None
        try:
            # The previous holder may have renamed or deleted the file between the two calls above.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _fields() -> NDArray[Any]:
    fields = np.zeros(len(FIELDS), dtype=FIELD)
    for field, (name, kind) in zip(fields, FIELDS.items(), strict=True):
        field["type_id"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype="<u1")
    return fields


def _identity(*tables: NDArray[Any]) -> str:
    """16 hex digits of a hash over all samples: their offsets, shapes and checksums."""
    sha = hashlib.sha256()
    for table in tables:
        sha.update(table.tobytes())
    return sha.hexdigest()[:16]
