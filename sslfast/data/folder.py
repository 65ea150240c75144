"""The folder source: every image is a file; the first-level folder is its class."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sslfast.data.images import OnBadImage, read_bytes
from sslfast.data.listing import existing_folder, first_folder, identify, list_files, other_files
from sslfast.data.manifest import Manifest
from sslfast.data.parquet import ParquetSource
from sslfast.data.pool import map_threads
from sslfast.data.source import Changes, ImageSource, ListedImage
from sslfast.data.tar import TarSource


@dataclass(kw_only=True, eq=False, repr=False)
class FolderSource(ImageSource):
    """Image files under ``root``, at any depth."""

    name: ClassVar[str] = "folder"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return True

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        """Of the image files; where the folder holds tar files instead, or Parquet files, of the images in them."""
        listing = list_files(existing_folder(path))
        if listing.shards and listing.paths:
            raise ValueError(
                f"{path} holds {len(listing.paths)} images ({listing.paths[0]}, ...) and {len(listing.shards)} tar "
                f"files ({listing.shards[0]}, ...): name a folder with one of both, or move the others away"
            )
        if listing.shards:
            return TarSource.open_shards(path, listing, on_bad_image=on_bad_image, progress=progress)
        if listing.tables and not listing.paths:
            return ParquetSource.open_shards(path, listing, on_bad_image=on_bad_image, progress=progress)
        images, bad = list_images(cls(root=path, paths=listing.paths), progress=progress)
        return Manifest.from_images(
            cls(root=path, paths=[image.path for image in images]),
            [image._replace(label=first_folder(image.path)) for image in images],
            excluded=[*bad, *listing.unreadable],
            ignored=other_files(path, listing, progress=progress),
            on_bad_image=on_bad_image,
        )

    def read(self, row: int) -> bytes:
        return read_bytes(self.where(row))

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        listing = list_files(existing_folder(self.root))
        found = changed_files(self, manifest, contents=contents)
        known = {*self.paths, *(path for path, _ in manifest.excluded)}
        found.added = [(path, "") for path in listing.paths if path not in known]
        return found

    def notes(self) -> list[tuple[object, ...]]:
        return []

    @classmethod
    def wrote(cls, notes: object, columns: object) -> bool:
        return True


def list_images(files: ImageSource, *, progress: bool) -> tuple[list[ListedImage], list[tuple[str, str]]]:
    """The files of a source whose header the image policy accepts, without labels, in order; path and reason of the
    others."""
    images: list[ListedImage] = []
    bad: list[tuple[str, str]] = []

    def look(row: int) -> tuple[int, str] | str:
        return identify(files.where(row), read=True, header=True)

    for row, found in map_threads(look, range(len(files)), progress=progress, title="scanning"):
        path = files.paths[row]
        if isinstance(found, str):
            bad.append((path, found))
        else:
            images.append(ListedImage(path, *found))
    return images, bad


def changed_files(files: ImageSource, manifest: Manifest, *, contents: bool) -> Changes:
    """Which files are unreadable or changed."""
    changes = Changes()

    def look(row: int) -> tuple[int, str] | str:
        return identify(files.where(row), read=contents)

    for row, now in map_threads(look, range(len(files)), progress=False, title=""):
        path, size = files.paths[row], int(manifest.bytes[row])
        if isinstance(now, str):
            changes.unreadable.append((path, now))
        elif now[0] != size:
            changes.changed.append((path, f"{size} -> {now[0]} bytes"))
        elif contents and now[1] != manifest.sha1[row]:
            changes.changed.append((path, "same size, other content"))
    return changes
