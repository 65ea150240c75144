"""The manifest: which image is which row, written once per run and checked at every start.

A row is the position of a file among all usable files in the order of their relative paths (by code point, ``/``
between folders). Bank rows, loaders, checkpoints and evaluations speak of rows only, so nothing may ever renumber:
a folder that no longer matches its manifest is an error with a remedy.

The images are the files of a folder, or the members of tar shards (:mod:`sslfast.data.tar`), where a tar file counts as
a folder: ``shard-000.tar/n01440764/x.jpg``.

The content hash is the first 16 hex digits of SHA-1 over the first 16 KiB of a file. Whole files would make the scan
of ImageNet read 140 GB; the first 16 KiB come with the read that the header check needs anyway, and together with
the size they tell a replaced file. A change behind the first 16 KiB that keeps the size is not seen.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sslfast.data.folder import (
    HASHED_BYTES,
    content_hash,
    existing_folder,
    first_folder,
    identify,
    is_shard,
    list_files,
    scan_folder,
    scan_shards,
    threaded,
)
from sslfast.data.images import SUFFIXES, quiet_pillow
from sslfast.data.tar import ImageLocation, Shards, read_image_bytes, shard_index
from sslfast.files import replacing

_VERSION = "# sslfast manifest 1"
_HEADER = "path\tbytes\tsha1\tlabel"
_SHARD_HEADER = f"{_HEADER}\toffset"
_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_UNESCAPES = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}


@dataclass(kw_only=True)
class Manifest:
    """Row -> image. Build it with :meth:`scan` or :meth:`load`."""

    root: Path
    """Folder that the paths are relative to; or the one tar file."""
    paths: list[str]
    """Relative posix paths in row order."""
    bytes: NDArray[np.int64]
    """``[N]`` file sizes."""
    sha1: list[str]
    """16 hex digits of the hash of each file's first 16 KiB."""
    labels: NDArray[np.int64]
    """``[N]`` index into ``classes``; -1 without a class: a file directly in the root."""
    classes: list[str]
    """First-level folders that hold at least one usable image, sorted; empty for a flat folder. In shards also what
    the .cls members say, in the order of the numbers if all are numbers."""
    excluded: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason of what the scan left out as bad."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Suffix -> number of files that do not claim to be images."""
    verified: bool = False
    """Every row was decoded whole once, and what failed is in ``excluded``."""
    shards: Shards | None = None
    """The tar files that hold the images; None: every image is a file."""
    archive: Path | None = None
    """The .beton file that holds the pixels of all rows; None: they are in the files under ``root``."""
    archive_id: str = ""
    """Identity of the stored pixels of ``archive``."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of a row; of a shard's member what to call it."""
        return self.root / self.paths[row]

    def location(self, row: int) -> ImageLocation:
        """Where the bytes of a row are, for :func:`~sslfast.data.tar.read_image_bytes`."""
        if self.shards is None:
            return ImageLocation(f"{self.root}/{self.paths[row]}")
        return self.shards.location(str(self.root), self.paths[row], row, int(self.bytes[row]))

    def digest(self) -> str:
        """Identity of the row assignment and of the files behind it: SHA-256 over (path, bytes, hash) of every row,
        in shards also the offset.

        Independent of where the folder lies. Checkpoints carry it and a resumed run compares it.
        """
        sha = hashlib.sha256()
        for path, size, content, place in zip(self.paths, self.bytes, self.sha1, self._places(), strict=True):
            sha.update(f"{_escape(path)}\t{size}\t{content}{place}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def _places(self) -> list[str]:
        """The last column of each row's text."""
        return [""] * len(self) if self.shards is None else [f"\t{offset}" for offset in self.shards.offsets]

    def _shard_notes(self) -> Iterator[tuple[str, int, int]]:
        if self.shards is not None:
            yield from zip(self.shards.paths, self.shards.bytes, self.shards.modified, strict=True)

    @property
    def source(self) -> Path:
        """Where the pixels come from."""
        return self.root if self.archive is None else self.archive

    def without(self, bad: Collection[tuple[str, str]]) -> "Manifest":
        """The manifest of the rows whose path is not in ``bad`` (path, reason), which join ``excluded``.

        The remaining rows are numbered anew, so this is for manifests that no run has used yet.
        """
        paths = {path for path, _ in bad}
        kept = np.array([row for row, path in enumerate(self.paths) if path not in paths], dtype=np.int64)
        named = [self.classes[label] for label in np.unique(self.labels[kept]) if label >= 0]
        labels = _labels([self.classes[label] if label >= 0 else None for label in self.labels[kept]], named)
        return replace(
            self,
            paths=[self.paths[row] for row in kept],
            bytes=self.bytes[kept],
            sha1=[self.sha1[row] for row in kept],
            labels=labels,
            classes=named,
            shards=self.shards and self.shards.take(kept),
            excluded=sorted({*self.excluded, *bad}),
        )

    @classmethod
    def scan(
        cls,
        root: str | os.PathLike[str],
        *,
        on_bad_image: Literal["error", "skip"] = "error",
        progress: bool = False,
    ) -> "Manifest":
        """List a folder (class folders or flat, any nesting) and look at the header of every image file.

        Hidden files and folders are left out; links are followed, except into a folder that contains them. Files
        whose suffix is not an image's are counted in ``ignored``. A folder of .tar files is a folder of the images in
        them (see :func:`~sslfast.data.folder.list_shard`), and so is a .tar file.

        Args:
            root: the folder, or a .tar file.
            on_bad_image: ``error``: ValueError naming the bad files; ``skip``: leave them out, list in ``excluded``.
            progress: show a progress bar on the terminal.

        Raises:
            ValueError: no usable image, bad images, files and shards side by side.
            ShardError: a tar file cannot be used, whatever ``on_bad_image`` says.
        """
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image=}")
        root = Path(root).absolute()
        with quiet_pillow():
            found = (
                scan_shards(root, [""], progress) if is_shard(root) else scan_folder(existing_folder(root), progress)
            )
        rows, excluded = found.images, found.excluded
        if excluded and on_bad_image == "error":
            raise ValueError(
                f"{len(excluded)} of {found.total} images in {root} cannot be used: {some_paths(excluded)}; "
                "repair or remove the files, or pass --on-bad-image skip"
            )
        if not rows:
            others = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in found.ignored.items())
            found_instead = f"; all {len(excluded)} are bad: {some_paths(excluded)}" if excluded else ""
            raise ValueError(
                f"no usable image in {root}{found_instead}{f' (other files: {others})' if others else ''}: "
                f"name a folder that holds images ({' '.join(sorted(SUFFIXES))})"
            )
        classes = sorted({row.label for row in rows if row.label is not None})
        if found.has_label_members and all(name.isdecimal() for name in classes):
            classes.sort(key=int)
        return cls(
            root=root,
            paths=[row.path for row in rows],
            bytes=np.array([row.bytes for row in rows], dtype=np.int64),
            sha1=[row.sha1 for row in rows],
            labels=_labels([row.label for row in rows], classes),
            classes=classes,
            excluded=excluded,
            ignored=found.ignored,
            shards=found.shards,
        )

    @classmethod
    def load_or_scan(
        cls,
        root: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        on_bad_image: Literal["error", "skip"] = "error",
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

    def dump(self) -> str:
        """The text (tab-separated, one header line) that :meth:`parse` reads, to be written with surrogateescape."""
        lines = [
            _VERSION,
            f"# root\t{_escape(str(self.root))}",
            f"# hash\tfirst 16 hex digits of SHA-1 over the first {HASHED_BYTES} bytes",
            f"# digest\t{self.digest()}",
            *(["# verified\tevery row was decoded whole"] if self.verified else []),
            *([f"# archive\t{self.archive_id}"] if self.archive_id else []),
            "\t".join(["# classes", *map(_escape, self.classes)]),
            *(f"# shard\t{_escape(name)}\t{size}\t{modified}" for name, size, modified in self._shard_notes()),
            *(f"# ignored\t{_escape(suffix)}\t{count}" for suffix, count in self.ignored.items()),
            *(f"# excluded\t{_escape(bad)}\t{_escape(reason)}" for bad, reason in self.excluded),
            _HEADER if self.shards is None else _SHARD_HEADER,
            *(
                f"{_escape(row)}\t{size}\t{content}\t{label}{place}"
                for row, size, content, label, place in zip(
                    self.paths, self.bytes, self.sha1, self.labels, self._places(), strict=True
                )
            ),
        ]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`dump` whole or not at all."""
        data = self.dump().encode("utf-8", "surrogateescape")
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> "Manifest":
        """Read a manifest file. ``root``: where the data lies now, if not where it was scanned.

        ValueError where the file is not a manifest, or was cut short or edited (its digest no longer fits).
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"no manifest at {path}: give the run's manifest file, or start a new run") from None
        return cls.parse(data.decode("utf-8", "surrogateescape"), str(path), root=root)

    @classmethod
    def parse(cls, text: str, path: str, *, root: str | os.PathLike[str] | None = None) -> "Manifest":
        """What :meth:`dump` made; ``path`` is where it was found, for the error texts."""
        remedy = "restore it from a copy, or start a new run"
        lines = text.split("\n")
        header = _SHARD_HEADER if _SHARD_HEADER in lines else _HEADER
        if lines[0] != _VERSION or header not in lines:
            raise ValueError(f"{path} is not a manifest (its first line must be {_VERSION!r}): {remedy}")
        start = lines.index(header)
        notes = [[_unescape(part) for part in line.removeprefix("# ").split("\t")] for line in lines[1:start]]
        values = {note[0]: note[1] for note in notes if len(note) == 2}
        try:
            rows = [line.split("\t") for line in lines[start + 1 : -1]]
            paths = [_unescape(row[0]) for row in rows]
            folders = [first_folder(path) for path in paths]
            # Manifests of earlier versions do not name the classes, which were always folders.
            classes = next((note[1:] for note in notes if note[0] == "classes"), None)
            if classes is None:
                classes = sorted({folder for folder in folders if folder is not None})
            labels = np.array([int(row[3]) for row in rows], dtype=np.int64)
            if len(labels) and not -1 <= labels.min() <= labels.max() < len(classes):
                raise ValueError
            manifest = cls(
                root=Path(values["root"] if root is None else root).absolute(),
                paths=paths,
                bytes=np.array([int(row[1]) for row in rows], dtype=np.int64),
                sha1=[row[2] for row in rows],
                labels=labels,
                classes=classes,
                excluded=[(note[1], note[2]) for note in notes if note[0] == "excluded"],
                ignored={note[1]: int(note[2]) for note in notes if note[0] == "ignored"},
                verified="verified" in values,
                shards=_parse_shards(notes, paths, rows) if header == _SHARD_HEADER else None,
                archive_id=values.get("archive", ""),
            )
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"manifest {path} is damaged: {remedy}") from None
        if manifest.digest() != values.get("digest"):
            raise ValueError(f"manifest {path} was cut short or edited (digest does not fit its rows): {remedy}")
        return manifest

    def check(self, *, added: Literal["error", "ignore"] = "error", contents: bool = False) -> None:
        """Raise one ValueError naming every way in which the folder no longer matches: missing, changed, added.

        Args:
            added: whether image files that the manifest does not know are an error. ``ignore`` trains without them.
            contents: also read and compare the hashes (one read of 16 KiB per image). Of a tar file whose size is as it
                was and whose time of change is not they are always compared.
        """
        if self.shards is None:
            missing, changed, unknown = self._compare_files(contents)
        else:
            missing, changed, unknown = self._compare_shards(contents)
        extra = unknown if added == "error" else []
        problems = [
            f"{len(found)} {what}: {some_paths(found)}"
            for what, found in (("missing", missing), ("changed", changed), ("added", extra))
            if found
        ]
        if problems:
            raise ValueError(
                f"{self.root} no longer matches its manifest of {len(self)} images: {'; '.join(problems)}. Rows are "
                "identities in the bank and in checkpoints, so nothing is renumbered: put the folder back as it was, "
                "or start a new run (with a new manifest) on the folder as it is"
            )

    def _compare_files(self, contents: bool) -> tuple[list[tuple[str, str]], ...]:
        """Paths and remarks of what is missing, changed and added."""
        listing = list_files(existing_folder(self.root))
        known = {*self.paths, *(path for path, _ in self.excluded)}
        missing: list[tuple[str, str]] = []
        changed: list[tuple[str, str]] = []
        wanted = {path: (int(size), sha1) for path, size, sha1 in zip(self.paths, self.bytes, self.sha1, strict=True)}
        for path, now in threaded(self.paths, lambda path: identify(self.root, path, read=contents), False, ""):
            size, sha1 = wanted[path]
            if isinstance(now, str):
                missing.append((path, now))
            elif now[0] != size:
                changed.append((path, f"{size} -> {now[0]} bytes"))
            elif contents and now[1] != sha1:
                changed.append((path, "same size, other content"))
        return missing, changed, [(path, "") for path in listing.paths if path not in known]

    def _compare_shards(self, contents: bool) -> tuple[list[tuple[str, str]], ...]:
        """The same of tar files; a member is reported under its own path."""
        assert self.shards is not None
        whole = self.shards.paths == [""]
        listing = None if whole else list_files(existing_folder(self.root))
        missing: list[tuple[str, str]] = []
        changed: list[tuple[str, str]] = []
        to_read: list[int] = []
        for shard, (name, size, modified) in enumerate(self._shard_notes()):
            try:
                status = os.stat(self.root / name)
            except OSError as error:
                missing.append((name or self.root.name, f"unreadable: {error.strerror}"))
                continue
            if status.st_size != size:
                changed.append((name or self.root.name, f"{size} -> {status.st_size} bytes"))
            elif contents or status.st_mtime_ns != modified:
                to_read += np.flatnonzero(self.shards.index == shard).tolist()

        def hash_of(row: int) -> str:
            place = self.location(row)
            return content_hash(read_image_bytes(place._replace(size=min(place.size, HASHED_BYTES))))

        changed += [
            (self.paths[row], "same size, other content")
            for row, now in threaded(to_read, hash_of, False, "")
            if now != self.sha1[row]
        ]
        known = {*self.shards.paths}
        added = [] if listing is None else [path for path in (*listing.shards, *listing.paths) if path not in known]
        return missing, changed, [(path, "") for path in added]


