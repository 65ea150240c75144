"""The Arrow source: a folder that ``datasets`` wrote by ``save_to_disk``, or one .arrow file (needs pyarrow)."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sslfast.data.hub_columns import Columns, binary_values, find_columns, look_at_batch
from sslfast.data.images import OnBadImage
from sslfast.data.listing import Listing
from sslfast.data.manifest import Manifest
from sslfast.data.pool import map_threads
from sslfast.data.sharded import ShardError, shard_index
from sslfast.data.source import ListedImage, SourceError, is_file
from sslfast.data.tar import TarSource

ARROW = ".arrow"
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(kw_only=True, eq=False, repr=False)
class ArrowSource(TarSource):
    """Rows of Arrow files, as :class:`~sslfast.data.parquet.ParquetSource` has those of Parquet files. Arrow stores the
    bytes of an image as they are, so that each row is read by one ``pread`` at its offset in the file.
    """

    name: ClassVar[str] = "arrow"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ARROW) or any((path / name).is_file() for name in (_STATE, _SPLITS))

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        if (path / _SPLITS).is_file():
            splits = _json(path / _SPLITS).get("splits", [])
            names = ", ".join(map(str, splits))
            raise SourceError(f"{path} holds the splits {names}: give one of them, for example {path}/{splits[0]}")
        shards = [""]
        if path.is_dir():
            state = _json(path / _STATE)
            if state.get("_indices_data_files") or state.get("_indices_files"):
                raise SourceError(f"{path} was saved with an index beside its rows: save it again by save_to_disk")
            shards = [str(one["filename"]) for one in state.get("_data_files", [])]

        def look(name: str) -> "_ArrowShard":
            return _ArrowShard(path / name)

        found: list[tuple[ListedImage, int]] = []
        bad: list[tuple[str, str]] = []
        opened = []
        for name, shard in map_threads(look, shards, progress=progress, title="reading tables", chunk=1):
            prefix = f"{name}/" if name else ""
            found += [(image._replace(path=prefix + image.path), offset) for image, offset in shard.images]
            bad += [(prefix + row, reason) for row, reason in shard.bad]
            opened.append(shard)
        found.sort(key=lambda item: item[0].path)
        paths = [image.path for image, _ in found]
        source = cls(
            root=path,
            paths=paths,
            shards=shards,
            shard_sizes=np.array([shard.bytes for shard in opened], dtype=np.int64),
            shard_times=np.array([shard.modified for shard in opened], dtype=np.int64),
            shard_of=shard_index(shards, paths),
            offsets=np.array([offset for _, offset in found], dtype=np.int64),
            sizes=np.array([image.bytes for image, _ in found], dtype=np.int64),
        )
        images = [image for image, _ in found]
        return Manifest.from_images(source, images, excluded=bad, on_bad_image=on_bad_image, numbered=True)

    @classmethod
    def listed_shards(cls, listing: Listing) -> list[str]:
        return []  # state.json names them, not the folder

    def system_keys(self) -> Iterable[None]:
        return [None] * len(self)

    def notes(self) -> Iterable[tuple[object, ...]]:
        return [("source", self.name), *super().notes()]

    @classmethod
    def wrote(cls, notes: object, columns: object) -> bool:
        return False


class _ArrowShard:
    """What one file holds."""

    def __init__(self, file: Path) -> None:
        self.images: list[tuple[ListedImage, int]] = []
        self.bad: list[tuple[str, str]] = []
        pyarrow = _pyarrow()
        try:
            status = file.stat()
            self.bytes, self.modified = status.st_size, status.st_mtime_ns
            with pyarrow.memory_map(str(file)) as opened:
                whole = opened.read_buffer()
                self._read(str(file), whole, _batches(pyarrow, whole))
        except SourceError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            if isinstance(error, OSError) and error.strerror:
                raise ShardError(f"{file} cannot be read ({error.strerror}): correct the path") from None
            text = " ".join(str(error).split())
            raise ShardError(
                f"{file} is not a whole Arrow file ({text:.160}; {self.bytes:,} bytes): get a good copy"
            ) from None

    def _read(self, file: str, whole: Any, batches: Iterator[Any]) -> None:
        start, columns = 0, None
        for batch in batches:
            columns = columns or find_columns(file, batch.schema)
            places = _offsets(file, whole, batch.column(columns.image), columns)
            for row, (found, _) in enumerate(look_at_batch(file, batch, columns), start):
                path = f"{row:09d}{found.name and '/'}{found.name}"
                if found.reason:
                    self.bad.append((path, found.reason))
                else:
                    image = ListedImage(path, found.bytes, found.sha1, found.label)
                    self.images.append((image, int(places[row - start])))
            start += len(places)


def _batches(pyarrow: Any, whole: Any) -> Iterator[Any]:
    if bytes(whole[:6]) == b"ARROW1":  # a file with a table of contents; `datasets` writes streams
        reader = pyarrow.ipc.open_file(whole)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(pyarrow.ipc.open_stream(whole))


def _offsets(file: str, whole: Any, column: Any, columns: Columns) -> NDArray[np.int64]:
    """``[rows]`` where the bytes of each value of an array begin in the file."""
    values = binary_values(column, columns.inner)
    types = _pyarrow().types
    if not (types.is_binary(values.type) or types.is_large_binary(values.type)):
        raise ShardError(f"{file} has images of the Arrow type {values.type}: write them as binary")
    _, ends, data = values.buffers()
    width = np.int64 if types.is_large_binary(values.type) else np.int32
    offsets = np.frombuffer(ends, dtype=width)[values.offset : values.offset + len(values)].astype(np.int64)
    if data is None or not data.size:
        return offsets
    start = data.address - whole.address
    if not 0 <= start <= whole.size - data.size:
        raise ShardError(f"{file} is compressed, so that no image can be read alone: write it without compression")
    return offsets + start


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error}): save the dataset again by save_to_disk") from None
    return value if isinstance(value, dict) else {}


def _pyarrow() -> Any:
    try:
        import_module("pyarrow.ipc")
        return import_module("pyarrow")
    except ImportError:
        raise ImportError("reading .arrow files needs pyarrow: pip install pyarrow") from None
