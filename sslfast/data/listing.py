"""Files under a folder by their suffix, and size, hash and header check of a file."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import SUFFIXES, BadImageError, open_header, open_image_file
from sslfast.data.left_out import SNIFFED, hidden_key, may_be_picture, other_key, suffix_of, unpack_remedy
from sslfast.data.pool import map_threads
from sslfast.data.shard_cache import Remote
from sslfast.data.source import DATA_FORMS, HASHED_BYTES, PackedPaths, content_hash
from sslfast.data.waiting import DaemonPool, Patience

TAR, PARQUET = ".tar", ".parquet"
_THREADS = 8  # hides the latency of network disks


@dataclass(kw_only=True)
class Listing:
    """The files under a folder by suffix; relative posix paths, sorted."""

    paths: Sequence[str] = ()
    """Images."""
    sizes: NDArray[np.int64] | None = None
    """``[len(paths)]`` bytes, where they were asked for; -1: not a file that can be read."""
    shards: list[str] = field(default_factory=list)
    """Tar files."""
    tables: list[str] = field(default_factory=list)
    """Parquet files; not counted in ``ignored``."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """Folders that could not be listed, and why."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Key (see :mod:`sslfast.data.left_out`) -> number of all other files."""
    remote: Remote | None = None
    """Where shards and tables are that are not on this machine."""
    odd: list[str] = field(default_factory=list)
    """Files, not yet counted in ``ignored``, of which the first bytes have to say whether they are pictures."""

    @contextmanager
    def local(self, root: Path, names: list[str], shard: int) -> Iterator[str]:
        """The path of one of ``names``, which are those of all shards or of all tables, on this machine."""
        if self.remote is None:
            yield str(root / names[shard])
        else:
            with self.remote.local(shard) as path:
                yield path


@dataclass(kw_only=True)
class _Folder:
    """One folder: what is in it, without what is in the folders in it."""

    parts: list["PackedPaths | tuple[str, str]"] = field(default_factory=list)
    """In the order of their paths: images of consecutive names, and folders (where, path with ``/``)."""
    sizes: list[NDArray[np.int64]] = field(default_factory=list)
    """Of each part that is of images."""
    within: frozenset[tuple[int, int]] = frozenset()
    """Identities of this folder and of those that it is in."""
    listing: Listing = field(default_factory=Listing)
    """Everything else."""


def list_files(root: Path, *, sizes: bool = False) -> Listing:
    """Every file under ``root``; no file is opened.

    Folders of the system and hidden files and folders are left out; links are followed, except into a folder that
    contains them. Threads read folders ahead; in the order in which they are walked through, paths are sorted.

    Args:
        root: a folder.
        sizes: ask for the size of every image.

    Raises:
        LostBatchError: a folder takes longer than :class:`~sslfast.data.waiting.Patience` lasts.
    """
    whole, images, found_sizes = Listing(), [], []
    ignored: Counter[str] = Counter()
    patience = Patience()
    with DaemonPool(_THREADS, "sslfast-list") as pool:

        def read(folder: str, prefix: str, parents: frozenset[tuple[int, int]]) -> Future[_Folder]:
            return pool.submit(_read_folder, folder, prefix, parents, sizes)

        waiting: list[Future[_Folder] | tuple[PackedPaths, NDArray[np.int64]]] = [read(str(root), "", frozenset())]
        while waiting:
            now = waiting.pop()
            if isinstance(now, tuple):
                images.append(now[0])
                found_sizes.append(now[1])
                continue
            folder = patience.result(now, lambda: f"the list of a folder under {root}: see that it is mounted")
            for name in ("shards", "tables", "odd", "unreadable"):
                getattr(whole, name).extend(getattr(folder.listing, name))
            ignored.update(folder.listing.ignored)
            of_images = iter(folder.sizes)
            waiting += [
                (part, next(of_images)) if isinstance(part, PackedPaths) else read(*part, folder.within)
                for part in folder.parts
            ][::-1]
    for names in (whole.shards, whole.tables, whole.odd, whole.unreadable):
        names.sort()
    whole.paths, whole.ignored = PackedPaths.join(images), dict(ignored)
    if sizes:
        whole.sizes = np.concatenate([np.empty(0, dtype=np.int64), *found_sizes])
    return whole


