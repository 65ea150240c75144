"""What images there are: the files of a folder, or the members of tar shards, and what a look at each of them says."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslfast.data.images import SUFFIXES, BadImageError, open_header
from sslfast.data.tar import SUFFIX, Member, ShardError, Shards, shard_index, walk_tar

HASHED_BYTES = 16384
_LONGEST_LABEL = 1024
_THREADS = 8  # hides the latency of network disks; the header check itself holds the interpreter lock
_CHUNK = 256

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Listing:
    """The files under a folder, by what their names claim; relative posix paths, sorted."""

    paths: list[str]
    """Images."""
    shards: list[str]
    """Tar files."""
    unreadable: list[tuple[str, str]]
    """Folders that could not be listed, and why."""
    ignored: dict[str, int]
    """Suffix -> number of all other files."""


class ListedImage(NamedTuple):
    """One usable image."""

    path: str
    bytes: int
    sha1: str
    label: str | None
    """Name of its class."""
    offset: int = 0
    """Where it begins in its shard."""


@dataclass(kw_only=True)
class ListedShard:
    """What one tar file holds."""

    bytes: int
    modified: int
    images: list[ListedImage] = field(default_factory=list)
    """Paths are those of the members."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    has_labels: bool = False
    """Whether a label came from a .cls member."""


def list_files(root: Path) -> Listing:
    """Every file under ``root``, sorted by its suffix; nothing is opened.

    Hidden files and folders are left out; links are followed, except into a folder that contains them.
    """
    paths: list[str] = []
    shards: list[str] = []
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
            elif suffix == SUFFIX:
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
    except OSError:  # links that lead to each other
        return False


def identify(root: Path, path: str, *, read: bool, header: bool = False) -> tuple[int, str] | str:
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


def list_shard(file: str) -> ListedShard:
    """The images of one tar file, in its order, with their labels, after a look at the header of each.

    A member whose suffix is an image's is an image. Its class is what the member with the same stem and the suffix
    ``.cls`` says (a number or a name; a stem ends at the last dot or, as for WebDataset, at the first), else the
    first-level folder in its name, else none.

    ShardError: no usable archive (see :func:`~sslfast.data.tar.walk_tar`), two members of one name, or an empty label.
    """
    members: dict[str, Member] = {}
    for member in walk_tar(file):
        if any(part.startswith(".") and part != ".." for part in member.name.split("/")):
            continue
        if member.name in members:
            raise ShardError(
                f"shard {file} has two members named {member.name!r}: names are identities, so write the shard again "
                "without one of them"
            )
        members[member.name] = member
    try:
        with open(file, "rb", buffering=0) as opened:
            return _list_members(opened.fileno(), file, members)
    except OSError as error:
        raise ShardError(f"shard {file} cannot be read ({error.strerror or error})") from None


def _list_members(descriptor: int, file: str, members: dict[str, Member]) -> ListedShard:
    status = os.fstat(descriptor)
    found = ListedShard(bytes=status.st_size, modified=status.st_mtime_ns)
    labels = {name: _label(descriptor, file, member) for name, member in members.items() if name.endswith(".cls")}
    found.has_labels = bool(labels)
    for name, member in members.items():
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in SUFFIXES:
            found.ignored[suffix] += suffix != ".cls"
            continue
        folder = name.split("/", 1)[0] if "/" in name else None
        label = next((labels[other] for other in _label_names(name) if other in labels), folder)
        try:
            sha1 = _check_member(descriptor, member)
        except BadImageError as error:
            found.bad.append((name, error.reason))
        else:
            found.images.append(ListedImage(name, member.size, sha1, label, member.offset))
    found.ignored = +found.ignored
    if not found.images and not found.bad:
        others = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in sorted(found.ignored.items()))
        raise ShardError(
            f"shard {file} holds no image{f' (other members: {others})' if others else ''}: images are members named "
            f"{' '.join(sorted(SUFFIXES))}; move the file away"
        )
    return found


def _check_member(descriptor: int, member: Member) -> str:
    """Hash of a member's beginning; BadImageError where it or its header breaks a rule of the image policy."""
    if member.problem:
        raise BadImageError(f"unreadable: {member.problem} of a tar file")
    head = os.pread(descriptor, min(member.size, HASHED_BYTES), member.offset)
    if not head:
        raise BadImageError("empty file")
    try:
        open_header(BytesIO(head))
    except BadImageError:
        if member.size <= HASHED_BYTES:
            raise
        # A header that is longer than that, or lies at the end.
        open_header(BytesIO(os.pread(descriptor, member.size, member.offset)))
    return content_hash(head)


