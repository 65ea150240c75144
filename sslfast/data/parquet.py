"""The Parquet source: images are values of a binary column, read a page at a time (needs pyarrow).

Written for the tables of the Hugging Face Hub. What :mod:`sslfast.data.parquet_pages` does not read by the page or its
parts is decoded by the row group, so that a random order of all rows reads many times more than it uses:
``--loader.shuffle shards`` mixes the rows of few row groups at a time.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.hub_columns import (
    Columns,
    Found,
    binary_values,
    find_columns,
    has_numbers,
    look_at_batch,
    partition_label,
    value_at,
)
from sslfast.data.images import BadImageError, OnBadImage
from sslfast.data.listing import PARQUET, Listing, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.parquet_pages import Cache, Chunk, Values, chunk_pages, read_page
from sslfast.data.pool import map_threads
from sslfast.data.sharded import ShardedSource, ShardError, shard_index
from sslfast.data.source import HASHED_BYTES, ListedImage, SourceError, content_hash, is_file

_BATCH = 64  # rows decoded at a time by the scan
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|eval)[-_.].*", re.IGNORECASE)
_REMEDY = "get a good copy"


@dataclass(kw_only=True, eq=False, repr=False)
class ParquetSource(ShardedSource):
    """Rows of Parquet files: ``train-0.parquet/000000012/cat.jpg`` is row 12, whose image was ``cat.jpg``.

    The image column has the type ``Image`` of the Hugging Face Hub (structs with a field ``bytes``), or is binary. The
    label column holds numbers or names; of a ``ClassLabel`` the names that the file has for its numbers. Without such a
    column a folder ``label=NAME`` around the file is the label.
    """

    name: ClassVar[str] = "parquet"
    tables: ClassVar[Mapping[str, str]] = {"groups": "group", "positions": "position"}

    column: str
    """Column of the images."""
    inner: str
    """Field of the bytes where the column holds structs; empty for plain values."""
    groups: NDArray[np.int64]
    """``[num_rows]`` row group of each row in its file."""
    positions: NDArray[np.int64]
    """``[num_rows]`` place of each row in its row group."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, PARQUET)

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        one = Listing(paths=[], shards=[], tables=[""], unreadable=[], ignored={})
        return cls.open_shards(path, one, on_bad_image=on_bad_image, progress=progress)

    @classmethod
    def open_shards(cls, root: Path, listing: Listing, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        """The images in the Parquet files of a folder's listing."""
        _pyarrow()
        names = listing.tables
        _refuse_splits(root, names)
        tasks: list[tuple[int, int]] = []
        sizes, times, columns, numbers = [], [], [], []
        for shard in range(len(names)):
            with listing.local(root, names, shard) as file:
                try:
                    state = os.stat(file)
                except OSError as error:
                    raise ShardError(f"{file} cannot be read ({error.strerror or error}): correct the path") from None
                sizes.append(state.st_size)
                times.append(listing.remote.tags[shard] if listing.remote else state.st_mtime_ns)
                with _opened(file) as opened:
                    columns.append(find_columns(file, opened.schema_arrow))
                    numbers.append(has_numbers(opened.schema_arrow, columns[-1]))
                    tasks += [(shard, group) for group in range(opened.num_row_groups)]
        kinds = {(found.image, found.inner) for found in columns}
        if len(kinds) > 1:
            raise ShardError(
                f"{root} holds files with different columns of images "
                f"({', '.join(sorted(f'{image} {inner}'.strip() for image, inner in kinds))}): give each kind a folder "
                "of its own"
            )
        if {True, False} <= {*numbers}:
            first, other = names[numbers.index(True)], names[numbers.index(False)]
            raise ShardError(
                f"{root} holds files whose labels are numbers ({first}) and files whose labels are names ({other}): "
                "write them with one kind of label, or give each kind a folder of its own"
            )
        (column, inner) = kinds.pop()
        folders = [None if found.label else partition_label(name) for found, name in zip(columns, names, strict=True)]

        def look(task: tuple[int, int]) -> list[Found]:
            with listing.local(root, names, task[0]) as file:
                return list(_scan_group(file, task[1], columns[task[0]]))

        images: list[tuple[ListedImage, int, int]] = []
        bad = [*listing.unreadable]
        start = dict.fromkeys(range(len(names)), 0)
        for (shard, group), rows in map_threads(look, tasks, progress=progress, title="reading row groups", chunk=1):
            prefix = f"{names[shard]}/" if names[shard] else ""
            for position, row in enumerate(rows):
                path = f"{prefix}{start[shard] + position:09d}{row.name and '/'}{row.name}"
                if row.reason:
                    bad.append((path, row.reason))
                else:
                    images.append(
                        (ListedImage(path, row.bytes, row.sha1, row.label or folders[shard]), group, position)
                    )
            start[shard] += len(rows)
        images.sort(key=lambda image: image[0].path)
        paths = [image.path for image, _, _ in images]
        source = cls(
            root=root,
            paths=paths,
            shards=names,
            shard_sizes=np.array(sizes, dtype=np.int64),
            shard_times=np.array(times, dtype=np.int64),
            remote=listing.remote,
            shard_of=shard_index(names, paths),
            column=column,
            inner=inner,
            groups=np.array([group for _, group, _ in images], dtype=np.int64),
            positions=np.array([position for _, _, position in images], dtype=np.int64),
        )
        return Manifest.from_images(
            source,
            [image for image, _, _ in images],
            excluded=bad,
            ignored=other_files(root, listing, progress=progress),
            on_bad_image=on_bad_image,
            numbered=True,
        )

    def read(self, row: int) -> bytes:
        """ShardError: the file is gone, damaged, or its size is not what was indexed. Pages read last stay in memory
        (256 MiB a process); no file stays open."""
        value = self._value(int(self.shard_of[row]), int(self.groups[row]), int(self.positions[row]))
        if value is None:
            raise BadImageError("no image in this row of the table")
        return bytes(value)

    def _value(self, shard: int, group: int, position: int) -> memoryview | None:
        key = (self.shard_file(shard), int(self.shard_times[shard]), self.column, group)
        chunk = _CACHE.pages(key, lambda: self._find_pages(shard, group))
        if chunk is not None:
            page = int(np.searchsorted(chunk.starts, position, side="right")) - 1
            values = _CACHE.get((*key, page), lambda: self._read_page(shard, chunk, page))
            if values:
                # Damaged: pyarrow says how.
                with self._checked(shard), suppress(OSError, ValueError):
                    return values[0].value(position - int(chunk.starts[page]))
        return value_at(_CACHE.get(key, lambda: self._read_group(shard, group)), position)

    @contextmanager
    def _checked(self, shard: int) -> Iterator[str]:
        """Path of a shard that is there as it was indexed."""
        with self.local(shard) as file:
            try:
                now = os.stat(file).st_size
            except OSError as error:
                raise self.unreadable(shard, error) from None
            if now != self.shard_sizes[shard]:
                raise self.replaced(shard, now)
            yield file

    def _find_pages(self, shard: int, group: int) -> Chunk | None:
        with self._checked(shard) as file, _opened(file) as opened:
            return chunk_pages(file, opened, group, f"{self.column}.{self.inner}" if self.inner else self.column)

    def _read_page(self, shard: int, chunk: Chunk, page: int) -> list[Values]:
        with self._checked(shard) as file:
            found = read_page(file, chunk, page)
        return [] if found is None else [found]

    def _read_group(self, shard: int, group: int) -> list[Any]:
        column = f"{self.column}.{self.inner}" if self.inner else self.column
        with self._checked(shard) as file:
            try:
                with _opened(file) as opened:
                    table = opened.read_row_group(group, columns=[column], use_threads=False)
            except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
                raise _damaged(file, error) from None
        return [binary_values(chunk, self.inner) for chunk in table.column(self.column).chunks]

    def system_keys(self) -> Iterable[str | None]:
        """Names of images in a table lie in no folder."""
        return [None] * len(self)

    @classmethod
    def listed_shards(cls, listing: Listing) -> list[str]:
        return listing.tables

    def hashes(self, rows: Sequence[int]) -> Iterable[tuple[int, str]]:
        places = list(zip(self.shard_of[rows], self.groups[rows], strict=True)) if len(rows) else []
        parts: dict[tuple[int, int], list[int]] = {}
        for row, place in zip(rows, places, strict=True):
            parts.setdefault((int(place[0]), int(place[1])), []).append(row)

        def hash_group(place: tuple[int, int]) -> list[str]:
            chunks = self._read_group(*place)
            values = (value_at(chunks, int(self.positions[row])) for row in parts[place])
            return [content_hash(bytes(value[:HASHED_BYTES])) if value is not None else "" for value in values]

        for place, found in map_threads(hash_group, [*parts], progress=False, title="", chunk=1):
            yield from zip(parts[place], found, strict=True)

    @property
    def row_shards(self) -> NDArray[np.int64]:
        """A row group is what is read at once."""
        places = self.shard_of * (int(self.groups.max(initial=0)) + 1) + self.groups
        return np.unique(places, return_inverse=True)[1].astype(np.int64)

    def notes(self) -> Iterable[tuple[object, ...]]:
        return [("source", self.name), ("column", self.column, self.inner), *super().notes()]

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
        _, column, inner = next(note for note in notes if note[0] == "column")
        return cls(root=root, paths=paths, column=column, inner=inner, **cls.parsed(paths, notes, columns))


_CACHE = Cache()


def _pyarrow() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError("reading .parquet files needs pyarrow: pip install pyarrow") from None


def _opened(file: str) -> Any:
    """A ``ParquetFile``; ShardError where it is none."""
    try:
        # Not memory-mapped: a file that is cut short while it is mapped ends the process with SIGBUS.
        return _pyarrow().ParquetFile(file, memory_map=False, pre_buffer=False)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise ShardError(f"{file} cannot be read ({error.strerror})") from None
        raise _damaged(file, error) from None


def _damaged(file: str, error: Exception) -> ShardError:
    text = " ".join(str(error).split())
    return ShardError(f"{file} is not a whole Parquet file ({text:.160}; {os.path.getsize(file):,} bytes): {_REMEDY}")


def _refuse_splits(root: Path, names: Sequence[str]) -> None:
    """Splits that lie in one folder, as the Hub stores them, are not one data set."""
    splits: dict[str, dict[str, str]] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        if found := _SPLIT.fullmatch(base):
            splits.setdefault(folder + slash, {}).setdefault(found[1], name)
    for folder, found_there in splits.items():
        if len(found_there) > 1:
            first = next(iter(found_there))
            place = shlex.quote(str(root / folder / first))
            raise SourceError(
                f"{root / folder} holds the files of several splits ({', '.join(found_there)}): give each a folder of "
                f"its own, for example `mkdir {place} && mv {place}[-_.]*{PARQUET} {place}/`, and name that folder"
            )


def _scan_group(file: str, group: int, columns: Columns) -> Iterator[Found]:
    """Every row of a row group; the pages are decoded a few rows at a time."""
    wanted = [columns.image, *([columns.label] if columns.label else [])]
    try:
        with _opened(file) as opened:
            batches = opened.iter_batches(_BATCH, row_groups=[group], columns=wanted, use_threads=False)
            for batch in batches:
                yield from (found for found, _ in look_at_batch(file, batch, columns))
    except SourceError:
        raise
    except (ValueError, OSError) as error:
        raise _damaged(file, error) from None
