"""The interface of an image source, and the table of the sources that sslfast knows.

A source says where the bytes of every row are. The numbered list itself (path, size, hash and label of each row) is the
:class:`~sslfast.data.manifest.Manifest`, which holds its source.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import Decoding, OnBadImage
from sslfast.data.left_out import system_key
from sslfast.plugins import load_plugins

if TYPE_CHECKING:
    from sslfast.data.manifest import Manifest

SOURCES = (
    "beton:BetonSource",
    "csv_list:CsvListSource",
    "text_list:TextListSource",
    "zipped:ZipSource",
    "tar:TarSource",
    "parquet:ParquetSource",
    "arrow:ArrowSource",
    "parts:PartsSource",
    "remote:RemoteShards",
    "hub_dataset:HubDatasetSource",
    "torch_dataset:TorchDatasetSource",
    "folder:FolderSource",
)
"""``module:class`` of every source, in ``sslfast.data``. The first one that accepts a DATA argument opens it."""

HASHED_BYTES = 16384
_STRINGS = 1 << 16  # that are objects at a time

DATA_FORMS = (
    "DATA is a folder of images or of .tar or .parquet shards, one .tar, .parquet, .arrow or .zip file, a folder of "
    "datasets' save_to_disk, a list of image files (.csv, .tsv, .txt, .lst, .json, .jsonl), a manifest of `sslfast "
    "data verify` (.tsv), a file of such names (.roots), a .beton file, or the "
    "URL of .tar or .parquet shards (https, s3, gs, hf)"
)
"""For error texts: every form."""
DATA_OBJECTS = (
    "give a path, a torch.utils.data.Dataset with __len__ and __getitem__, a datasets.Dataset, or a list of these"
)
"""For error texts: what Python code may give."""


class SourceError(ValueError):
    """The data as a whole cannot be used, or is no longer what the manifest recorded. ``--on-bad-image skip`` does not
    apply."""


class ListedImage(NamedTuple):
    """One usable image that a source found."""

    path: str
    """Relative posix path: its identity, and what rows are ordered by."""
    bytes: int
    """Size of the image file."""
    sha1: str
    """:func:`content_hash` of its first ``HASHED_BYTES``."""
    label: str | None = None
    """Name of its class."""


@dataclass(kw_only=True)
class Changes:
    """How the data differs from a manifest: paths, each with a short remark that may be empty."""

    missing: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Files that are gone or cannot be opened: bad images to ``--on-bad-image skip``, missing to ``error``."""
    changed: list[tuple[str, str]] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)


@dataclass(kw_only=True, eq=False, repr=False)
class ImageSource(ABC):
    """A place that images come from: one file in ``sslfast/data``, and one entry in ``SOURCES``.

    A new source defines ``name``, :meth:`accepts`, :meth:`open`, :meth:`read` and :meth:`changes`; the other members
    have defaults that fit sources whose rows need no more than their path. ``csv_list.py`` is a short example,
    ``tar.py`` one with tables of its own.

    Loader processes get a :meth:`packed` copy, so a source must be picklable, and whatever it knows of each row belongs
    into numpy arrays: millions of Python objects would be copied page by page into every forked process.
    """

    name: ClassVar[str]
    """Written into manifests as ``# source``; it must never change."""
    loader: ClassVar[str | None] = None
    """The one loader that reads this source; None: :meth:`read` returns image files, which most loaders decode."""

    root: Path
    """Absolute: the folder that paths are relative to, or the file that DATA names."""
    paths: Sequence[str]
    """Relative posix path of every row, in row order: the same list as the manifest's."""
    decoding: Decoding = field(default_factory=Decoding)
    """How its image files become pixels."""

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a DATA argument is of this kind, by its name and by whether it is a folder; nothing is opened."""

    @classmethod
    def takes(cls, data: object) -> bool:
        """Whether data that is no path on this machine, as :func:`as_data` gives it, is of this kind."""
        return False

    @classmethod
    @abstractmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> "Manifest":
        """Number the usable images: ``Manifest.from_images(source, images, ...)``.

        Args:
            path: absolute, accepted by :meth:`accepts`; of a source that :meth:`takes` other data, that.
            on_bad_image: hand it to ``from_images`` together with what cannot be used.
            progress: show a progress bar on the terminal.

        Raises:
            ValueError: the data cannot be used; one line that names it and the remedy.
        """

    def read(self, row: int) -> bytes:
        """The image file of a row. Called from many threads and processes at once.

        Raises:
            BadImageError: this image cannot be read; ``--on-bad-image skip`` replaces it.
            SourceError: the data is gone or is not what the manifest recorded; never skipped.
        """
        raise SourceError(f"{self} holds no image files: use --loader.name {self.loader}")

    @abstractmethod
    def changes(self, manifest: "Manifest", *, contents: bool) -> Changes:
        """What is missing, changed and added now, compared with the manifest of this source.

        Args:
            manifest: ``paths``, ``bytes`` and ``sha1`` by row, and ``excluded``, which are known and not ``added``.
            contents: also compare the hashes of the contents; without it only what costs no reading.
        """

    def system_keys(self) -> Iterable[str | None]:
        """Of each row: the system folder (see :mod:`sslfast.data.left_out`) that it is in. Scans leave such files out;
        manifests of earlier versions may have them."""
        return map(system_key, self.paths)

    def where(self, row: int) -> str:
        """The path of a row, for messages."""
        return f"{self.root}/{self.paths[row]}"

    def bind(self, data: Any) -> Self:
        """The source that a manifest file described, of the data that is given now: a path, or what :meth:`takes`
        accepts. :meth:`changes` finds out whether it is the same."""
        return replace(self, root=data)

    @property
    def row_shards(self) -> NDArray[np.int64] | None:
        """``[num_rows]`` shard of each row, numbered from 0, for ``--loader.shuffle shards``; None: not sharded."""
        return None

    def identity(self) -> str:
        """Name of the stored bytes where paths, sizes and hashes do not determine them; compared when a run resumes."""
        return ""

    def late_labels(self) -> Sequence[str | None] | None:
        """Name of each row's class where only reading every image tells it; None: it does not."""
        return None

    def take(self, rows: NDArray[np.int64]) -> Self:
        """The source of some of the rows, numbered anew. Override it where there are further tables by row."""
        return replace(self, paths=taken(self.paths, rows))

    def packed(self) -> Self:
        """A copy for worker processes, without a Python object per row."""
        return replace(self, paths=PackedPaths(self.paths))

    def columns(self) -> Mapping[str, Iterable[object]]:
        """Further columns of the manifest file, a value for each row. They are part of its digest."""
        return {}

    def notes(self) -> Iterable[tuple[object, ...]]:
        """Further header lines of the manifest file: a keyword and its values."""
        return [("source", self.name)]

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
        """The source from what :meth:`columns` and :meth:`notes` wrote; KeyError or ValueError where it is damaged.

        Args:
            root: where the data is now.
            paths, sizes: of the rows.
            notes: every header line, split.
            columns: values by row.
        """
        return cls(root=root, paths=paths)

    @classmethod
    def wrote(cls, notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]) -> bool:
        """Whether a manifest without a ``# source`` line is of this source: for those older than that line."""
        return False

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        """What DATA named, for messages."""
        return str(self.root)