def _label(descriptor: int, file: str, member: Member) -> str:
    text = os.pread(descriptor, min(member.size, _LONGEST_LABEL + 1), member.offset)
    label = text.decode("utf-8", "surrogateescape").strip()
    if member.problem or not label or len(text) > _LONGEST_LABEL:
        raise ShardError(
            f"shard {file}: member {member.name!r} holds no label: it must be a number or the name of a class; write "
            "the shard again"
        )
    return str(int(label)) if label.isdecimal() else label


def _label_names(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0]}.cls", f"{folder}{slash}{base.partition('.')[0]}.cls"


def content_hash(head: bytes) -> str:
    """16 hex digits of the first ``HASHED_BYTES`` of a file."""
    return hashlib.sha1(head, usedforsecurity=False).hexdigest()[:16]


def is_shard(path: Path) -> bool:
    """Whether the name is that of a tar file; a folder may be called anything."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def existing_folder(root: str | os.PathLike[str]) -> Path:
    """Absolute; ValueError where there is none."""
    root = Path(root).absolute()
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {kind}: name a folder that holds images")
    return root


@dataclass(kw_only=True)
class Scan:
    """What a look at every image of a data set found."""

    images: list[ListedImage]
    """Usable ones, sorted by path."""
    excluded: list[tuple[str, str]]
    """Path and reason of the others."""
    ignored: dict[str, int]
    total: int
    """Number of images, usable or not."""
    shards: Shards | None = None
    has_label_members: bool = False


def scan_folder(root: Path, progress: bool) -> Scan:
    """The images that are files, or those in the tar files, under a folder that must not hold both."""
    listing = list_files(root)
    if listing.shards and listing.paths:
        raise ValueError(
            f"{root} holds {len(listing.paths)} images ({listing.paths[0]}, ...) and {len(listing.shards)} tar files "
            f"({listing.shards[0]}, ...): name a folder with one of both, or move the others away"
        )
    if listing.shards:
        found = scan_shards(root, listing.shards, progress)
        found.excluded = sorted([*found.excluded, *listing.unreadable])
        found.ignored = dict(sorted((Counter(found.ignored) + Counter(listing.ignored)).items()))
        return found
    images: list[ListedImage] = []
    excluded = list(listing.unreadable)
    for path, one in threaded(
        listing.paths, lambda path: identify(root, path, read=True, header=True), progress, "scanning"
    ):
        if isinstance(one, str):
            excluded.append((path, one))
        else:
            images.append(ListedImage(path, *one, first_folder(path)))
    return Scan(images=images, excluded=sorted(excluded), ignored=listing.ignored, total=len(listing.paths))


def scan_shards(root: Path, names: list[str], progress: bool) -> Scan:
    """The images in tar files; paths are ``name/member``, and ``member`` where the name is empty."""
    images: list[ListedImage] = []
    excluded: list[tuple[str, str]] = []
    ignored: Counter[str] = Counter()
    found: list[ListedShard] = []
    for name, shard in threaded(names, lambda name: list_shard(str(root / name)), progress, "reading shards", chunk=1):
        prefix = f"{name}/" if name else ""
        images += [image._replace(path=prefix + image.path) for image in shard.images]
        excluded += [(prefix + path, reason) for path, reason in shard.bad]
        ignored += shard.ignored
        shard.images.clear()
        found.append(shard)
    images.sort()
    shards = Shards(
        paths=names,
        bytes=np.array([shard.bytes for shard in found], dtype=np.int64),
        modified=np.array([shard.modified for shard in found], dtype=np.int64),
        index=shard_index(names, [image.path for image in images]),
        offsets=np.array([image.offset for image in images], dtype=np.int64),
    )
    return Scan(
        images=images,
        excluded=sorted(excluded),
        ignored=dict(sorted(ignored.items())),
        total=len(images) + len(excluded),
        shards=shards,
        has_label_members=any(shard.has_labels for shard in found),
    )


def first_folder(path: str) -> str | None:
    """The class of a path."""
    return path.split("/", 1)[0] if "/" in path else None


def threaded(
    items: Sequence[Item], work: Callable[[Item], Result], progress: bool, title: str, chunk: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """``(item, work(item))`` in order, ``chunk`` (a few hundred) items per task of a thread pool."""
    chunk = chunk or _CHUNK
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    with ThreadPoolExecutor(_THREADS) as pool, progress_bar(progress) as bar:
        task = bar.add_task(title, total=len(items))
        for part, results in zip(chunks, pool.map(lambda part: [work(item) for item in part], chunks), strict=True):
            yield from zip(part, results, strict=True)
            bar.advance(task, len(part))


def progress_bar(enabled: bool) -> Progress:
    """On standard error, where that is a terminal; nothing is shown unless ``enabled``."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal))
