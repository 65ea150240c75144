"""The manifest: which image is which row, written once per run and checked at every start.

A row is the position of a file among all usable files in the order of their relative paths (by code point, ``/``
between folders). Bank rows, loaders, checkpoints and evaluations speak of rows only, so nothing may ever renumber:
a folder that no longer matches its manifest is an error with a remedy.

The content hash is the first 16 hex digits of SHA-1 over the first 16 KiB of a file. Whole files would make the scan
of ImageNet read 140 GB; the first 16 KiB come with the read that the header check needs anyway, and together with
the size they tell a replaced file. A change behind the first 16 KiB that keeps the size is not seen.
"""

import hashlib
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslfast.images import SUFFIXES, BadImageError, open_header, quiet_pillow

HASHED_BYTES = 16384
_VERSION = "# sslfast manifest 1"
_HEADER = "path\tbytes\tsha1\tlabel"
_THREADS = 8  # hides the latency of network disks; the header check itself holds the interpreter lock
_CHUNK = 256
_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_UNESCAPES = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Manifest:
    """Row -> file. Build it with :meth:`scan` or :meth:`load`."""

    root: Path
    """Folder that the paths are relative to."""
    paths: list[str]
    """Relative posix paths in row order."""
    bytes: NDArray[np.int64]
    """``[N]`` file sizes."""
    sha1: list[str]
    """16 hex digits of the hash of each file's first 16 KiB."""
    labels: NDArray[np.int64]
    """``[N]`` index into ``classes``; -1 for a file directly in the root."""
    classes: list[str]
    """First-level folders that hold at least one usable image, sorted; empty for a flat folder."""
    excluded: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason of what the scan left out as bad."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Suffix -> number of files that do not claim to be images."""
    verified: bool = False
    """Every row was decoded whole once, and what failed is in ``excluded``."""
    archive: Path | None = None
    """The .beton file that holds the pixels of all rows; None: they are in the files under ``root``."""
    archive_id: str = ""
    """Identity of the stored pixels of ``archive``."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.root / self.paths[row]

    def digest(self) -> str:
        """Identity of the row assignment and of the files behind it: SHA-256 over (path, bytes, hash) of every row.

        Independent of where the folder lies. Checkpoints carry it and a resumed run compares it.
        """
        sha = hashlib.sha256()
        for path, size, content in zip(self.paths, self.bytes, self.sha1, strict=True):
            sha.update(f"{_escape(path)}\t{size}\t{content}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

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
        labels, classes = _labels([self.paths[row] for row in kept])
        return replace(
            self,
            paths=[self.paths[row] for row in kept],
            bytes=self.bytes[kept],
            sha1=[self.sha1[row] for row in kept],
            labels=labels,
            classes=classes,
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
        whose suffix is not an image's are counted in ``ignored``.

        Args:
            root: the folder.
            on_bad_image: ``error``: ValueError naming the bad files; ``skip``: leave them out, list in ``excluded``.
            progress: show a progress bar on the terminal.
        """
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image=}")
        root = _folder(root)
        listing = _list_files(root)
        excluded = list(listing.unreadable)
        rows: list[tuple[str, int, str]] = []

        def identify(path: str) -> tuple[int, str] | str:
            return _identify(root, path, read=True, header=True)

        with quiet_pillow():
            for path, found in _threaded(listing.paths, identify, progress, "scanning"):
                if isinstance(found, str):
                    excluded.append((path, found))
                else:
                    rows.append((path, *found))
        if excluded and on_bad_image == "error":
            raise ValueError(
                f"{len(excluded)} of {len(listing.paths)} images in {root} cannot be used: {some_paths(excluded)}; "
                "repair or remove the files, or pass --on-bad-image skip"
            )
        if not rows:
            ignored = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in listing.ignored.items())
            found_instead = f"; all {len(excluded)} are bad: {some_paths(excluded)}" if excluded else ""
            raise ValueError(
                f"no usable image in {root}{found_instead}{f' (other files: {ignored})' if ignored else ''}: "
                f"name a folder that holds images ({' '.join(sorted(SUFFIXES))})"
            )
        labels, classes = _labels([row[0] for row in rows])
        return cls(
            root=root,
            paths=[row[0] for row in rows],
            bytes=np.array([row[1] for row in rows], dtype=np.int64),
            sha1=[row[2] for row in rows],
            labels=labels,
            classes=classes,
            excluded=sorted(excluded),
            ignored=listing.ignored,
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
            *(f"# ignored\t{_escape(suffix)}\t{count}" for suffix, count in self.ignored.items()),
            *(f"# excluded\t{_escape(bad)}\t{_escape(reason)}" for bad, reason in self.excluded),
            _HEADER,
            *(
                f"{_escape(row)}\t{size}\t{content}\t{label}"
                for row, size, content, label in zip(self.paths, self.bytes, self.sha1, self.labels, strict=True)
            ),
        ]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`dump` whole or not at all."""
        path = Path(path)
        data = self.dump().encode("utf-8", "surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

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
        if lines[0] != _VERSION or _HEADER not in lines:
            raise ValueError(f"{path} is not a manifest (its first line must be {_VERSION!r}): {remedy}")
        start = lines.index(_HEADER)
        notes = [[_unescape(part) for part in line.removeprefix("# ").split("\t")] for line in lines[1:start]]
        values = {note[0]: note[1] for note in notes if len(note) == 2}
        try:
            rows = [line.split("\t") for line in lines[start + 1 : -1]]
            labels, classes = _labels([_unescape(row[0]) for row in rows])
            manifest = cls(
                root=Path(values["root"] if root is None else root).absolute(),
                paths=[_unescape(row[0]) for row in rows],
                bytes=np.array([int(row[1]) for row in rows], dtype=np.int64),
                sha1=[row[2] for row in rows],
                labels=labels,
                classes=classes,
                excluded=[(note[1], note[2]) for note in notes if note[0] == "excluded"],
                ignored={note[1]: int(note[2]) for note in notes if note[0] == "ignored"},
                verified="verified" in values,
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
            contents: also read and compare the hashes (one read of 16 KiB per file).
        """
        listing = _list_files(_folder(self.root))
        known = {*self.paths, *(path for path, _ in self.excluded)}
        wanted = {path: (int(size), sha1) for path, size, sha1 in zip(self.paths, self.bytes, self.sha1, strict=True)}
        missing: list[tuple[str, str]] = []
        changed: list[tuple[str, str]] = []
        for path, now in _threaded(self.paths, lambda path: _identify(self.root, path, read=contents), False, ""):
            size, sha1 = wanted[path]
            if isinstance(now, str):
                missing.append((path, now))
            elif now[0] != size:
                changed.append((path, f"{size} -> {now[0]} bytes"))
            elif contents and now[1] != sha1:
                changed.append((path, "same size, other content"))
        extra = [(path, "") for path in listing.paths if path not in known] if added == "error" else []
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


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Listing:
    paths: list[str]
    unreadable: list[tuple[str, str]]
    ignored: dict[str, int]