class ImageLocation(NamedTuple):
    """One row of a source, to be read later."""

    source: ImageSource
    row: int

    def read(self) -> bytes:
        """The image file; raises what :meth:`ImageSource.read` raises."""
        return self.source.read(self.row)

    def __str__(self) -> str:
        return self.source.where(self.row)


class PackedPaths(Sequence[str]):
    """A read-only list of strings in two arrays.

    A million ``str`` objects would be copied page by page into every forked worker as their reference counts change,
    and take three times the memory. Equal to a list of the same strings.
    """

    _ends: NDArray[np.int64]
    _text: NDArray[np.uint8]

    def __init__(self, paths: Iterable[str]) -> None:
        if isinstance(paths, PackedPaths):
            self._ends, self._text = paths._ends, paths._text
            return
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_text(cls, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> "PackedPaths":
        """The strings whose UTF-8 bytes are ``text[: ends[0]]``, ``text[ends[0] : ends[1]]`` and so on."""
        packed = cls(())
        packed._ends, packed._text = ends, text
        return packed

    @classmethod
    def join(cls, parts: Iterable["PackedPaths"]) -> "PackedPaths":
        """The strings of all parts, one after the other."""
        parts = list(parts)
        if not parts:
            return cls(())
        starts = np.cumsum([0, *(len(part._text) for part in parts)])
        return cls.of_text(
            np.concatenate([part._text for part in parts]),
            np.concatenate([part._ends + start for part, start in zip(parts, starts, strict=False)]),
        )

    def take(self, rows: NDArray[np.int64]) -> "PackedPaths":
        """The strings at some places."""
        parts = []
        for chosen in (rows[start : start + _STRINGS] for start in range(0, len(rows), _STRINGS)):
            ends = self._ends[chosen]
            starts = np.where(chosen > 0, self._ends[chosen - 1], 0)
            lengths = ends - starts
            new_ends = np.cumsum(lengths)
            places = np.repeat(starts - (new_ends - lengths), lengths) + np.arange(lengths.sum())
            parts.append(self.of_text(self._text[places], new_ends))
        return self.join(parts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedPaths):
            return np.array_equal(self._ends, other._ends) and np.array_equal(self._text, other._text)
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _STRINGS):
            yield from self._strings(start, min(start + _STRINGS, len(self)))

    def _strings(self, first: int, last: int) -> list[str]:
        """Those from ``first`` up to ``last``, which is larger."""
        begin = int(self._ends[first - 1]) if first else 0
        ends = (self._ends[first:last] - begin).tolist()
        data = self._text[begin : begin + ends[-1]].tobytes()
        spans = zip([0, *ends], ends, strict=False)
        if data.isascii():  # characters are bytes
            text = data.decode("ascii")
            return [text[start:end] for start, end in spans]
        return [data[start:end].decode("utf-8", "surrogateescape") for start, end in spans]

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        start = int(self._ends[row - 1]) if row else 0
        return self._text[start : self._ends[row]].tobytes().decode("utf-8", "surrogateescape")


