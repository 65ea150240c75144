"""Files under a folder by their suffix, and size, hash and header check of a file."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sslfast.data.images import SUFFIXES, BadImageError, open_header, open_image_file
from sslfast.data.left_out import SNIFFED, hidden_key, may_be_picture, other_key, suffix_of, unpack_remedy
from sslfast.data.pool import map_threads
from sslfast.data.shard_cache import Remote
from sslfast.data.source import DATA_FORMS, HASHED_BYTES, content_hash

TAR, PARQUET = ".tar", ".parquet"


@dataclass(kw_only=True)
class Listing:
    """The files under a folder by suffix; relative posix paths, sorted."""

    paths: list[str]
    """Images."""
    shards: list[str]
    """Tar files."""
    tables: list[str] = field(default_factory=list)
    """Parquet files; not counted in ``ignored``."""
    unreadable: list[tuple[str, str]]
    """Folders that could not be listed, and why."""
    ignored: dict[str, int]
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


def list_files(root: Path) -> Listing:
    """Every file under ``root``; no file is opened.

    Folders of the system and hidden files and folders are left out; links are followed, except into a folder that
    contains them.
    """
    paths: list[str] = []
    shards: list[str] = []
    tables: list[str] = []
    unreadable: list[tuple[str, str]] = []
    odd: list[str] = []
    ignored: Counter[str] = Counter()
    waiting: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    while waiting:
        folder, prefix, parents = waiting.pop()
        try:
            status = os.stat(folder)
            # Following a link to a folder that contains it would never end.
            if (status.st_dev, status.st_ino) in parents:
                continue
            with os.scandir(folder) as scan:
                entries = list(scan)
        except OSError as error:
            unreadable.append((prefix, f"unreadable folder: {error.strerror}"))
            continue
        within = parents | {(status.st_dev, status.st_ino)}
        for entry in entries:
            path, suffix, is_folder = f"{prefix}{entry.name}", suffix_of(entry.name), _is_folder(entry)
            hidden = hidden_key(f"{entry.name}/" if is_folder else entry.name)
            if hidden is not None:
                if is_folder or suffix in SUFFIXES:
                    ignored[hidden] += 1
            elif is_folder:
                waiting.append((entry.path, f"{path}/", within))
            elif suffix in SUFFIXES:
                paths.append(path)
            elif suffix == TAR:
                shards.append(path)
            elif suffix == PARQUET:
                tables.append(path)
            elif may_be_picture(suffix):
                odd.append(path)
            else:
                ignored[suffix] += 1
    return Listing(
        paths=sorted(paths),
        shards=sorted(shards),
        tables=sorted(tables),
        unreadable=sorted(unreadable),
        ignored=dict(ignored),
        odd=sorted(odd),
    )


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
