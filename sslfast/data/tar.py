"""The tar source: images are members of tar shards, each read by one ``pread``."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.images import SUFFIXES, BadImageError, OnBadImage
from sslfast.data.left_out import suffix_of
from sslfast.data.listing import TAR, Listing, existing_folder, first_folder, list_files, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.members import is_class_archive, list_members, stem_of, visible
from sslfast.data.pool import map_threads
from sslfast.data.source import HASHED_BYTES, Changes, ImageSource, ListedImage, content_hash, is_file
from sslfast.data.tar_walk import Member, ShardError, walk_tar


@dataclass(kw_only=True, eq=False, repr=False)
class TarSource(ImageSource):
    """Members of tar files; a tar file counts as a folder: ``shard-000.tar/n01440764/x.jpg``. Of tar files without any
    label that are named by a class (``n01440764.tar``, ``dog.tar``; numbered ones are not), that name is the class.

    ``root`` is the folder of the tar files, or the one tar file.
    """

    name: ClassVar[str] = "tar"

    shards: list[str]
    """Relative posix paths of the tar files, sorted; one empty path where ``root`` is the tar file itself."""
    shard_sizes: NDArray[np.int64]
    """``[len(shards)]`` bytes."""
    shard_times: NDArray[np.int64]
    """``[len(shards)]`` modification times in ns. That of a copy may differ: then contents are compared."""
    shard_of: NDArray[np.int64]
    """``[num_rows]`` index of each row's shard."""
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

        def look(name: str) -> ListedShard:
            return list_shard(str(root / name))

        for name, shard in map_threads(look, listing.shards, progress=progress, title="reading shards", chunk=1):
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
        found.sort(key=lambda item: item[0].path)
        paths = [image.path for image, _ in found]
        source = cls(
            root=root,
            paths=paths,
            shards=listing.shards,
            shard_sizes=np.array([shard.bytes for shard in shards], dtype=np.int64),
            shard_times=np.array([shard.modified for shard in shards], dtype=np.int64),
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
        name, expected = self.shards[shard], int(self.shard_sizes[shard])
        file = f"{self.root}/{name}" if name else str(self.root)
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                now = os.fstat(descriptor).st_size
                data = os.pread(descriptor, count, int(self.offsets[row])) if now == expected else b""
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ShardError(
                f"shard {file} cannot be read ({error.strerror or error}): put it back, or start a new run"
            ) from None
        if now != expected or len(data) != count:
            raise ShardError(
                f"shard {file} changed while it was in use ({expected} -> {now} bytes): put the old one back, or start "
                "a new run"
            )
        return data

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """By size and modification time of each tar file. Where only the time differs, contents are always compared."""
        listing = None if self.shards == [""] else list_files(existing_folder(self.root))
        changes = Changes()
        to_read: list[int] = []
        for shard, (name, size, modified) in enumerate(self._shards()):
            shown = name or self.root.name
            try:
                status = os.stat(self.root / name)
            except OSError as error:
                changes.missing.append((shown, f"unreadable: {error.strerror}"))
                continue
            if status.st_size != size:
                changes.changed.append((shown, f"{size} -> {status.st_size} bytes"))
            elif contents or status.st_mtime_ns != modified:
                to_read += np.flatnonzero(self.shard_of == shard).tolist()

        def hash_of(row: int) -> str:
            return content_hash(self._read(row, min(int(self.sizes[row]), HASHED_BYTES)))

        for row, now in map_threads(hash_of, to_read, progress=False, title=""):
            if now != manifest.sha1[row]:
                changes.changed.append((self.paths[row], "same size, other content"))
        if listing is not None:
            known = {*self.shards}
            changes.added = [(path, "") for path in (*listing.shards, *listing.paths) if path not in known]
        return changes

    @property
    def row_shards(self) -> NDArray[np.int64]:
        return self.shard_of

    def take(self, rows: NDArray[np.int64]) -> Self:
        tables = {"shard_of": self.shard_of[rows], "offsets": self.offsets[rows], "sizes": self.sizes[rows]}
        return replace(super().take(rows), **tables)  # type: ignore[arg-type]

    def _shards(self) -> Iterator[tuple[str, int, int]]:
        yield from zip(self.shards, self.shard_sizes, self.shard_times, strict=True)

    def columns(self) -> Mapping[str, Iterable[object]]:
        return {"offset": self.offsets}

    def notes(self) -> Iterable[tuple[object, ...]]:
        return [("shard", *shard) for shard in self._shards()]

    @classmethod
    def parse(
        cls,
        *,
        root: Path,
        paths: list[str],
        sizes: NDArray[np.int64],
        notes: Sequence[Sequence[str]],
        columns: Mapping[str, Sequence[str]],
    ) -> Self:
        shards = [note for note in notes if note[0] == "shard"]
        names = [name for _, name, _, _ in shards]
        return cls(
            root=root,
            paths=paths,
            shards=names,
            shard_sizes=np.array([int(size) for _, _, size, _ in shards], dtype=np.int64),
            shard_times=np.array([int(modified) for _, _, _, modified in shards], dtype=np.int64),
            shard_of=shard_index(names, paths),
            offsets=np.array([int(offset) for offset in columns["offset"]], dtype=np.int64),
            sizes=sizes,
        )

    @classmethod
    def wrote(cls, notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]) -> bool:
        return "offset" in columns


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


def shard_index(names: Sequence[str], paths: Sequence[str]) -> NDArray[np.int64]:
    """``[N]`` index of the shard that each path begins with; ValueError where there is none.

    Sorted paths of a shard are consecutive.
    """
    prefixes = {f"{name}/" if name else "": index for index, name in enumerate(names)}
    found = np.empty(len(paths), dtype=np.int64)
    prefix, index = "\0", -1
    for row, path in enumerate(paths):
        if not path.startswith(prefix):
            cuts = [0, *(position + 1 for position, letter in enumerate(path) if letter == "/")]
            prefix = next((path[:cut] for cut in cuts if path[:cut] in prefixes), "\0")
            if prefix == "\0":
                raise ValueError(f"{path!r} is in none of the shards")
            index = prefixes[prefix]
        found[row] = index
    return found
