"""The CSV source: a list of image files, one ``path,label`` per line."""

import codecs
import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TextIO

from sslfast.data.folder import changed_files, list_images
from sslfast.data.images import SUFFIXES, OnBadImage, read_bytes
from sslfast.data.left_out import listed_system_keys, suffix_of
from sslfast.data.listing import PARQUET, TAR
from sslfast.data.manifest import Manifest
from sslfast.data.members import LABEL_NAMES, label_text, plain_name
from sslfast.data.source import URL, Changes, ImageSource, SourceError, is_file
from sslfast.data.spelling import similar_file

PATH_NAMES = (
    *("path", "file", "filename", "filepath", "image", "imagepath", "imagefile", "img", "imgpath", "imagename"),
    *("imageid", "url"),
)
"""Names of columns, as :func:`plain_name` makes them of any spelling; the first that there is counts, as of
``LABEL_NAMES``."""
NO_LABELS = frozenset(
    (
        *("index", "id", "key", "uid", "uuid", "size", "width", "height", "bytes", "md5", "sha1", "sha256", "hash"),
        *("caption", "captions", "text", "title", "description", "alt", "prompt", "comment", "sentence"),
        *("url", "link", "source", "license", "split", "subset", "set", "fold", "bbox", "boxes"),
        *("time", "date", "timestamp"),
    )
)
"""Names of columns, made likewise, that are no labels where no column is named as one."""


class Entry(NamedTuple):
    """One image of a list."""

    line: int
    path: str
    label: str | None


@dataclass(kw_only=True, eq=False, repr=False)
class CsvListSource(ImageSource):
    """Image files that a ``.csv`` file names: ``root`` is that file, and paths are relative to its folder.

    A line is ``path,label``, quoted as CSV; the label may be empty or missing; semicolons or tabs may stand for the
    commas. A first line with a name of ``PATH_NAMES`` is a header; one with further columns must have it, and one of
    ``LABEL_NAMES`` for labels, which may have another name where there are two. Rows are ordered by path, whatever the
    order of the lines; the content of a file says whether it is an image, not its suffix. Lists are UTF-8, or UTF-16
    with a byte order mark.
    Files in folders of a system, below the folder that is common to all, are left out.
    """

    name: ClassVar[str] = "csv"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ".csv")

    @classmethod
    def lines(cls, path: Path) -> Iterator[Entry]:
        """The entries of a list in its order, paths as written; SourceError, naming the line, where it is no list."""
        return table_lines(path, ",")

    @classmethod
    def open(cls, path: Path, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        entries, ignored = read_entries(path, cls.lines(path))
        _refuse_same_files(path, entries)
        files = cls(root=path, paths=sorted(entries))
        images = list_images(files, progress=progress)
        source = files.take(images.rows)
        last = cut_line(path, entries)
        return Manifest.from_columns(
            source,
            sizes=images.sizes,
            sha1=images.sha1,
            names=(entries[name].label for name in source.paths),
            excluded=[
                (name, f"{reason}, line {entries[name].line}{_remark(path, entries[name], reason, last, at < _LOOKED)}")
                for at, (name, reason) in enumerate(images.bad)
            ],
            ignored=ignored,
            on_bad_image=on_bad_image,
            numbered=True,
        )

    def read(self, row: int) -> bytes:
        return read_bytes(self.where(row))

    def where(self, row: int) -> str:
        return os.path.join(self.root.parent, self.paths[row])

    def system_keys(self) -> list[str | None]:
        return listed_system_keys(self.paths)

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """Of the files, and of the list itself: lines that went away or are new, and labels."""
        entries, _ = read_entries(self.root, self.lines(self.root))
        changes = changed_files(self, manifest, contents=contents)
        for row, path in enumerate(self.paths):
            label = int(manifest.labels[row])
            then = manifest.classes[label] if label >= 0 else None
            if path not in entries:
                changes.missing.append((path, "no longer in the list"))
            elif manifest.classes and not _same_label(entries[path].label, then):
                changes.changed.append((path, f"label {then or 'none'} -> {entries[path].label or 'none'}"))
        known = {*self.paths, *(path for path, _ in manifest.excluded)}
        changes.added = [(path, f"line {entry.line}") for path, entry in entries.items() if path not in known]
        return changes


_LOOKED = 20
"""Missing files for which a file with a similar name is searched."""


def _remark(path: Path, entry: Entry, reason: str, last: int | None, looked: bool) -> str:
    """Why a file that is not there may be missing."""
    if "No such file" not in reason:
        return ""
    if entry.line == last:
        return ", where the list ends without a line end: is it still being written?"
    return (similar_file(path.parent / entry.path) or _misread(path.parent, entry)) if looked else ""


def _misread(folder: Path, entry: Entry) -> str:
    """What else a line may mean whose path is no file."""
    if any("\udc80" <= character <= "\udcff" for character in entry.path):
        return "; its name is not UTF-8: save the list as UTF-8"
    if "\\" in entry.path:
        return "; write / in place of \\"
    words = [*re.split(r"[\t,; ]+", entry.path), entry.label or ""]
    if (found := next((word for word in words if word and os.path.isfile(folder / word)), None)) is not None:
        return f"; {found!r} is a file: write the path, then the label"
    names = (entry.path + suffix for suffix in sorted(SUFFIXES))
    if (found := next((name for name in names if os.path.isfile(folder / name)), None)) is not None:
        return f"; {found!r} is there: write names with their suffixes"
    if entry.line == 1 and not suffix_of(entry.path):
        return "; if this is a header, name its columns path and label"
    return ""


def _refuse_same_files(path: Path, entries: Mapping[str, Entry]) -> None:
    """SourceError: one file under two names, such as its relative and its absolute path."""
    places: dict[str, Entry] = {}
    for name, entry in entries.items():
        other = places.setdefault(os.path.normpath(os.path.join(path.parent, name)), entry)
        if other is not entry and _is_same_file(path.parent / name, path.parent / other.path):
            raise SourceError(
                f"{path} lists one file twice, as {other.path!r} in line {other.line} and as {name!r} in line "
                f"{entry.line}: files are identities, so remove one of them"
            )


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _same_label(now: str | None, then: str | None) -> bool:
    """Earlier versions kept ``1.0`` of a table, and took 1 for ``"01"`` of JSON."""
    if now == then or now is None or then is None:
        return now == then
    try:
        return float(now) == float(then)
    except ValueError:
        return False


def cut_line(path: Path, entries: Mapping[str, Entry]) -> int | None:
    """Number of the last line if it has no end."""
    with path.open("rb") as file:
        file.seek(-min(2, os.fstat(file.fileno()).st_size), os.SEEK_END)
        end = file.read(2).replace(b"\0", b"")[-1:]
    return max((entry.line for entry in entries.values()), default=None) if end != b"\n" else None


def read_entries(path: Path, lines: Iterable[Entry]) -> tuple[dict[str, Entry], dict[str, int]]:
    """The entries of a list by their path, and what is left out, by the keys of :mod:`sslfast.data.left_out`.

    SourceError, naming the line: no path, a NUL byte, or the same path twice.
    """
    entries: dict[str, Entry] = {}
    try:
        for line, text, label in lines:
            if "\0" in text:
                raise SourceError(f"{path} line {line} holds a NUL byte: save the list as UTF-8 text")
            name = "/".join(part for part in text.split("/") if part != ".")
            if URL.match(name):
                remedy = (
                    "URLs of shards, one a line, are DATA in a file whose name ends in .roots"
                    if suffix_of(name.partition("?")[0]) in (TAR, PARQUET)
                    else "download the images (the URLs one a line in urls.txt: wget -x -i urls.txt) and list their "
                    "files, or pack them into .tar shards and give the URL of these as DATA"
                )
                raise SourceError(
                    f"{path} line {line} names a URL, {name!r:.80}: a list names files of this machine; {remedy}"
                )
            if not name:
                raise SourceError(f"{path} line {line} names no file: write path,label")
            if name in entries:
                if suffix_of(label or "") in SUFFIXES and suffix_of(name) not in SUFFIXES:
                    raise SourceError(f"{path} line {line} begins with {name!r}: write the path, then the label")
                raise SourceError(
                    f"{path} lists {name!r} twice, in lines {entries[name].line} and {line}: paths are identities, so "
                    "remove one of them"
                )
            entries[name] = Entry(line, name, label)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): name a folder or a list") from None
    keys = listed_system_keys([*entries])
    used = {name: entry for (name, entry), key in zip(entries.items(), keys, strict=True) if key is None}
    return used, Counter(key for key in keys if key is not None)


