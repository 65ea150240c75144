"""The CSV source: a list of image files, one ``path,label`` per line."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from sslfast.data.folder import changed_files, list_images
from sslfast.data.images import OnBadImage, read_bytes
from sslfast.data.manifest import Manifest
from sslfast.data.source import Changes, ImageSource, SourceError, is_file

HEADERS = (["path"], ["path", "label"])


class Entry(NamedTuple):
    """One image of a list."""

    line: int
    path: str
    label: str | None


@dataclass(kw_only=True, eq=False, repr=False)
class CsvListSource(ImageSource):
    """Image files that a ``.csv`` file names: ``root`` is that file, and paths are relative to its folder.

    A line is ``path,label``, quoted as CSV; the label may be empty or missing. A first line ``path,label`` or ``path``
    is a header. Rows are ordered by path, whatever the order of the lines; the content of a file says whether it is an
    image, not its suffix.
    """

    name: ClassVar[str] = "csv"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ".csv")

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        entries = {entry.path: entry for entry in read_list(path)}
        images, bad = list_images(cls(root=path, paths=sorted(entries)), progress=progress)
        return Manifest.from_images(
            cls(root=path, paths=[image.path for image in images]),
            [image._replace(label=entries[image.path].label) for image in images],
            excluded=[(name, f"{reason}, line {entries[name].line}") for name, reason in bad],
            on_bad_image=on_bad_image,
            numbered=True,
        )

    def read(self, row: int) -> bytes:
        return read_bytes(self.where(row))

    def where(self, row: int) -> str:
        return os.path.join(self.root.parent, self.paths[row])

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """Of the files, and of the list itself: lines that went away or are new, and labels."""
        entries = {entry.path: entry for entry in read_list(self.root)}
        changes = changed_files(self, manifest, contents=contents)
        for row, path in enumerate(self.paths):
            label = int(manifest.labels[row])
            then = manifest.classes[label] if label >= 0 else None
            if path not in entries:
                changes.missing.append((path, "no longer in the list"))
            elif entries[path].label != then:
                changes.changed.append((path, f"label {then or 'none'} -> {entries[path].label or 'none'}"))
        known = {*self.paths, *(path for path, _ in manifest.excluded)}
        changes.added = [(path, f"line {entry.line}") for path, entry in entries.items() if path not in known]
        return changes


def read_list(path: Path) -> Iterator[Entry]:
    """The entries of a CSV file in its order; SourceError, naming the line, where it is not such a list."""
    lines: dict[str, int] = {}
    try:
        # utf-8-sig: spreadsheet programs begin the file with a byte order mark.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                line = reader.line_num
                if not fields or (not lines and [field.strip().lower() for field in fields] in HEADERS):
                    continue
                if len(fields) > 2:
                    raise SourceError(
                        f"{path} line {line} has {len(fields)} fields: write path,label and quote what holds commas"
                    )
                name = "/".join(part for part in fields[0].split("/") if part != ".")
                if not name:
                    raise SourceError(f"{path} line {line} names no file: write path,label")
                if name in lines:
                    raise SourceError(
                        f"{path} lists {name!r} twice, in lines {lines[name]} and {line}: paths are identities, so "
                        "remove one of them"
                    )
                lines[name] = line
                yield Entry(line, name, fields[1].strip() or None if len(fields) == 2 else None)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): name a folder or a list") from None
    except csv.Error as error:
        raise SourceError(f"{path} line {reader.line_num} is not CSV ({error}): correct its quotes") from None
