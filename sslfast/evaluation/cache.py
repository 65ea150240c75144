"""Features on disk, so that they are extracted only once and need not fit into memory.

A file holds the features of one encoder (or one of its layers) for the images of one manifest: ``[N, D]`` float32, row
after row, then a JSON table (identity, shape, CRC-32, images left out), its length and a magic number. It is written
batch by batch and mapped into memory when it is read, so that pages come from the disk as they are used. Its name is a
hash of everything that the features depend on: weights, normalisation, layer, image size, preprocessing, the manifest's
digest, type of device. Files may be deleted at any time; features whose file cannot be read are extracted again, and
those that cannot be written are kept in memory and extracted again the next time.
"""

import hashlib
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslfast.distributed import barrier, broadcast_object
from sslfast.files import OUTPUT, WriteError, open_regular, reason_of, replacing, save_tensors
from sslfast.runs import print_error
from sslfast.text import printable

MAGIC = b"sslfeat1"
_BLOCK = 1 << 20
_LOST = "features are not kept"


@dataclass(kw_only=True)
class Cached:
    """Contents of a file."""

    values: Tensor
    """``[N, D]`` float32; of a file: mapped, not read."""
    rows: Tensor
    """``[N]`` int64 manifest rows."""
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of each image that was left out."""


class FeatureWriter:
    """Features ``[n, D]`` that arrive batch by batch: in a file, or in memory where there is none or it cannot be
    written."""

    def __init__(self, path: Path | None, failed: "FeatureCache") -> None:
        self.path, self._cache = path, failed
        self._kept: list[Tensor] = []
        self._context: AbstractContextManager[Path] | None = None
        self._file: io.FileIO | None = None
        self.count, self.width, self.crc = 0, 0, 0
        if path is not None:
            try:
                self._context = replacing(path)
                self.temporary = self._context.__enter__()
                self._file = self.temporary.open("wb", buffering=0)  # an error comes with the batch that it is of
            except OSError as error:
                self._give_up(error)

    @property
    def is_on_disk(self) -> bool:
        """Whether the rows so far are in the file."""
        return self._file is not None

    def append(self, values: Tensor) -> None:
        """Add rows ``[n, D]``, float32 on the CPU."""
        values = values.contiguous()
        self.width = values.shape[1]
        if self._file is None:
            self._kept.append(values)
        else:
            data = values.numpy().tobytes()
            try:
                self._write(data)
            except OSError as error:
                self._give_up(error, values)
            self.crc = zlib.crc32(data, self.crc)
        self.count += len(values)

    def values(self) -> Tensor:
        """The rows ``[count, D]`` so far."""
        if self._file is None:
            return torch.cat(self._kept) if self._kept else torch.zeros(0, self.width)
        return mapped(self.temporary, self.count, self.width)

    def commit(self, table: dict[str, Any] | None = None) -> Path | None:
        """Give the file its name, with the JSON table behind the rows, if any; returns the path, None without one."""
        if self._file is None or self._context is None:
            return None
        try:
            if table is not None:
                shape = {"rows": self.count, "columns": self.width, "crc32": self.crc}
                text = json.dumps({**table, **shape}).encode()
                self._write(text + struct.pack("<Q", len(text)) + MAGIC)
            self._file.close()
            self._file = None
            self._context.__exit__(None, None, None)
            self._context = None
        except OSError as error:
            self.discard()
            self._cache.note_failure(self.path, error)
            return None
        return self.path

    def discard(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        if self._context is not None:
            stop = _StopWritingError()
            with suppress(_StopWritingError, OSError):
                self._context.__exit__(_StopWritingError, stop, None)
            self._context = None

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _give_up(self, error: OSError, values: Tensor | None = None) -> None:
        """Go on in memory, with the rows that the file has."""
        self._cache.note_failure(self.path, error)
        if self._file is not None:
            if self.count:
                self._kept = [mapped(self.temporary, self.count, self.width).clone()]
            if values is not None:
                self._kept.append(values)
        self.discard()


class _StopWritingError(Exception):
    """Leaves :func:`sslfast.files.replacing` without a file."""


class FeatureCache:
    """A folder of feature files; without a folder nothing is stored.

    With ``needed_for``, a file that is made of them, features that cannot be written are a WriteError about it. Unless
    ``keep``, a file loses its name, and its place on the disk goes with the process that maps it.
    """

    def __init__(self, folder: Path | None, *, needed_for: Path | None = None, keep: bool = True) -> None:
        self.folder, self.needed_for, self.keep = folder, needed_for, keep
        self._has_failed = False

    def path(self, identity: dict[str, Any]) -> Path | None:
        """File of the features that ``identity`` (JSON values) describes, whether it exists or not."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.features"

    def load(self, identity: dict[str, Any]) -> Cached | None:
        """The features, or None if there is no file, or one that is damaged, foreign or of other features."""
        path = self.path(identity)
        try:
            return None if path is None else _load(path, _text(identity))
        except (
            OSError,
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
            struct.error,
        ):  # another file than ours
            return None

    def writer(self, identity: dict[str, Any] | None) -> FeatureWriter:
        """Of the file of ``identity``; None: in memory."""
        return FeatureWriter(None if identity is None or self._has_failed else self.path(identity), self)

    def save(self, identity: dict[str, Any], found: Cached) -> None:
        """Write features that are in memory. Where that fails one line says so, and no further file is tried."""
        writer = self.writer(identity)
        if writer.is_on_disk:
            writer.append(found.values)
            writer.commit(table_of(identity, found.rows, found.bad_images))

    def note_failure(self, path: Path | None, error: OSError) -> None:
        """One line about a file that cannot be written; later ones are not tried. WriteError where it is needed."""
        if self.needed_for is not None:
            raise WriteError(error, self.needed_for, remedy=OUTPUT)
        if not self._has_failed:
            print_error(f"cannot write {printable(str(path))} ({reason_of(error)}): {_LOST}")
        self._has_failed = True


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """The folder ``path`` of rank 0, on every machine, for features that are needed once: empty, made when they are
    written, and deleted in the end, also one that a stopped process left."""
    path = broadcast_object(path)
    shutil.rmtree(path, ignore_errors=True)
    barrier()
    try:
        yield path
        barrier()  # no rank reads any more
    finally:
        shutil.rmtree(path, ignore_errors=True)


