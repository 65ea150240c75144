"""The manifest: which image is which row, written once per run and checked at every start.

A row is the position of an image among all usable ones in the order of their relative paths (by code point, ``/``
between folders). The bank, loaders, checkpoints and evaluations identify images by row, so rows are never renumbered:
data that no longer matches its manifest is an error with a remedy.

Where the images are is the business of the manifest's :class:`~sslfast.data.source.ImageSource`.

The content hash is the first 16 hex digits of SHA-1 over the first 16 KiB of a file. Whole files would make the scan
of ImageNet read 140 GB; the first 16 KiB come with the read that the header check needs anyway, and together with
the size they detect a replaced file. A change after the first 16 KiB that keeps the size is not detected.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from sslfast.data.columns import escape, number_classes, read_columns, read_header, unescape
from sslfast.data.images import Decoding, OnBadImage, quiet_pillow
from sslfast.data.left_out import image_suffixes, left_out, misplaced, named_counts
from sslfast.data.listing import first_folder
from sslfast.data.source import (
    DATA_FORMS,
    HASHED_BYTES,
    ImageLocation,
    ImageSource,
    ListedImage,
    PackedPaths,
    SourceError,
    as_data,
    some_paths,
    source_of,
    source_of_manifest,
    taken,
)
from sslfast.data.spelling import alike, alike_among
from sslfast.files import replacing

_VERSION = "# sslfast manifest 1"
_COLUMNS = "path\tbytes\tsha1\tlabel"
_TRAIN_SETS = frozenset({"train", "training"})
_SETS = _TRAIN_SETS | {"val", "valid", "validation", "test", "testing"}


class NoImageError(ValueError):
    """Data without a usable image. ``found`` says what is there, ``remedy`` what helps."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}: {remedy}")
        self.found, self.remedy = found, remedy