def _list_files(root: Path) -> _Listing:
    """Every file under root with an image's suffix, sorted."""
    paths: list[str] = []
    unreadable: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()

    def walk(folder: str, prefix: str, parents: frozenset[tuple[int, int]]) -> None:
        try:
            status = os.stat(folder)
            # A link to a folder that contains it would never end.
            if (status.st_dev, status.st_ino) in parents:
                return
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            unreadable.append((prefix, f"unreadable folder: {error.strerror}"))
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                walk(entry.path, f"{prefix}{entry.name}/", parents | {(status.st_dev, status.st_ino)})
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in SUFFIXES:
                paths.append(f"{prefix}{entry.name}")
            else:
                ignored[suffix] += 1

    walk(str(root), "", frozenset())
    return _Listing(sorted(paths), sorted(unreadable), dict(sorted(ignored.items())))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _identify(root: Path, path: str, *, read: bool, header: bool = False) -> tuple[int, str] | str:
    """Size and hash (empty unless ``read``) of a file, or why it is bad; with ``header`` also by the image policy."""
    try:
        status = os.stat(f"{root}/{path}")
        if not stat.S_ISREG(status.st_mode):
            return "unreadable: not a regular file"
        if not read:
            return status.st_size, ""
        with open(f"{root}/{path}", "rb", buffering=HASHED_BYTES) as file:
            head = file.read(HASHED_BYTES)
            if header and not head:
                return "empty file"
            if header:
                file.seek(0)
                open_header(file)
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    except BadImageError as error:
        return error.reason
    return status.st_size, content_hash(head)


def content_hash(head: bytes) -> str:
    """16 hex digits of the first ``HASHED_BYTES`` of a file."""
    return hashlib.sha1(head, usedforsecurity=False).hexdigest()[:16]


def _threaded(
    items: Sequence[Item], work: Callable[[Item], Result], progress: bool, title: str
) -> Iterator[tuple[Item, Result]]:
    """``(item, work(item))`` in order, a few hundred items per task of a thread pool."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(progress) as bar:
        task = bar.add_task(title, total=len(items))
        for chunk, results in zip(chunks, pool.map(lambda part: [work(item) for item in part], chunks), strict=True):
            yield from zip(chunk, results, strict=True)
            bar.advance(task, len(chunk))


def progress_bar(enabled: bool) -> Progress:
    """For the terminal; nothing is shown unless ``enabled``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True, disable=not enabled)


def _folder(root: str | os.PathLike[str]) -> Path:
    root = Path(root).absolute()
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}: name a folder that holds images")
    return root


def _labels(paths: Iterable[str]) -> tuple[NDArray[np.int64], list[str]]:
    folders = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    classes = sorted({folder for folder in folders if folder is not None})
    index: dict[str | None, int] = {None: -1, **{name: label for label, name in enumerate(classes)}}
    return np.array([index[folder] for folder in folders], dtype=np.int64), classes


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
