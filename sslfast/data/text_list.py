"""The list sources beside CSV: text with one path a line, tab-separated tables, JSON arrays and JSON lines."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sslfast.data.csv_list import PATH_NAMES, CsvListSource, Entry, open_list, table_lines, written_label
from sslfast.data.images import SUFFIXES
from sslfast.data.left_out import suffix_of
from sslfast.data.members import LABEL_NAMES, label_text, plain_name
from sslfast.data.source import SourceError, is_file

_TEXT = (".txt", ".lst", ".list")
_LISTS = (*_TEXT, ".tsv", ".json", ".jsonl", ".ndjson")
_FORM = "write an array of objects with path and label, or one such object a line (.jsonl)"
_SEVERAL = re.compile(r"\S+\.[A-Za-z]{2,5}(\s+[0-9]+){2,}|[0-9]+(\t[-+.0-9e]+){2,}\t.*")
_INDEXED = re.compile(r"[0-9]+\t([-+.0-9e]+)\t(.*\S)\s*")
"""A line of MXNet's ``im2rec``: number, label, path."""
_SUFFIXES = "|".join(map(re.escape, sorted(SUFFIXES)))
_NAMED = re.compile(rf"(.+?(?:{_SUFFIXES}))[\s,;]+(.*\S)\s*", re.IGNORECASE)
"""The first words that end like an image's name, and the others."""


@dataclass(kw_only=True, eq=False, repr=False)
class TextListSource(CsvListSource):
    """Image files that a text file names, as :class:`CsvListSource` otherwise.

    ``.txt``, ``.lst``, ``.list``: ``path`` or ``path label``, separated by a tab, spaces, a comma or a semicolon; the
    last word is a label if it is a number, and what follows the name of an image is one. ``number<TAB>label<TAB>path``
    is MXNet's form. ``.tsv``: ``path<TAB>label``, or a header.
    ``.json``, ``.jsonl``, ``.ndjson``: objects with a key of ``PATH_NAMES`` and one of ``LABEL_NAMES``, and perhaps a
    ``prefix`` (folder); also strings and ``[path, label]``.
    """

    name: ClassVar[str] = "list"

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return any(is_file(path, suffix) for suffix in _LISTS)

    @classmethod
    def lines(cls, path: Path) -> Iterator[Entry]:
        suffix = suffix_of(path.name)
        if suffix in _TEXT:
            return _text_lines(path)
        if suffix == ".tsv":
            return table_lines(path, "\t")
        return _json_lines(path, whole=suffix == ".json")


def _text_lines(path: Path) -> Iterator[Entry]:
    with open_list(path) as file:
        for line, text in enumerate(file, 1):
            text = text.rstrip("\r\n")
            if not text.strip():
                continue
            if _SEVERAL.fullmatch(text.strip()):
                raise SourceError(f"{path} line {line} has several labels: give one label, or the path alone")
            if (indexed := _INDEXED.fullmatch(text)) and _is_image(indexed[2]):
                yield Entry(line, indexed[2], _number(indexed[1]))
                continue
            head, tab, tail = text.rpartition("\t")
            if not tab:
                head, _, tail = text.rstrip().rpartition(" ")
            if head and (tab or tail.isdecimal() or _is_image(head) > _is_image(text)):
                yield Entry(line, head.rstrip(" ,;") if not tab else head, written_label(tail))
            elif not _is_image(text) and (named := _NAMED.fullmatch(text)):
                yield Entry(line, named[1], written_label(named[2]))
            else:
                yield Entry(line, text, None)


def _is_image(name: str) -> bool:
    return suffix_of(name.rstrip()) in SUFFIXES


def _number(text: str) -> str:
    try:
        return label_text(float(text)) or text
    except ValueError:
        return text


def _json_lines(path: Path, *, whole: bool) -> Iterator[Entry]:
    with open_list(path) as file:
        if whole:
            values = _parsed(path, file.read(), 1)
            if isinstance(values, dict) and isinstance(values.get("labels"), list):
                values = values["labels"]
            if not isinstance(values, list):
                raise SourceError(f"{path} is no list of images: {_FORM}")
            for number, value in enumerate(values, 1):
                yield _entry(path, number, value)
            return
        for line, text in enumerate(file, 1):
            if text.strip():
                yield _entry(path, line, _parsed(path, text, line))


def _parsed(path: Path, text: str, line: int) -> Any:
    if "\0" in text:
        raise SourceError(f"{path} line {line} holds a NUL byte: save the list as UTF-8 text")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}"
        is_end = error.pos >= len(text.rstrip()) - 1 or not text.endswith("\n")
        why = "is cut short: is the list still being written?" if is_end else "is not JSON"
        raise SourceError(f"{path} {place} {why} ({error.msg}): {_FORM}") from None
    except RecursionError:
        raise SourceError(f"{path} line {line} is nested too deeply: {_FORM}") from None


def _entry(path: Path, line: int, value: Any) -> Entry:
    if isinstance(value, str):
        return Entry(line, value, None)
    if isinstance(value, list) and 1 <= len(value) <= 2 and isinstance(value[0], str):
        return Entry(line, value[0], _label(path, line, value[1]) if len(value) == 2 else None)
    if not isinstance(value, dict):
        raise SourceError(f"{path} entry {line} is no object with path and label: {_FORM}")
    values = {plain_name(str(key)): value for key, value in value.items()}
    name = next((values[key] for key in PATH_NAMES if isinstance(values.get(key), str)), None)
    if name is None:
        raise SourceError(f"{path} entry {line} has no key {' or '.join(PATH_NAMES[:4])}: {_FORM}")
    label = next((_label(path, line, values[key]) for key in LABEL_NAMES if values.get(key) is not None), None)
    prefix = values.get("prefix") or values.get("imgprefix")
    return Entry(line, f"{prefix.rstrip('/')}/{name}" if isinstance(prefix, str) else name, label)


def _label(path: Path, line: int, value: Any) -> str | None:
    label = label_text(value)
    if label is None and value is not None:
        raise SourceError(f"{path} entry {line} has a label that is neither a number nor a name: {value!r:.60}")
    return label
