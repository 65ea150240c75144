"""Files under a folder by their suffix, and size, hash and header check of a file."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sslfast.data.images import SUFFIXES, BadImageError, open_header, open_regular
from sslfast.data.source import HASHED_BYTES, content_hash

TAR = ".tar"


@dataclass(kw_only=True)
class Listing:
    """The files under a folder by suffix; relative posix paths, sorted."""

    paths: list[str]
    """Images."""
    shards: list[str]
    """Tar files."""
    unreadable: list[tuple[str, str]]
    """Folders that could not be listed, and why."""
    ignored: dict[str, int]
    """Suffix -> number of all other files."""


def list_files(root: Path) -> Listing:
    """Every file under ``root``; no file is opened.

    Hidden files and folders are left out; links are followed, except into a folder that contains them.
    """
    paths: list[str] = []
    shards: list[str] = []
    unreadable: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()

    def walk(folder: str, prefix: str, parents: frozenset[tuple[int, int]]) -> None:
        try:
            status = os.stat(folder)
            # Following a link to a folder that contains it would never end.
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
            elif suffix == TAR:
                shards.append(f"{prefix}{entry.name}")
            else:
                ignored[suffix] += 1

    walk(str(root), "", frozenset())
    return Listing(
        paths=sorted(paths), shards=sorted(shards), unreadable=sorted(unreadable), ignored=dict(sorted(ignored.items()))
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that point to each other
        return False


def identify(file: str, *, read: bool, header: bool = False) -> tuple[int, str] | str:
    """Size and hash (empty unless ``read``) of a file, or why it is bad; with ``header`` also by the image policy."""
    try:
        with open_regular(file) as (opened, size):
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
        raise ValueError(f"{root} {kind}: name a folder that holds images")
    return root


def first_folder(path: str) -> str | None:
    """The class of an image that has no other label: the first-level folder of its path."""
    return path.split("/", 1)[0] if "/" in path else None
