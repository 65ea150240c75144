"""The Parquet source: images are values of a binary column, read a page at a time (needs pyarrow).

Written for the tables of the Hugging Face Hub. What :mod:`sslfast.data.parquet_pages` does not read by the page or its
parts is decoded by the row group, so that a random order of all rows reads many times more than it uses:
``--loader.shuffle shards`` mixes the rows of few row groups at a time.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import MAX_BYTES, BadImageError, OnBadImage, open_header
from sslfast.data.listing import PARQUET, Listing, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.members import LABEL_NAMES, label_text
from sslfast.data.parquet_pages import Cache, Chunk, Values, chunk_pages, read_page
from sslfast.data.pool import map_threads
from sslfast.data.sharded import ShardedSource, ShardError, shard_index
from sslfast.data.source import HASHED_BYTES, ListedImage, SourceError, content_hash, is_file

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")
_BATCH = 64  # rows decoded at a time by the scan
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|eval)[-_.].*", re.IGNORECASE)
_REMEDY = "get a good copy"


class _Columns(NamedTuple):
    """What a file's schema says."""

    image: str
    """Name of the column."""
    inner: str
    """Field of the bytes in a column of structs; empty for plain binary values."""
    label: str
    """Name of the column; empty for none."""
    names: tuple[str, ...]
    """What the numbers of the label column mean; empty where they mean themselves."""


class _Found(NamedTuple):
    """One row of a row group."""

    name: str
    """Of the image in the table; empty for none."""
    bytes: int
    sha1: str
    label: str | None
    reason: str
    """Why it cannot be used; empty for good images."""


@dataclass(kw_only=True, eq=False, repr=False)
class ParquetSource(ShardedSource):
    """Rows of Parquet files: ``train-0.parquet/000000012/cat.jpg`` is row 12, whose image was ``cat.jpg``.

    The image column has the type ``Image`` of the Hugging Face Hub (structs with a field ``bytes``), or is binary. The
    label column holds numbers or names; of a ``ClassLabel`` the names that the file has for its numbers.
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
        files = [str(root / name) for name in names]
        tasks: list[tuple[int, int]] = []
        states, columns = [], []
        for shard, file in enumerate(files):
            try:
                states.append(os.stat(file))
            except OSError as error:
                raise ShardError(f"{file} cannot be read ({error.strerror or error}): correct the path") from None
            with _opened(file) as opened:
                columns.append(_find_columns(file, opened))
                tasks += [(shard, group) for group in range(opened.num_row_groups)]
        kinds = {(found.image, found.inner) for found in columns}
        if len(kinds) > 1:
            raise ShardError(
                f"{root} holds files with different columns of images "
                f"({', '.join(sorted(f'{image} {inner}'.strip() for image, inner in kinds))}): give each kind a folder "
                "of its own"
            )
        (column, inner) = kinds.pop()

        def look(task: tuple[int, int]) -> list[_Found]:
            return list(_scan_group(files[task[0]], task[1], columns[task[0]]))

        images: list[tuple[ListedImage, int, int]] = []
        bad = [*listing.unreadable]
        start = dict.fromkeys(range(len(files)), 0)
        for (shard, group), rows in map_threads(look, tasks, progress=progress, title="reading row groups", chunk=1):
            prefix = f"{names[shard]}/" if names[shard] else ""
            for position, row in enumerate(rows):
                path = f"{prefix}{start[shard] + position:09d}{row.name and '/'}{row.name}"
                if row.reason:
                    bad.append((path, row.reason))
                else:
                    images.append((ListedImage(path, row.bytes, row.sha1, row.label), group, position))
            start[shard] += len(rows)
        images.sort(key=lambda image: image[0].path)
        paths = [image.path for image, _, _ in images]
        source = cls(
            root=root,
            paths=paths,
            shards=names,
            shard_sizes=np.array([state.st_size for state in states], dtype=np.int64),
            shard_times=np.array([state.st_mtime_ns for state in states], dtype=np.int64),
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
                self._check_shard(shard)
                with suppress(OSError, ValueError):  # damaged: pyarrow says how
                    return values[0].value(position - int(chunk.starts[page]))
        return _value_at(_CACHE.get(key, lambda: self._read_group(shard, group)), position)

    def _check_shard(self, shard: int) -> str:
        """Path of a shard that is there as it was indexed."""
        file = self.shard_file(shard)
        try:
            now = os.stat(file).st_size
        except OSError as error:
            raise self.unreadable(shard, error) from None
        if now != self.shard_sizes[shard]:
            raise self.replaced(shard, now)
        return file

    def _find_pages(self, shard: int, group: int) -> Chunk | None:
        file = self._check_shard(shard)
        with _opened(file) as opened:
            return chunk_pages(file, opened, group, f"{self.column}.{self.inner}" if self.inner else self.column)

    def _read_page(self, shard: int, chunk: Chunk, page: int) -> list[Values]:
        found = read_page(self._check_shard(shard), chunk, page)
        return [] if found is None else [found]

    def _read_group(self, shard: int, group: int) -> list[Any]:
        file = self._check_shard(shard)
        column = f"{self.column}.{self.inner}" if self.inner else self.column
        try:
            with _opened(file) as opened:
                table = opened.read_row_group(group, columns=[column], use_threads=False)
        except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
            raise _damaged(file, error) from None
        return [_binary(chunk, self.inner) for chunk in table.column(self.column).chunks]

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
            values = (_value_at(chunks, int(self.positions[row])) for row in parts[place])
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


def _find_columns(file: str, opened: Any) -> _Columns:
    schema = opened.schema_arrow
    types = {field.name: field.type for field in schema}
    features = _features(schema.metadata or {})
    images = {name: inner for name, kind in types.items() if (inner := _bytes_field(kind)) is not None}
    typed = [name for name in images if _kind(features, name) == "Image"]
    candidates = typed or [name for name in images if name.lower() not in LABEL_NAMES] or [*images]
    named = [name for name in _IMAGE_NAMES for column in candidates if column.lower() == name]
    if not candidates:
        raise ShardError(
            f"{file} has no column of images, which is binary or has structs with a field bytes (its columns: "
            f"{', '.join(types)}): write the image files into such a column"
        )
    if len(candidates) > 1 and not named:
        raise ShardError(
            f"{file} has several columns of images ({', '.join(candidates)}): write a table with one of them, or name "
            "one image"
        )
    image = next((column for column in candidates if named and column.lower() == named[0]), candidates[0])
    lowered = {name.lower(): name for name in types if name != image}
    classes = [name for name in types if _kind(features, name) == "ClassLabel"]
    label = next((lowered[name] for name in LABEL_NAMES if name in lowered), "")
    if not label and len(classes) > 1:
        raise ShardError(
            f"{file} has several columns of classes ({', '.join(classes)}): write a table with one of them, or name "
            "one label"
        )
    label = label or (classes[0] if classes else "")
    names = features.get(label, {}).get("names") if _kind(features, label) == "ClassLabel" else None
    return _Columns(image, images[image] or "", label, tuple(map(str, names)) if isinstance(names, list) else ())


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Column -> what the Hub's metadata says of it."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _bytes_field(kind: Any) -> str | None:
    """Of a column's type: the field that holds bytes, empty for the values themselves; None: it holds none."""
    types = import_module("pyarrow.types")
    names = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")  # the last since pyarrow 16
    if any(getattr(types, name)(kind) for name in names if hasattr(types, name)):
        return ""
    if not types.is_struct(kind):
        return None
    fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    return "bytes" if "bytes" in fields and _bytes_field(fields["bytes"]) == "" else None


