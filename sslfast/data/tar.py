"""The tar source: images are members of tar shards, each read by one ``pread``."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import SUFFIXES, BadImageError, OnBadImage
from sslfast.data.left_out import suffix_of
from sslfast.data.listing import TAR, Listing, first_folder, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.members import folder_classes, is_class_archive, list_members, stem_of, visible
from sslfast.data.pool import map_threads
from sslfast.data.sharded import ShardedSource, ShardError, shard_index
from sslfast.data.source import HASHED_BYTES, ListedImage, content_hash, is_file
from sslfast.data.tar_walk import Member, walk_tar


@dataclass(kw_only=True, eq=False, repr=False)
class TarSource(ShardedSource):
    """Members of tar files. The first-level folder in a name is the class; if all images lie in folders of one folder
    (``tar -cf train.tar train``), the one below it. Of tar files without any label that are named by a class
    (``n01440764.tar``, ``dog.tar``; numbered ones are not), that name is the class.
    """

    name: ClassVar[str] = "tar"

    tables: ClassVar[Mapping[str, str]] = {"offsets": "offset", "sizes": ""}

    offsets: NDArray[np.int64]
    """``[num_rows]`` where each row's bytes begin in its shard."""
    sizes: NDArray[np.int64]
    """``[num_rows]`` number of each row's bytes."""

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, TAR)

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        one = Listing(paths=[], shards=[""], unreadable=[], ignored={})
        return cls.open_shards(path, one, on_bad_image=on_bad_image, progress=progress)

    @classmethod
    def open_shards(cls, root: Path, listing: Listing, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        """The images in the tar files of a folder's listing. ShardError: one of them cannot be used, whatever
        ``on_bad_image`` says."""
        found: list[tuple[ListedImage, int]] = []
        excluded = [*listing.unreadable]
        ignored = Counter(other_files(root, listing, progress=progress))
        shards: list[ListedShard] = []

        def look(shard: int) -> ListedShard:
            with listing.local(root, listing.shards, shard) as file:
                return list_shard(file)

        numbers, title = range(len(listing.shards)), "reading shards"
        for number, shard in map_threads(look, numbers, progress=progress, title=title, chunk=1):
            name = listing.shards[number]
            prefix = f"{name}/" if name else ""
            found += [(image._replace(path=prefix + image.path), offset) for image, offset in shard.images]
            excluded += [(prefix + path, reason) for path, reason in shard.bad]
            ignored += shard.ignored
            shard.images.clear()
            shards.append(shard)
        stems = sorted({image.path[: image.path.rfind("/")] for image, _ in found})
        if (
            all(image.label is None for image, _ in found)
            and stems == listing.shards
            and is_class_archive([stem_of(name) for name in stems])
        ):
            found = [(image._replace(label=stem_of(image.path.rpartition("/")[0])), at) for image, at in found]
        elif not any(shard.has_labels for shard in shards):
            found = _labelled_below(found, listing.shards)
        found.sort(key=lambda item: item[0].path)
        paths = [image.path for image, _ in found]
        source = cls(
            root=root,
            paths=paths,
            shards=listing.shards,
            shard_sizes=np.array([shard.bytes for shard in shards], dtype=np.int64),
            shard_times=np.array(
                listing.remote.tags if listing.remote else [s.modified for s in shards], dtype=np.int64
            ),
            remote=listing.remote,
            shard_of=shard_index(listing.shards, paths),
            offsets=np.array([offset for _, offset in found], dtype=np.int64),
            sizes=np.array([image.bytes for image, _ in found], dtype=np.int64),
        )
        return Manifest.from_images(
            source,
            [image for image, _ in found],
            excluded=excluded,
            ignored=ignored,
            on_bad_image=on_bad_image,
            numbered=any(shard.has_labels for shard in shards),
        )

    def read(self, row: int) -> bytes:
        """One open, one ``fstat``, one ``pread``. No file stays open, so the number of shards, threads and processes is
        not limited. ShardError: the tar file is gone, unreadable, or its size is not what was indexed."""
        return self._read(row, int(self.sizes[row]))

    def _read(self, row: int, count: int) -> bytes:
        """The first ``count`` bytes of a row."""
        shard = int(self.shard_of[row])
        try:
            with self.local(shard) as file:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    now = os.fstat(descriptor).st_size
                    whole = now == self.shard_sizes[shard]
                    data = os.pread(descriptor, count, int(self.offsets[row])) if whole else b""
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise self.unreadable(shard, error) from None
        if not whole or len(data) != count:
            raise self.replaced(shard, now)
        return data

    @classmethod
    def listed_shards(cls, listing: Listing) -> list[str]:
        return listing.shards

    def hashes(self, rows: Sequence[int]) -> Iterable[tuple[int, str]]:
        def hash_of(row: int) -> str:
            return content_hash(self._read(row, min(int(self.sizes[row]), HASHED_BYTES)))

        return map_threads(hash_of, rows, progress=False, title="")

    @property
    def row_shards(self) -> NDArray[np.int64]:
        return self.shard_of

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
        return cls(root=root, paths=paths, sizes=sizes, **cls.parsed(paths, notes, columns))

    @classmethod
    def wrote(cls, notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]) -> bool:
        return "offset" in columns