def taken(strings: Sequence[str], rows: NDArray[np.int64]) -> Sequence[str]:
    """The strings at some places."""
    return strings.take(rows) if isinstance(strings, PackedPaths) else [strings[row] for row in rows.tolist()]


def all_sources() -> list[type[ImageSource]]:
    """The classes of ``SOURCES``, in order."""
    # By name: the modules of the sources import this one.
    entries = [entry.split(":") for entry in SOURCES]
    return [getattr(import_module(f"sslfast.data.{module}"), name) for module, name in entries]


_registered: dict[str, type[ImageSource]] = {}
_GENERAL = ("remote", "torch", "folder")
"""Sources that take whatever looks roughly like theirs: registered ones are asked before them."""
S = TypeVar("S", bound=type[ImageSource])


def register_source(source: S) -> S:
    """Decorator: lets DATA be of a source outside this package; see :class:`ImageSource`.

    It is asked where no source of sslfast but a folder, a URL or a ``torch.utils.data.Dataset`` accepts DATA, the one
    registered last first.

    Raises:
        ValueError: no ImageSource, or a ``name`` that another source has.
    """
    if not (isinstance(source, type) and issubclass(source, ImageSource)):
        raise ValueError(f"register_source takes a class that derives from sslfast.data.ImageSource, got {source!r}")
    name = getattr(source, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{source.__qualname__}.name must be a word, which manifests are marked with, got {name!r}")
    known = _registered.get(name)
    is_own = any(name == own.name for own in all_sources())
    if is_own or (known and (known.__module__, known.__qualname__) != (source.__module__, source.__qualname__)):
        raise ValueError(f"image source {name!r} of {source.__module__} is already registered; choose another name")
    _registered.pop(name, None)
    _registered[name] = source
    return source


class Url(str):
    """Data elsewhere: ``s3://bucket/train-{000..099}.tar``."""

    __slots__ = ()


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_URL_AS_PATH = re.compile(r"(https?|s3|gs|hf):/+(?=[^/])")
"""What ``Path`` makes of a URL."""


def as_data(data: Any) -> Any:
    """A DATA argument as sources take it: an absolute path, a :class:`Url`, a tuple of several, or the object of Python
    that it is."""
    if isinstance(data, Url):
        return data
    if isinstance(data, Path) and (found := _URL_AS_PATH.match(str(data))) and not data.exists():
        return Url(f"{found[1]}://{str(data)[found.end() :]}")
    if isinstance(data, str) and URL.match(data):
        return Url(data)
    if isinstance(data, str | Path):
        return Path(data).absolute()
    return tuple(map(as_data, data)) if isinstance(data, list | tuple) else data


def source_of(data: Any) -> type[ImageSource]:
    """The kind of source that a DATA argument, as :func:`as_data` gives it, is; ValueError where it is of none."""

    def accepting(sources: Iterable[type[ImageSource]]) -> type[ImageSource] | None:
        return next((one for one in sources if (one.accepts if isinstance(data, Path) else one.takes)(data)), None)

    found = accepting(all_sources())
    if found is None or found.name in _GENERAL:
        load_plugins()
        found = accepting(reversed(_registered.values())) or found
    if found is not None:
        return found
    raise ValueError(f"data of type {type(data).__module__}.{type(data).__qualname__} is not read: {DATA_OBJECTS}")


def source_of_manifest(notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]) -> type[ImageSource]:
    """The kind of source that a manifest file was written for; SourceError where it is unknown here."""
    name = next((note[1] for note in notes if note[0] == "source"), None)
    for source in all_sources():
        if source.name == name if name is not None else source.wrote(notes, columns):
            return source
    load_plugins()
    if name in _registered:
        return _registered[name]
    known = ", ".join([*(source.name for source in all_sources()), *_registered])
    raise SourceError(
        f"of a source {name!r} that this version does not know: {known}; update sslfast, or install the package that "
        "registers it, or import its module with --plugin MODULE"
    )


def is_file(path: Path, suffix: str) -> bool:
    """Whether the name is that of such a file, be it missing; a folder may have any name."""
    return path.suffix.lower() == suffix and not path.is_dir()


def content_hash(head: bytes) -> str:
    """16 hex digits of SHA-1 over the first ``HASHED_BYTES`` of a file, given as ``head``."""
    return hashlib.sha1(head, usedforsecurity=False).hexdigest()[:16]


def some_paths(entries: Sequence[tuple[str, str]], most: int = 5) -> str:
    """The first few paths with their reasons, and how many more there are."""
    shown = [f"{path} ({reason})" if reason else path for path, reason in entries[:most]]
    more = [f"and {len(entries) - most} more"] if len(entries) > most else []
    return ", ".join(shown + more)