def _scan_group(file: str, group: int, columns: _Columns) -> Iterator[_Found]:
    """Every row of a row group; the pages are decoded a few rows at a time."""
    wanted = [columns.image, *([columns.label] if columns.label else [])]
    try:
        with _opened(file) as opened:
            batches = opened.iter_batches(_BATCH, row_groups=[group], columns=wanted, use_threads=False)
            for batch in batches:
                values = _binary(batch.column(columns.image), columns.inner)
                names = _names(batch.column(columns.image), columns)
                labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(values)
                for at, (name, label) in enumerate(zip(names, labels, strict=True)):
                    yield _look(_value_at([values], at), name, _label(file, label, columns))
    except SourceError:
        raise
    except (ValueError, OSError) as error:
        raise _damaged(file, error) from None


def _look(value: memoryview | None, name: str, label: str | None) -> _Found:
    reason = ""
    if value is None:
        reason = "no image in this row of the table: put the image file's bytes into it"
    elif not len(value):
        reason = "empty file"
    elif len(value) > MAX_BYTES:
        reason = f"too large: a file of {len(value):,} bytes, at most {MAX_BYTES:,}"
    else:
        try:
            open_header(BytesIO(value))
        except BadImageError as error:
            reason = error.reason
    head = b"" if value is None else bytes(value[:HASHED_BYTES])
    return _Found(name, 0 if value is None else len(value), content_hash(head), label, reason)


def _label(file: str, value: Any, columns: _Columns) -> str | None:
    """The class of a row. Of a ``ClassLabel`` -1 stands for none, as in the Hub's test sets."""
    if value is None or (columns.names and value == -1):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and columns.names:
        if not 0 <= value < len(columns.names):
            raise ShardError(
                f"{file}: label {value} in column {columns.label!r}, which names {len(columns.names)} classes: write "
                "the table again"
            )
        return columns.names[value]
    if isinstance(value, bytes):  # a column of text whose writer did not say so
        value = value.decode("utf-8", "surrogateescape")
    text = label_text(int(value) if isinstance(value, bool) else value)
    if text is None:
        raise ShardError(
            f"{file} has a label that is neither a number nor a name in column {columns.label!r}: {value!r:.60}; write "
            "the table again with one label a row"
        )
    return text


def _binary(column: Any, inner: str) -> Any:
    """The array of bytes in an array of a column."""
    if not inner:
        return column
    position = column.type.get_field_index(inner)
    return column.flatten()[position]  # null where the struct is


def _names(column: Any, columns: _Columns) -> list[str]:
    """File name of each image of an array, empty where the table has none."""
    position = column.type.get_field_index("path") if columns.inner else -1
    if position < 0:
        return [""] * len(column)
    values = column.flatten()[position].to_pylist()
    return [value.rpartition("/")[2] if isinstance(value, str) and "\0" not in value else "" for value in values]


def _value_at(chunks: Sequence[Any], position: int) -> memoryview | None:
    """One value of a column's arrays, without a copy."""
    for chunk in chunks:
        if position < len(chunk):
            buffer = chunk[position].as_buffer()
            return None if buffer is None else memoryview(buffer)
        position -= len(chunk)
    return None