def _labelled_below(found: list[tuple[ListedImage, int]], shards: Sequence[str]) -> list[tuple[ListedImage, int]]:
    """The images with the classes of :func:`~sslfast.data.members.folder_classes` where folders are their classes."""
    ends = [len(shards[index]) + 1 if shards[index] else 0 for index in shard_index(shards, [i.path for i, _ in found])]
    members = [image.path[end:] for (image, _), end in zip(found, ends, strict=True)]
    if any(image.label != first_folder(member) for (image, _), member in zip(found, members, strict=True)):
        return found
    classes = folder_classes(members)
    return [(image._replace(label=classes[name]), at) for (image, at), name in zip(found, members, strict=True)]


@dataclass(kw_only=True)
class ListedShard:
    """What one tar file holds."""

    bytes: int
    modified: int
    images: list[tuple[ListedImage, int]] = field(default_factory=list)
    """Each with its offset; paths are those of the members."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    has_labels: bool = False
    """Whether a label came from another member."""


def list_shard(file: str) -> ListedShard:
    """The images of one tar file, in its order, with their labels: see :func:`~sslfast.data.members.list_members`.

    Of a tar file without an image that holds tar files (ImageNet as downloaded: one for each class), the members of
    those, whose class is the name of their tar file.

    ShardError: no usable archive (see :func:`~sslfast.data.tar_walk.walk_tar`), two members with the same name, or an
    empty label.
    """
    ignored: Counter[str] = Counter()
    members = _members(file, ignored)
    folders: dict[str, str | None] = {}
    inner = [name for name, member in members.items() if suffix_of(name) == TAR and not member.problem]
    if inner and not any(suffix_of(name) in SUFFIXES for name in members):
        by_class = is_class_archive([stem_of(name) for name in inner])
        outer, members = members, {name: member for name, member in members.items() if name not in inner}
        for name in inner:
            for path, member in _members(file, ignored, within=outer[name]).items():
                members[f"{name}/{path}"] = member
                folders[f"{name}/{path}"] = first_folder(path) or (stem_of(name) if by_class else None)
    try:
        with open(file, "rb", buffering=0) as opened:
            status = os.fstat(opened.fileno())

            def read(name: str, count: int) -> bytes:
                member = members[name]
                if member.problem:
                    raise BadImageError(f"unreadable: {member.problem} of a tar file")
                return os.pread(opened.fileno(), count, member.offset)

            sizes = {name: member.size for name, member in members.items()}
            found = list_members(f"shard {file}", sizes, read, folders=folders)
    except OSError as error:
        raise ShardError(f"shard {file} cannot be read ({error.strerror or error})") from None
    return ListedShard(
        bytes=status.st_size,
        modified=status.st_mtime_ns,
        images=[(image, members[image.path].offset) for image in found.images],
        bad=found.bad,
        ignored=ignored + found.ignored,
        has_labels=found.has_labels,
    )


def _members(file: str, ignored: Counter[str], *, within: Member | None = None) -> dict[str, Member]:
    """The visible members of a tar file, or of the tar file that is a member of it, by name."""
    members: dict[str, Member] = {}
    for member in walk_tar(file, within):
        if not visible(member.name, ignored):
            continue
        if member.name in members:
            raise ShardError(
                f"shard {file} has two members named {member.name!r}: names are identities, so write the shard again "
                "without one of them"
            )
        members[member.name] = member
    return members
