"""Tar shards and Parquet files elsewhere: DATA is a URL, with braces, ``*`` and ``?`` for several shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sslfast.data.images import OnBadImage
from sslfast.data.left_out import suffix_of
from sslfast.data.listing import PARQUET, TAR, Listing
from sslfast.data.manifest import Manifest
from sslfast.data.parquet import ParquetSource
from sslfast.data.shard_cache import Remote, expand_urls
from sslfast.data.sharded import shard_names
from sslfast.data.source import ImageSource, SourceError, Url
from sslfast.data.tar import TarSource


@dataclass(kw_only=True, eq=False, repr=False)
class RemoteShards(ImageSource):
    """Opens the shards that a URL names: the source is then a :class:`~sslfast.data.tar.TarSource` or
    :class:`~sslfast.data.parquet.ParquetSource` whose files are copies in :mod:`sslfast.data.shard_cache`.
    """

    name: ClassVar[str] = "remote"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return False

    @classmethod
    def takes(cls, data: object) -> bool:
        return isinstance(data, Url)

    @classmethod
    def open(cls, path: Any, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        urls = sorted(expand_urls(path))
        suffixes = {suffix_of(url.partition("?")[0]) for url in urls}
        if suffixes == {""}:
            raise SourceError(
                f"{path} names no .tar or .parquet file: of a folder elsewhere name the shards, as in "
                f"{path.rstrip('/')}/*.tar"
            )
        if len(suffixes) > 1 or not suffixes <= {TAR, PARQUET}:
            raise SourceError(
                f"{path} names files {' and '.join(sorted(suffixes))}: of data elsewhere, .tar or .parquet files are "
                "read, one kind at a time; download others, and give the file or folder"
            )
        names, is_tar = shard_names(urls), suffixes == {TAR}
        listing = Listing(
            paths=[],
            shards=names if is_tar else [],
            tables=[] if is_tar else names,
            unreadable=[],
            ignored={},
            remote=Remote.of(urls, progress=progress),
        )
        source = TarSource if is_tar else ParquetSource
        root = Path(str(path).partition("://")[2]).absolute()
        return source.open_shards(root, listing, on_bad_image=on_bad_image, progress=progress)

    def changes(self, manifest: Manifest, *, contents: bool) -> Any:
        raise SourceError(f"{self} is known by its URL: give that again")