def _parse_shards(notes: Sequence[Sequence[str]], paths: Sequence[str], rows: Sequence[Sequence[str]]) -> Shards:
    shards = [note for note in notes if note[0] == "shard"]
    names = [name for _, name, _, _ in shards]
    return Shards(
        paths=names,
        bytes=np.array([int(size) for _, _, size, _ in shards], dtype=np.int64),
        modified=np.array([int(modified) for _, _, _, modified in shards], dtype=np.int64),
        index=shard_index(names, paths),
        offsets=np.array([int(row[4]) for row in rows], dtype=np.int64),
    )


def _labels(names: Sequence[str | None], classes: Sequence[str]) -> NDArray[np.int64]:
    index: Mapping[str | None, int] = {None: -1, **{name: label for label, name in enumerate(classes)}}
    return np.array([index[name] for name in names], dtype=np.int64)


def some_paths(entries: Sequence[tuple[str, str]], most: int = 5) -> str:
    """The first few paths with their reasons, and how many more there are."""
    shown = [f"{path} ({reason})" if reason else path for path, reason in entries[:most]]
    more = [f"and {len(entries) - most} more"] if len(entries) > most else []
    return ", ".join(shown + more)


def _escape(text: str) -> str:
    for plain, escaped in _ESCAPES:
        text = text.replace(plain, escaped)
    return text


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    parts = iter(text)
    return "".join(_UNESCAPES.get(next(parts, "\\"), "?") if part == "\\" else part for part in parts)
