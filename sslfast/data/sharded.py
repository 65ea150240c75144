"""What sources have in common whose images lie in files of many images each."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.listing import Listing, existing_folder, list_files
from sslfast.data.shard_cache import Remote, expand_urls
from sslfast.data.source import Changes, ImageSource, SourceError, Url

if TYPE_CHECKING:
    from sslfast.data.manifest import Manifest


class ShardError(SourceError):
    """A file of many images that cannot be used, or is no longer the one that was indexed."""


@dataclass(kw_only=True, eq=False, repr=False)
class ShardedSource(ImageSource):
    """Images inside of files, the shards; a shard counts as a folder: ``shard-000.tar/n01440764/x.jpg``.

    ``root`` is the folder of the shards, or the one shard.
    """

    tables: ClassVar[Mapping[str, str]] = {}
    """Arrays of integers by row: name of the field -> column of the manifest file, or empty for none."""

    shards: list[str]
    """Relative posix paths of the shards, sorted; one empty path where ``root`` is the shard itself."""
    shard_sizes: NDArray[np.int64]
    """``[len(shards)]`` bytes."""
    shard_times: NDArray[np.int64]
    """``[len(shards)]`` modification times in ns. That of a copy may differ: then contents are compared."""
    shard_of: NDArray[np.int64]
    """``[num_rows]`` index of each row's shard."""
    remote: Remote | None = None
    """Where the shards are if not on this machine."""

    @classmethod
    @abstractmethod
    def listed_shards(cls, listing: Listing) -> list[str]:
        """Those of a folder."""

    @abstractmethod
    def hashes(self, rows: Sequence[int]) -> Iterable[tuple[int, str]]:
        """``(row, content_hash)`` of each of these rows as it is now. ShardError: a shard cannot be read."""

    def shard_file(self, shard: int) -> str:
        """The path of a shard, or its URL."""
        if self.remote is not None:
            return self.remote.urls[shard]
        return f"{self.root}/{self.shards[shard]}" if self.shards[shard] else str(self.root)

    @contextmanager
    def local(self, shard: int) -> Iterator[str]:
        """The path of a shard on this machine; of one elsewhere of a copy, which is downloaded if there is none."""
        if self.remote is None:
            yield self.shard_file(shard)
        else:
            with self.remote.local(shard) as path:
                yield path

    def where(self, row: int) -> str:
        if self.remote is None:
            return super().where(row)
        shard = int(self.shard_of[row])
        return self.shard_file(shard) + self.paths[row].removeprefix(self.shards[shard])

    def __str__(self) -> str:
        if self.remote is None:
            return super().__str__()
        others = len(self.shards) - 1
        return self.remote.urls[0] + (f" and {others:,} more" if others else "")

    def unreadable(self, shard: int, error: OSError) -> ShardError:
        """A shard that is gone, or that the system does not let read."""
        return ShardError(
            f"shard {self.shard_file(shard)} cannot be read ({error.strerror or error}): put it back, or start a new "
            "run"
        )

    def replaced(self, shard: int, now: int) -> ShardError:
        """A shard that is not the one that was indexed; ``now``: its size."""
        return ShardError(
            f"shard {self.shard_file(shard)} changed while it was in use ({self.shard_sizes[shard]} -> {now} bytes): "
            "put the old one back, or start a new run"
        )

    def changes(self, manifest: "Manifest", *, contents: bool) -> Changes:
        """By size and modification time of each shard. Where only the time differs, contents are always compared."""
        is_folder = self.shards != [""] and self.remote is None
        listing = list_files(existing_folder(self.root)) if is_folder else None
        changes = Changes()
        to_read: list[int] = []
        for shard, (name, size, modified) in enumerate(self._shards()):
            shown = name or self.root.name
            try:
                now_size, now_modified = self._status(shard)
            except OSError as error:
                changes.missing.append((shown, f"unreadable: {error.strerror}"))
                continue
            if now_size != size:
                changes.changed.append((shown, f"{size} -> {now_size} bytes"))
            elif contents or now_modified != modified:
                to_read += np.flatnonzero(self.shard_of == shard).tolist()
        for row, now in self.hashes(to_read):
            if now != manifest.sha1[row]:
                changes.changed.append((self.paths[row], "same size, other content"))
        if listing is not None:
            known = {*self.shards}
            now_there = (*self.listed_shards(listing), *listing.paths)
            changes.added = [(path, "") for path in now_there if path not in known]
        return changes

    def _status(self, shard: int) -> tuple[int, int]:
        """Size and modification time."""
        if self.remote is not None:
            return self.remote.sizes[shard], self.remote.tags[shard]
        status = os.stat(self.root / self.shards[shard])
        return status.st_size, status.st_mtime_ns

    def bind(self, data: Any) -> Self:
        if not isinstance(data, Url):
            return replace(self, root=data, remote=None)
        urls = sorted(expand_urls(data))
        if (names := shard_names(urls)) != self.shards:
            new = next((name for name in names if name not in self.shards), names[-1])
            raise SourceError(
                f"started with {len(self.shards)} shards ({self.shards[0]}, ...), and {data} is {len(names)} "
                f"({new}, ...): give the data that the run started with, or choose another output directory"
            )
        return replace(self, remote=Remote.of(urls))

    def take(self, rows: NDArray[np.int64]) -> Self:
        chosen = {name: getattr(self, name)[rows] for name in ("shard_of", *self.tables)}
        return replace(super().take(rows), **chosen)

    def _shards(self) -> Iterator[tuple[str, int, int]]:
        yield from zip(self.shards, self.shard_sizes, self.shard_times, strict=True)

    def columns(self) -> Mapping[str, Iterable[object]]:
        return {column: getattr(self, name) for name, column in self.tables.items() if column}

    def notes(self) -> Iterable[tuple[object, ...]]:
        urls = [] if self.remote is None else [("url", url) for url in self.remote.urls]
        return [*(("shard", *shard) for shard in self._shards()), *urls]

    @classmethod
    def parsed(
        cls, paths: Sequence[str], notes: Sequence[Sequence[str]], columns: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The fields that :meth:`notes` and :meth:`columns` wrote."""
        shards = [note for note in notes if note[0] == "shard"]
        names = [name for _, name, _, _ in shards]
        urls = tuple(note[1] for note in notes if note[0] == "url")
        sizes, tags = (tuple(int(note[at]) for note in shards) for at in (2, 3))
        return {
            "remote": Remote(urls=urls, sizes=sizes, tags=tags) if urls else None,
            "shards": names,
            "shard_sizes": np.array([int(size) for _, _, size, _ in shards], dtype=np.int64),
            "shard_times": np.array([int(modified) for _, _, _, modified in shards], dtype=np.int64),
            "shard_of": shard_index(names, paths),
            **{
                name: np.array([int(value) for value in columns[column]], dtype=np.int64)
                for name, column in cls.tables.items()
                if column
            },
        }


def shard_names(urls: Sequence[str]) -> list[str]:
    """What is left of URLs without the folder that is common to all; an empty name for one alone, as of a local one."""
    if len(urls) == 1:
        return [""]
    parts = [url.partition("?")[0].split("/") for url in urls]
    same = sum(
        1 for _ in takewhile(lambda names: len({*names}) == 1, zip(*(part[:-1] for part in parts), strict=False))
    )
    return ["/".join(part[same:]) for part in parts]


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
