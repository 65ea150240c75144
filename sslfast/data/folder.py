"""The folder source: every image is a file; the first-level folder is its class."""

import os
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import OnBadImage, read_bytes
from sslfast.data.listing import existing_folder, first_folder, identify, list_files, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.parquet import ParquetSource
from sslfast.data.pool import map_processes, map_threads
from sslfast.data.source import Changes, ImageSource, PackedPaths, taken
from sslfast.data.tar import TarSource

_FILES = 1024
"""That one process looks at, at a time."""
_FILES_ALONE = 16384
"""From more on, processes pay: a file takes a tenth of a millisecond of a core."""


@dataclass(kw_only=True, eq=False, repr=False)
class FolderSource(ImageSource):
    """Image files under ``root``, at any depth."""

    name: ClassVar[str] = "folder"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return True

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        """Of the image files; where the folder holds tar files instead, or Parquet files, of the images in them."""
        listing = list_files(existing_folder(path))
        if listing.shards and listing.paths:
            raise ValueError(
                f"{path} holds {len(listing.paths)} images ({listing.paths[0]}, ...) and {len(listing.shards)} tar "
                f"files ({listing.shards[0]}, ...): name a folder with one of both, or move the others away"
            )
        if listing.shards:
            return TarSource.open_shards(path, listing, on_bad_image=on_bad_image, progress=progress)
        if listing.tables and not listing.paths:
            return ParquetSource.open_shards(path, listing, on_bad_image=on_bad_image, progress=progress)
        files = cls(root=path, paths=listing.paths)
        images = list_images(files, progress=progress)
        source = files if len(images.rows) == len(files) else files.take(images.rows)
        return Manifest.from_columns(
            source,
            sizes=images.sizes,
            sha1=images.sha1,
            names=map(first_folder, source.paths),
            excluded=[*images.bad, *listing.unreadable],
            ignored=other_files(path, listing, progress=progress),
            on_bad_image=on_bad_image,
        )

    def read(self, row: int) -> bytes:
        return read_bytes(self.where(row))

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """Listing says which sizes are as they were: no file is opened for those, unless for its contents."""
        listing = list_files(existing_folder(self.root), sizes=not contents)
        excluded = {path for path, _ in manifest.excluded}
        paths, sizes = listing.paths, listing.sizes
        if excluded:
            kept = np.flatnonzero(np.fromiter((path not in excluded for path in paths), dtype=bool))
            paths, sizes = taken(paths, kept), None if sizes is None else sizes[kept]
        if PackedPaths(paths) == PackedPaths(self.paths):
            rows = None if sizes is None else np.flatnonzero(sizes != manifest.bytes)
            return changed_files(self, manifest, contents=contents, rows=rows)
        found = changed_files(self, manifest, contents=contents)
        known = {*self.paths}
        found.added = [(path, "") for path in paths if path not in known]
        return found

    def notes(self) -> list[tuple[object, ...]]:
        return []

    @classmethod
    def wrote(cls, notes: object, columns: object) -> bool:
        return True


class ListedFiles(NamedTuple):
    """The files of a source that :func:`list_images` looked at."""

    rows: NDArray[np.int64]
    """Of the source, in order: those whose header the image policy accepts."""
    sizes: NDArray[np.int64]
    """Of each."""
    sha1: PackedPaths
    """Of each."""
    bad: list[tuple[str, str]]
    """Path and reason of the others, in order."""


def list_images(files: ImageSource, *, progress: bool) -> ListedFiles:
    """Size, hash and header check of every file: by one process for each core, by 8 threads in each of them.

    Raises:
        LostBatchError: the storage does not answer, or a process was killed.
    """
    tasks = [range(start, min(start + _FILES, len(files))) for start in range(0, len(files), _FILES)]
    workers = None if len(files) > _FILES_ALONE else 0
    parts = [
        *map_processes(partial(_look, files), tasks, workers=workers, progress=progress, title="scanning", chunk=1)
    ]
    return ListedFiles(
        rows=np.concatenate([np.empty(0, dtype=np.int64), *(part.rows for part in parts)]),
        sizes=np.concatenate([np.empty(0, dtype=np.int64), *(part.sizes for part in parts)]),
        sha1=PackedPaths.join(part.sha1 for part in parts),
        bad=[found for part in parts for found in part.bad],
    )


def _look(files: ImageSource, rows: range) -> ListedFiles:
    def look(row: int) -> tuple[int, str] | str:
        return identify(files.where(row), read=True, header=True)

    good: list[tuple[int, int, str]] = []
    bad: list[tuple[str, str]] = []
    for row, found in map_threads(look, rows, progress=False, title="scanning", chunk=_FILES // 16):
        if isinstance(found, str):
            bad.append((files.paths[row], found))
        else:
            good.append((row, *found))
    return ListedFiles(
        rows=np.array([row for row, _, _ in good], dtype=np.int64),
        sizes=np.array([size for _, size, _ in good], dtype=np.int64),
        sha1=PackedPaths(sha1 for _, _, sha1 in good),
        bad=bad,
    )


def _regular_size(file: str) -> int | None:
    """Bytes of a regular file; None where it is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def changed_files(
    files: ImageSource, manifest: Manifest, *, contents: bool, rows: NDArray[np.int64] | None = None
) -> Changes:
    """Which files, of all or of some rows, are unreadable or changed; without ``contents`` none is opened whose size is
    as it was."""
    changes = Changes()

    def look(row: int) -> tuple[int, str] | str:
        file = files.where(row)
        if not contents and (size := _regular_size(file)) == int(manifest.bytes[row]):
            return size, ""
        return identify(file, read=contents)

    looked = range(len(files)) if rows is None else rows.tolist()
    for row, now in map_threads(look, looked, progress=False, title=""):
        path, size = files.paths[row], int(manifest.bytes[row])
        if isinstance(now, str):
            changes.unreadable.append((path, now))
        elif now[0] != size:
            changes.changed.append((path, f"{size} -> {now[0]} bytes"))
        elif contents and now[1] != manifest.sha1[row]:
            changes.changed.append((path, "same size, other content"))
    return changes