def table_of(identity: dict[str, Any], rows: Tensor, bad_images: list[tuple[str, str]]) -> dict[str, Any]:
    """What stands behind the features in a file."""
    last = int(rows[-1]) if len(rows) else -1
    whole = torch.ones(last + 1, dtype=torch.bool)
    whole[rows] = False
    missing = whole.nonzero()[:, 0].tolist()
    return {"identity": _text(identity), "missing": missing, "bad_images": bad_images}


def mapped(path: Path, rows: int, columns: int) -> Tensor:
    """``[rows, columns]`` float32 of a file, mapped: pages are read when they are used."""
    if not rows * columns:
        return torch.zeros(rows, columns)
    return torch.from_numpy(np.memmap(path, np.float32, mode="c", shape=(rows, columns)))


def _load(path: Path, identity: str) -> Cached | None:
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - 16)
        length, magic = struct.unpack("<Q8s", file.read(16))
        if magic != MAGIC or length > size - 16:
            return None
        file.seek(size - 16 - length)
        table = json.loads(file.read(length))
        rows, columns = table["rows"], table["columns"]
        if table["identity"] != identity or rows * columns * 4 != size - 16 - length:
            return None
        file.seek(0)
        crc, left = 0, rows * columns * 4
        while left and (data := file.read(min(left, _BLOCK))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
        if crc != table["crc32"] or left:
            return None
    kept = torch.ones(rows + len(table["missing"]), dtype=torch.bool)
    kept[table["missing"]] = False
    bad = [(str(name), str(reason)) for name, reason in table["bad_images"]]
    numbers = kept.nonzero()[:, 0]
    return Cached(values=mapped(path, rows, columns), rows=numbers, bad_images=bad) if len(numbers) == rows else None


def save_optional(state: dict[str, Any], path: Path, *, lost: str) -> bool:
    """Write what an evaluation can do without, atomically; whether that succeeded. Else one line on standard error:
    the reason, and ``lost``, what follows."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            save_tensors(state, file)
    except OSError as error:
        print_error(f"cannot write {printable(str(path))} ({reason_of(error)}): {lost}")
        return False
    return True


def load_whole(path: Path) -> dict[str, Any] | None:
    """The table that ``torch.save`` wrote; None where there is no such file or a byte of it has changed."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as members:  # torch writes the CRC-32 of every member and never compares it
                if members.testzip() is not None:
                    return None
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever zipfile and torch.load raise for a damaged or foreign file
        return None
    return state if isinstance(state, dict) else None


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
