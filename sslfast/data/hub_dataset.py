"""The source of a ``datasets.Dataset`` object of Hugging Face: row ``i`` is its row ``i``, whose bytes are not decoded
before a loader does it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sslfast.data.hub_columns import (
    Columns,
    Found,
    binary_values,
    find_columns,
    look_at_batch,
    read_label,
    value_at,
)
from sslfast.data.images import BadImageError, OnBadImage, read_bytes
from sslfast.data.listing import identify
from sslfast.data.manifest import Manifest
from sslfast.data.source import ListedImage, SourceError
from sslfast.data.torch_dataset import TorchDatasetSource, kind_of

_BATCH = 64
_KINDS = ("datasets.arrow_dataset.Dataset", "datasets.dataset_dict.", "datasets.iterable_dataset.")


@dataclass(kw_only=True, eq=False, repr=False)
class HubDatasetSource(TorchDatasetSource):
    """Rows of a ``datasets.Dataset`` with a column of images (their bytes, or paths of files on this machine), and
    perhaps one of classes.

    The scan reads the header of every image. A resume compares the number of rows, the labels and the contents of 16
    rows spread over all.
    """

    name: ClassVar[str] = "hub"

    _columns: Columns | None = field(default=None, init=False)
    _images: Any = field(default=None, init=False)
    """Its column of images, without decoding."""

    @classmethod
    def takes(cls, data: object) -> bool:
        """SourceError: several splits, or a stream."""
        kind = next((kind for base in type(data).__mro__ if (kind := _kind_of_class(base)).startswith(_KINDS)), "")
        if kind.startswith(_KINDS[1:]) and isinstance(data, dict) and data:
            splits = [str(name) for name in data]
            raise SourceError(f"this DatasetDict has the splits {', '.join(splits)}: give one, data[{splits[0]!r}]")
        if kind.startswith(_KINDS[2]) or (kind.startswith(_KINDS[1]) and not isinstance(data, dict)):
            raise SourceError(
                f"a {kind_of(data)} is a stream, whose rows have no numbers, which are the identity of an image in "
                "banks, orders and resumed runs: load the dataset without streaming=True"
            )
        return bool(kind)

    @classmethod
    def open(cls, path: Any, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        columns, images, rows = columns_of(path), [], []
        bad: list[tuple[str, str]] = []
        source = cls(root=Path("dataset").absolute(), paths=[], kind=kind_of(path), dataset=path)
        wanted = [columns.image, *([columns.label] if columns.label else [])]
        row = 0
        for batch in path.select_columns(wanted).with_format("arrow").iter(batch_size=_BATCH):
            files = batch.column(columns.image).combine_chunks()
            for at, (found, value) in enumerate(look_at_batch(str(source), batch, columns)):
                name = f"{row:09d}{found.name and '/'}{found.name}"
                if value is None and (file := _path(files[at], columns)):
                    found = _look_at_file(found, file)
                if found.reason:
                    bad.append((name, found.reason))
                else:
                    images.append(ListedImage(name, found.bytes, found.sha1, found.label))
                    rows.append(row)
                row += 1
        source.paths, source.rows = [image.path for image in images], np.array(rows, dtype=np.int64)
        return Manifest.from_images(source, images, excluded=bad, on_bad_image=on_bad_image, numbered=True)

    def read(self, row: int) -> bytes:
        if self._images is None:
            self._columns = columns_of(self._known())
            self._images = self._known().select_columns([self._columns.image]).with_format("arrow")
        assert self._columns is not None
        column = self._images[int(self.rows[row])].column(0).combine_chunks()
        value = value_at([binary_values(column, self._columns.inner)], 0)
        if value is not None:
            return bytes(value)
        if file := _path(column[0], self._columns):
            return read_bytes(file)
        raise BadImageError("no image in this row of the table")

    def stated_labels(self) -> list[str | None] | None:
        data, columns = self._known(), columns_of(self.dataset)
        if not columns.label:
            return None
        values = data.select_columns([columns.label]).with_format("arrow")[:].column(0).to_pylist()
        return [read_label(str(self), value, columns) for value in values]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_images": None}

    def late_labels(self) -> None:
        """A column has them, or there are none."""


def columns_of(dataset: Any) -> Columns:
    """The columns of images and labels of a ``datasets.Dataset``."""
    return find_columns("the dataset", dataset.features.arrow_schema)


def _kind_of_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _path(value: Any, columns: Columns) -> str:
    """The file that a value without bytes names; empty for none."""
    fields = value.as_py() if columns.inner else None
    return str((fields or {}).get("path") or "")


def _look_at_file(found: Found, file: str) -> Found:
    seen = identify(file, read=True, header=True)
    if isinstance(seen, str):
        return found._replace(reason=seen)
    return found._replace(bytes=seen[0], sha1=seen[1], reason="")