def open_list(path: Path) -> TextIO:
    """Undecodable bytes are kept; programs of Windows write a byte order mark, which says UTF-8 or UTF-16."""
    with path.open("rb") as file:
        mark = file.read(2)
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return path.open(encoding="utf-16", errors="replace", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def find_columns(names: Sequence[str]) -> tuple[int, int | None] | None:
    """Position of the path and of the label in a header; None where it is none. Of two columns that are not of
    ``NO_LABELS`` the other one is the label, whatever its name."""
    names = [plain_name(name) for name in names]

    def place(of: Sequence[str]) -> int | None:
        return next((names.index(name) for name in of if name in names), None)

    path, label = place(PATH_NAMES), place(LABEL_NAMES)
    if path is None:
        return None
    if label is None and names == ["path"]:
        label = 1
    elif label is None and len(names) == 2 and names[1 - path] and names[1 - path] not in NO_LABELS:
        label = 1 - path
    return path, label


def table_lines(path: Path, delimiter: str) -> Iterator[Entry]:
    """The lines of a table with or without a header; in place of commas there may be semicolons or tabs."""
    columns: tuple[int, int | None] | None = None
    is_first = True
    with open_list(path) as file:
        first = file.readline()
        file.seek(0)
        for other in ";\t":
            fields = first.split(other)
            if delimiter not in first and len(fields) > 1 and _begins_table(fields):
                delimiter = other
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            for fields in reader:
                line = reader.line_num
                if not fields:
                    continue
                if is_first:
                    is_first, columns = False, find_columns(fields)
                    if columns is not None:
                        continue
                at, label_at = columns or (0, 1)
                if columns is None and len(fields) > 2:
                    raise SourceError(
                        f"{path} line {line} has {len(fields)} fields: write path,label and quote what holds commas, "
                        "or begin with a line that names the columns (path, label, ...)"
                    )
                label = fields[label_at] if label_at is not None and label_at < len(fields) else ""
                yield Entry(line, fields[at] if at < len(fields) else "", written_label(label))
        except csv.Error as error:
            raise SourceError(f"{path} line {reader.line_num} is not CSV ({error}): correct its quotes") from None


def written_label(text: str) -> str | None:
    """The label that text states, of any length; None where it is empty."""
    return label_text(text) or text.strip() or None


def _begins_table(fields: Sequence[str]) -> bool:
    return suffix_of(fields[0].strip('" ')) in SUFFIXES or find_columns(fields) is not None