def _read_folder(path: str, prefix: str, parents: frozenset[tuple[int, int]], sizes: bool) -> _Folder:
    found = _Folder()
    listing = found.listing
    ignored: Counter[str] = Counter()
    try:
        status = os.stat(path)
        # Following a link to a folder that contains it would never end.
        if (status.st_dev, status.st_ino) in parents:
            return found
        with os.scandir(path) as scan:
            entries = list(scan)
    except OSError as error:
        listing.unreadable.append((prefix, f"unreadable folder: {error.strerror}"))
        return found
    found.within = parents | {(status.st_dev, status.st_ino)}
    inside: list[tuple[str, os.DirEntry[str]]] = []  # images, and folders with a / behind, by which paths are sorted
    for entry in entries:
        name, suffix, is_folder = entry.name, suffix_of(entry.name), _is_folder(entry)
        hidden = hidden_key(f"{name}/" if is_folder else name)
        if hidden is not None:
            if is_folder or suffix in SUFFIXES:
                ignored[hidden] += 1
        elif is_folder:
            inside.append((f"{name}/", entry))
        elif suffix in SUFFIXES:
            inside.append((name, entry))
        elif suffix == TAR:
            listing.shards.append(prefix + name)
        elif suffix == PARQUET:
            listing.tables.append(prefix + name)
        elif may_be_picture(suffix):
            listing.odd.append(prefix + name)
        else:
            ignored[suffix] += 1
    listing.ignored = dict(ignored)
    inside.sort(key=itemgetter(0))
    for is_folder, group in groupby(inside, lambda item: item[0].endswith("/")):
        if is_folder:
            found.parts += [(entry.path, prefix + name) for name, entry in group]
        else:
            images = list(group)
            found.parts.append(PackedPaths(prefix + name for name, _ in images))
            asked = (_size(entry) if sizes else 0 for _, entry in images)
            found.sizes.append(np.fromiter(asked, dtype=np.int64, count=len(images)))
    return found


def _size(entry: os.DirEntry[str]) -> int:
    """Of a regular file that can be read, else -1: opening it will say why."""
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) and os.access(entry.path, os.R_OK) else -1


def other_files(root: Path, listing: Listing, *, progress: bool) -> dict[str, int]:
    """``listing.ignored`` with the files of ``listing.odd``, which are opened, and Parquet files beside others."""

    def look(path: str) -> str:
        try:
            with open_image_file(root / path) as (file, _):
                return other_key(suffix_of(path), file.read(SNIFFED))
        except BadImageError:
            return suffix_of(path)

    counts = Counter(listing.ignored)
    if listing.tables and (listing.paths or listing.shards):
        counts[PARQUET] += len(listing.tables)
    for _, key in map_threads(look, listing.odd, progress=progress, title="looking at other files"):
        counts[key] += 1
    return dict(counts)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that point to each other
        return False


def identify(file: str, *, read: bool, header: bool = False) -> tuple[int, str] | str:
    """Size and hash (empty unless ``read``) of a file, or why it is bad; with ``header`` also by the image policy."""
    try:
        with open_image_file(file) as (opened, size):
            if not read:
                return size, ""
            head = opened.read(HASHED_BYTES)
            if header and not head:
                return "empty file"
            if header:
                opened.seek(0)
                open_header(opened)
    except BadImageError as error:
        return error.reason
    return size, content_hash(head)


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """Absolute; ValueError where there is none."""
    root = Path(root).absolute()
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}: {unpack_remedy(root) or f'name a folder that holds images. {DATA_FORMS}'}")
    return root


def first_folder(path: str) -> str | None:
    """The class of an image that has no other label: the first-level folder of its path."""
    return next((part for part in path.split("/")[:-1] if part != ".."), None)