@dataclass(kw_only=True)
class Manifest:
    """Row -> image. Build it with :meth:`scan` or :meth:`load`."""

    source: ImageSource
    """Where the images are; it holds the paths of the rows."""
    bytes: NDArray[np.int64]
    """``[N]`` sizes of the image files."""
    sha1: Sequence[str]
    """16 hex digits of the hash of each file's first 16 KiB."""
    labels: NDArray[np.int64]
    """``[N]`` index into ``classes``; -1 without a class."""
    classes: list[str]
    """Names of the classes that have at least one usable image: of a folder its first-level folders, sorted. Of labels
    that the data states itself, sorted by number if all of them are numbers."""
    excluded: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason of the images that cannot be used."""
    ignored: dict[str, int] = field(default_factory=dict)
    """What was found and is not used, by the keys of :mod:`sslfast.data.left_out` -> number of files."""
    verified: bool = False
    """Every row was decoded whole once, and what failed is in ``excluded``."""
    _digest: str | None = field(default=None, init=False, repr=False, compare=False)
    """Once it is known; of these rows, and not of those of a copy with other ones."""

    @property
    def root(self) -> Path:
        """Folder that the paths are relative to, or the one file that holds them all."""
        return self.source.root

    @property
    def paths(self) -> Sequence[str]:
        """Relative posix paths in row order."""
        return self.source.paths

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of a row; of an archive's member the name to show."""
        return Path(self.source.where(row))

    def location(self, row: int) -> ImageLocation:
        """One row, to be read later."""
        return ImageLocation(self.source, row)

    def left_out(self) -> list[str]:
        """Lines for the screen: what looks like a picture and is not used, why, and the remedy."""
        return left_out(self.ignored)

    def class_remarks(self) -> list[str]:
        """Lines for the screen: classes whose names look the same, probably one class, and sets that were taken as
        classes (``train/<class>/...`` where ``<class>/...`` is read)."""
        found = alike_among(self.classes)
        lines = [f"some look the same: {found}; give one class one name"] if found else []
        train = next((name for name in self.classes if name.casefold() in _TRAIN_SETS), None)
        are_sets = {name.casefold() for name in self.classes} <= _SETS
        if train and are_sets and all(p.count("/") > 1 and p.split("/", 1)[0] in self.classes for p in self.paths):
            place = self.root / train if self.root.is_dir() else f"the folder {train} of what is unpacked"
            lines.append(
                f"{' and '.join(self.classes)}, the first folders, are taken as classes, and all {len(self):,} images "
                f"are used; to use the classes and images of {train} alone, give {place}"
            )
        return lines

    def digest(self) -> str:
        """Identity of the row assignment and of the files behind it: SHA-256 over (path, bytes, hash) of every row and
        the columns of the source.

        Independent of where the data is stored. Checkpoints carry it and a resumed run compares it.
        """
        if self._digest is None:
            sha = hashlib.sha256()
            for path, size, content, more in zip(self.paths, self.bytes, self.sha1, self._more_columns(), strict=True):
                sha.update(f"{escape(path)}\t{size}\t{content}{more}\n".encode("utf-8", "surrogateescape"))
            self._digest = sha.hexdigest()
        return self._digest

    def _more_columns(self) -> Iterable[str]:
        """The source's part of each row's text."""
        columns = self.source.columns()
        if not columns:
            return [""] * len(self)
        return ("".join(f"\t{escape(str(value))}" for value in row) for row in zip(*columns.values(), strict=True))

    def take(self, rows: Sequence[int]) -> "Manifest":
        """The manifest of some of the rows, numbered anew, with the same classes."""
        chosen = np.array(rows, dtype=np.int64)
        return replace(
            self,
            source=self.source.take(chosen),
            bytes=self.bytes[chosen],
            sha1=taken(self.sha1, chosen),
            labels=self.labels[chosen],
        )

    def decoded(self, decoding: Decoding) -> "Manifest":
        """The same rows, decoded so."""
        return self.of_source(replace(self.source, decoding=decoding))

    def labelled(self, names: Sequence[str | None]) -> "Manifest":
        """The same rows with other classes: the name of each row's."""
        labels, classes = number_classes(names, numbered=True)
        same = replace(self, labels=labels, classes=classes)
        same._digest = self._digest
        return same

    def with_labels(self) -> "Manifest":
        """The same rows with the labels that the source finds by reading every image, where none has one."""
        names = self.source.late_labels() if (self.labels < 0).all() else None
        return self if names is None else self.labelled(names)

    def without(self, bad: Collection[tuple[str, str]]) -> "Manifest":
        """The manifest of the rows whose path is not in ``bad`` (path, reason), which is added to ``excluded``.

        The remaining rows are numbered anew, so this is for manifests that no run has used yet.
        """
        paths = {path for path, _ in bad}
        kept = self.take([row for row, path in enumerate(self.paths) if path not in paths])
        there = np.unique(kept.labels[kept.labels >= 0])
        labels = np.where(kept.labels >= 0, np.searchsorted(there, kept.labels), -1)
        classes = [self.classes[label] for label in there]
        return replace(kept, labels=labels, classes=classes, excluded=sorted({*self.excluded, *bad}))

    @classmethod
    def scan(cls, path: Any, *, on_bad_image: OnBadImage = "error", progress: bool = False) -> "Manifest":
        """Number the images of a source (see ``sslfast.data.source``); of image files the headers are checked.

        Args:
            path: a folder of images or of tar files, or a file or an object of one of the other kinds of source.
            on_bad_image: ``error``: ValueError naming the bad images; ``skip``: leave them out, list in ``excluded``.
            progress: show a progress bar on the terminal.

        Raises:
            NoImageError: no usable image.
            ValueError: bad images, or data that cannot be used whatever ``on_bad_image`` says.
        """
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image=}")
        data = as_data(path)
        with quiet_pillow():
            return source_of(data).open(data, on_bad_image=on_bad_image, progress=progress)

    @classmethod
    def from_images(
        cls,
        source: ImageSource,
        images: Sequence[ListedImage],
        *,
        excluded: Collection[tuple[str, str]],
        on_bad_image: OnBadImage,
        ignored: Mapping[str, int] | None = None,
        numbered: bool = False,
    ) -> "Manifest":
        """:meth:`from_columns` of images, sorted by path, that are objects."""
        return cls.from_columns(
            source,
            sizes=np.array([image.bytes for image in images], dtype=np.int64),
            sha1=[image.sha1 for image in images],
            names=[image.label for image in images],
            excluded=excluded,
            on_bad_image=on_bad_image,
            ignored=ignored,
            numbered=numbered,
        )

    @classmethod
    def from_columns(
        cls,
        source: ImageSource,
        *,
        sizes: NDArray[np.int64],
        sha1: Sequence[str],
        names: Iterable[str | None],
        excluded: Collection[tuple[str, str]],
        on_bad_image: OnBadImage,
        ignored: Mapping[str, int] | None = None,
        numbered: bool = False,
    ) -> "Manifest":
        """The manifest of what a source found.

        Args:
            source: of these rows, sorted by path.
            sizes, sha1: of the image files.
            names: of their classes, each asked for once.
            excluded: path and reason of the images that cannot be used.
            on_bad_image: ``error``: ValueError that names the excluded ones.
            ignored: key -> number of other files.
            numbered: sort the classes by number if all of them are numbers.

        Raises:
            NoImageError: no usable image.
            ValueError: bad images and ``on_bad_image="error"``.
        """
        excluded, ignored = sorted(excluded), dict(sorted((ignored or {}).items()))
        if excluded and on_bad_image == "error":
            raise ValueError(
                f"{len(excluded)} of {len(sizes) + len(excluded)} images in {source} cannot be used: "
                f"{some_paths(excluded)}; repair or remove the files, or pass --on-bad-image skip"
            )
        if not len(sizes):
            others, lines = named_counts(ignored), [*left_out(ignored), *misplaced(source.root, ignored)]
            found_instead = f"; all {len(excluded)} are bad: {some_paths(excluded)}" if excluded else ""
            raise NoImageError(
                f"no usable image in {source}{found_instead}{f' (other files: {others})' if others else ''}",
                "; ".join(lines) or f"name a folder that holds images ({image_suffixes()}). {DATA_FORMS}",
            )
        labels, classes = number_classes(names, numbered=numbered)
        return cls(
            source=source, bytes=sizes, sha1=sha1, labels=labels, classes=classes, excluded=excluded, ignored=ignored
        )

    @classmethod
    def load_or_scan(
        cls,
        root: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        on_bad_image: OnBadImage = "error",
        progress: bool = False,
    ) -> "Manifest":
        """The manifest at ``path`` checked against ``root``; where there is none yet, scan ``root`` and write it."""
        if Path(path).exists():
            manifest = cls.load(path, root=root)
            manifest.check()
        else:
            manifest = cls.scan(root, on_bad_image=on_bad_image, progress=progress)
            manifest.save(path)
        return manifest

    def packed(self) -> "Manifest":
        """The same rows without a Python object for each, for as long as a run lasts."""
        return self.of_source(self.source.packed(), sha1=PackedPaths(self.sha1))

    def of_source(self, source: ImageSource, **changes: Any) -> "Manifest":
        """The same rows of a source that finds them elsewhere, or in another way."""
        same = replace(self, source=source, **changes)
        same._digest = self._digest
        return same

    def dump(self) -> str:
        """The text (tab-separated, one header line) that :meth:`parse` reads, to be written with surrogateescape."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        identity = self.source.identity()
        rows = zip(self.paths, self.bytes, self.sha1, self.labels, self._more_columns(), strict=True)
        yield from (
            _VERSION,
            f"# root\t{escape(str(self.root))}",
            f"# hash\tfirst 16 hex digits of SHA-1 over the first {HASHED_BYTES} bytes",
            f"# digest\t{self.digest()}",
            *(["# verified\tevery row was decoded whole"] if self.verified else []),
            *([f"# archive\t{identity}"] if identity else []),
            *(f"# {name}\t{value}" for name, value in asdict(self.source.decoding).items() if value is not None),
            "\t".join(["# classes", *map(escape, self.classes)]),
            *("# " + "\t".join(escape(str(part)) for part in note) for note in self.source.notes()),
            *(f"# ignored\t{escape(suffix)}\t{count}" for suffix, count in self.ignored.items()),
            *(f"# excluded\t{escape(bad)}\t{escape(reason)}" for bad, reason in self.excluded),
            "\t".join([_COLUMNS, *self.source.columns()]),
        )
        for path, size, content, label, more in rows:
            yield f"{escape(path)}\t{size}\t{content}\t{label}{more}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what :meth:`dump` returns; an existing file is replaced atomically."""
        with (
            replacing(Path(path)) as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file,
        ):
            file.writelines(f"{line}\n" for line in self._lines())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        remedy: str = "restore it from a copy, or start a new run",
    ) -> "Manifest":
        """Read a manifest file. ``root``: where the data is now, if not where it was scanned; ``remedy``: for errors.

        ValueError where the file is not a manifest, or was cut short or edited (its digest no longer fits).
        """
        try:
            with open(path, "rb") as file:
                return cls._of_file(file, str(path), root=root, remedy=remedy)
        except FileNotFoundError:
            raise ValueError(f"no manifest at {path}: give the run's manifest file, or start a new run") from None
        except OSError as error:
            raise ValueError(f"manifest {path} cannot be read ({error.strerror or error}): {remedy}") from None

    @classmethod
    def parse(
        cls,
        text: str,
        path: str,
        *,
        root: str | os.PathLike[str] | None = None,
        remedy: str = "restore it from a copy, or start a new run",
    ) -> "Manifest":
        """What :meth:`dump` made; ``path`` is where it was found, for the error texts."""
        return cls._of_file(BytesIO(text.encode("utf-8", "surrogateescape")), path, root=root, remedy=remedy)

    @classmethod
    def _of_file(cls, file: BinaryIO, path: str, *, root: str | os.PathLike[str] | None, remedy: str) -> "Manifest":
        """Read in blocks: at no time is there an object for every row."""
        header = read_header(file, path, version=_VERSION, columns=_COLUMNS, remedy=remedy)
        notes = [[unescape(part) for part in line.removeprefix("# ").split("\t")] for line in header[1:-1]]
        values = {note[0]: note[1] for note in notes if len(note) == 2}
        names = header[-1].split("\t")[4:]
        try:
            places = [0, 2, *range(4, 4 + len(names))]
            (paths, hashes, *more), (sizes, labels), digest = read_columns(
                file, 4 + len(names), texts=places, numbers=[1, 3], but=3
            )
            columns = dict(zip(names, more, strict=True))
            # Manifests of earlier versions do not name the classes, which were always folders.
            classes = next((note[1:] for note in notes if note[0] == "classes"), None)
            if classes is None:
                classes = sorted({folder for folder in map(first_folder, paths) if folder is not None})
            if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
                raise ValueError
            source = source_of_manifest(notes, columns).parse(
                root=Path(values["root"] if root is None else root).absolute(),
                paths=paths,
                sizes=sizes,
                notes=notes,
                columns=columns,
            )
            decoding = {name: int(values[name]) for name in asdict(Decoding()) if name in values}
            source.decoding = Decoding(**decoding)
            manifest = cls(
                source=source,
                bytes=sizes,
                sha1=hashes,
                labels=labels,
                classes=classes,
                excluded=[(note[1], note[2]) for note in notes if note[0] == "excluded"],
                ignored={note[1]: int(note[2]) for note in notes if note[0] == "ignored"},
                verified="verified" in values,
            )
        except SourceError as error:
            raise ValueError(f"manifest {path} is {error}") from None
        except (KeyError, IndexError, ValueError, OverflowError, StopIteration):
            raise ValueError(f"manifest {path} is damaged: {remedy}") from None
        if digest == values.get("digest"):
            manifest._digest = digest
        elif manifest.digest() != values.get("digest"):  # lines of another spelling, and the same rows
            raise ValueError(f"manifest {path} was cut short or edited (digest does not fit its rows): {remedy}")
        return manifest

    def check(
        self,
        *,
        added: Literal["error", "ignore"] = "error",
        contents: bool = False,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        """Raise one ValueError naming every way in which the data no longer matches: missing, changed, added.

        Args:
            added: whether images that the manifest does not know are an error. ``ignore`` trains without them.
            contents: also read and compare the hashes (one read of 16 KiB per image). Of a tar file whose size is
                unchanged and whose modification time is not they are always compared.
            on_bad_image: ``skip``: image files that are gone or unreadable are no error, unless all are: whoever reads
                them finds them bad, as while a run goes on.
        """
        changes = self.source.changes(self, contents=contents)
        system = [(path, f"in {key}") for path, key in zip(self.paths, self.source.system_keys(), strict=True) if key]
        if system:
            raise ValueError(
                f"{self.source}: {len(system)} of the {len(self)} images of its manifest are in folders of the system, "
                f"which are no longer used: {some_paths(system)}. Verify the data again, or start a new run; to keep "
                "them, move them into a folder with another name"
            )
        extra = changes.added if added == "error" else []
        if on_bad_image == "error" or len(changes.unreadable) == len(self):
            changes.missing = sorted({*changes.missing, *changes.unreadable})
        problems = [
            f"{len(found)} {what}: {some_paths(found)}"
            for what, found in (("missing", changes.missing), ("changed", changes.changed), ("added", extra))
            if found
        ]
        if problems:
            same = alike([path for path, _ in (*changes.missing, *changes.unreadable)], [path for path, _ in extra])
            problems += [f"names that look the same: {same}"] if same else []
            raise ValueError(
                f"{self.source} no longer matches its manifest of {len(self)} images: {'; '.join(problems)}. Rows are "
                "identities in the bank and in checkpoints, so nothing is renumbered: put the data back as it was, "
                "or start a new run (with a new manifest) on the data as it is"
            )
