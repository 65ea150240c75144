"""The source of a ``torch.utils.data.Dataset`` object: row ``i`` is its item ``i``."""

import os
import pickle
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from sslfast.data.images import BadImageError, OnBadImage
from sslfast.data.manifest import Manifest
from sslfast.data.members import label_text
from sslfast.data.pixels_file import image_file, image_of
from sslfast.data.source import DATA_OBJECTS, HASHED_BYTES, Changes, ImageSource, ListedImage, SourceError, content_hash

_PROBED = 16
_REMEDY = "give the dataset that the run started with, or choose another output directory"


@dataclass(kw_only=True, eq=False, repr=False)
class TorchDatasetSource(ImageSource):
    """Items of a dataset in map style: images, or tuples that begin with one (see
    :func:`~sslfast.data.pixels_file.image_file`). Paths are row numbers.

    Labels are the attribute ``targets`` or ``labels``, named by ``wnids`` or ``classes``, also through ``Subset`` and
    ``ConcatDataset``; where there is none, :meth:`late_labels` reads every item.

    A dataset is not decoded for the scan, as that of image files is not: images that cannot be used are found when they
    are read. What a resume checks is the number of items, the class, the labels in ``targets``, and a hash of 16 items
    spread over all; other items that changed are not noticed.
    """

    name: ClassVar[str] = "torch"

    kind: str
    """Module and name of its class."""
    dataset: Any = None
    """None: read from a manifest, and not yet given again."""
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """``[num_rows]`` item of each row."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return False

    @classmethod
    def takes(cls, data: object) -> bool:
        """Whatever has ``__getitem__`` and ``__len__``. SourceError: a dataset without them."""
        if isinstance(data, IterableDataset):
            raise SourceError(
                f"{kind_of(data)} is an IterableDataset, whose items have no numbers, which are the identity of an "
                f"image in banks, orders and resumed runs: {DATA_OBJECTS}"
            )
        is_mapping = isinstance(data, Mapping | str | bytes | Path | tuple | list)
        return not is_mapping and hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__")

    @classmethod
    def open(cls, path: Any, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        kind, count = kind_of(path), len(path)
        paths = [f"{row:09d}" for row in range(count)]
        rows = np.arange(count, dtype=np.int64)
        source = cls(root=Path(kind).absolute(), paths=paths, kind=kind, dataset=path, rows=rows)
        labels = source.stated_labels() or [None] * count
        if len(labels) != count:
            raise SourceError(f"{source} has {len(labels)} targets: give both the same length")
        probed = dict(source.probed())
        images = [
            ListedImage(name, *probed.get(row, (0, "")), label)
            for row, (name, label) in enumerate(zip(paths, labels, strict=True))
        ]
        return Manifest.from_images(source, images, excluded=[], on_bad_image=on_bad_image, numbered=True)

    def probed(self) -> Iterator[tuple[int, tuple[int, str]]]:
        """Row, and size and hash of the image, of up to 16 rows; SourceError where an item differs at each call. An
        item that cannot be used has neither."""
        for row in _spread(range(len(self))):
            try:
                data = self.read(row)
                again = self.read(row)
            except BadImageError:
                continue
            if data != again:
                raise SourceError(
                    f"item {row} of {self} is another image at each call (a random transform?): sslfast draws the "
                    "views itself; give the dataset without transform (transform=None)"
                )
            yield row, (len(data), content_hash(data[:HASHED_BYTES]))

    def read(self, row: int) -> bytes:
        """An image file of the item (:func:`~sslfast.data.pixels_file.image_file`). What ``__getitem__`` raises makes
        the image a bad one. One thread of a process at a time: datasets need not be safe for threads."""
        item = self._item(row)
        try:
            return image_file(image_of(item))
        except SourceError as error:
            raise SourceError(f"{self}: {error}") from None

    def _item(self, row: int) -> Any:
        dataset = self._known()
        try:
            with _LOCK[0]:
                return dataset[int(self.rows[row])]
        except MemoryError:
            raise
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadImageError(f"its dataset raises {why:.200}") from None

    def _known(self) -> Any:
        if self.dataset is None:
            raise SourceError(f"{self} is known by its manifest only: {_REMEDY}")
        return self.dataset

    def stated_labels(self) -> list[str | None] | None:
        """Of every item, without reading an image; None where the dataset does not say."""
        return _stated_labels(self.dataset)

    def late_labels(self) -> list[str | None] | None:
        """The second of each item, where it is a number or a name; every item is read for it."""
        return [self._late_label(row) for row in range(len(self))]

    def _late_label(self, row: int) -> str | None:
        try:
            item = self._item(row)
        except BadImageError:
            return None
        return _label(item[1]) if isinstance(item, tuple | list) and len(item) > 1 else None

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """By class, length, labels and the rows that were hashed."""
        changes = Changes()
        kind, count = kind_of(self.dataset), 0 if self.dataset is None else len(self.dataset)
        if kind != self.kind:
            changes.changed.append(("class of the dataset", f"{self.kind} -> {kind}"))
        wanted = 1 + max(int(self.rows.max(initial=-1)), *(_number(path) for path, _ in manifest.excluded), -1)
        changes.missing = [(f"{row:09d}", "") for row in range(count, wanted)]
        changes.added = [(f"{row:09d}", "") for row in range(wanted, count)]
        if changes.missing:
            return changes
        known = [row for row, sha1 in enumerate(manifest.sha1) if sha1]
        for row in known if contents else _spread(known):
            try:
                now = content_hash(self.read(row)[:HASHED_BYTES])
            except BadImageError as error:
                changes.unreadable.append((self.paths[row], error.reason))
            else:
                if now != manifest.sha1[row]:
                    changes.changed.append((self.paths[row], "other content"))
        labels = self.stated_labels()
        then = [manifest.classes[label] if label >= 0 else None for label in manifest.labels]
        if labels is not None and (found := [row for row, label in enumerate(then) if labels[self.rows[row]] != label]):
            changes.changed.append((f"labels of {len(found)} items", ""))
        return changes

    def where(self, row: int) -> str:
        return f"item {int(self.rows[row])} of {self.kind}"

    def system_keys(self) -> Iterable[None]:
        return [None] * len(self)

    def bind(self, data: Any) -> Self:
        return replace(self, dataset=data)

    def take(self, rows: NDArray[np.int64]) -> Self:
        return replace(super().take(rows), rows=self.rows[rows])

    def notes(self) -> Iterable[tuple[object, ...]]:
        return [("source", self.name), ("dataset", self.kind)]

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
        kind = next(note[1] for note in notes if note[0] == "dataset")
        return cls(root=root, paths=paths, kind=kind, rows=np.array([_number(path) for path in paths], dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        try:
            return vars(self) | {"dataset": pickle.dumps(self.dataset, protocol=pickle.HIGHEST_PROTOCOL)}
        except Exception as error:  # pickle raises arbitrary exceptions
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise SourceError(
                f"{self} cannot be sent to loader processes ({why:.200}): define its class and functions at the top "
                "of a module, without lambda and open files, or set loader.workers to 0"
            ) from None

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"dataset": pickle.loads(state["dataset"])})

    def __str__(self) -> str:
        return f"{self.kind} of {len(self if self.dataset is None else self.dataset):,} items"


def _spread(rows: Sequence[int]) -> list[int]:
    """Up to 16 of the rows, the first and the last among them."""
    if not len(rows):
        return []
    return [rows[int(place)] for place in np.unique(np.linspace(0, len(rows) - 1, _PROBED).round())]


def _number(path: str) -> int:
    """The row that a path names: ``000000012/cat.jpg``."""
    return int(path.partition("/")[0])


_LOCK = [threading.Lock()]


def _new_lock() -> None:
    """A forked process has the lock as it was, maybe held by a thread that it does not have."""
    _LOCK[0] = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def kind_of(data: object) -> str:
    """Module and name of the class of an object; of a subset, of what it is one of."""
    while isinstance(data, Subset):
        data = data.dataset
    return f"{type(data).__module__}.{type(data).__qualname__}"


def _stated_labels(dataset: Any) -> list[str | None] | None:
    """Of every item, without reading one; None where the dataset does not say."""
    if isinstance(dataset, Subset):
        inner = _stated_labels(dataset.dataset)
        return None if inner is None else [inner[int(row)] for row in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_stated_labels(part) for part in dataset.datasets]
        return None if None in parts else [label for part in parts for label in part or ()]
    found = next(
        (values for name in ("targets", "labels") if (values := getattr(dataset, name, None)) is not None), None
    )
    if found is None or isinstance(found, str | Mapping) or not hasattr(found, "__len__"):
        return None
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    labels = [_label(value) for value in values]
    numbers = [int(label) for label in labels if label is not None and label.isdecimal()]
    if len(numbers) < sum(label is not None for label in labels):
        return labels
    for name in ("wnids", "classes"):
        names = getattr(dataset, name, None)
        is_named = isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)
        if is_named and names and max(numbers, default=0) < len(names) == len(set(names)):
            return [None if label is None else names[int(label)] for label in labels]
    return labels


def _label(value: Any) -> str | None:
    """A number or a name; -1, several numbers and everything else: no label."""
    if hasattr(value, "item"):  # a number of numpy or torch
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    text = label_text(value)
    return None if text == "-1" else text
