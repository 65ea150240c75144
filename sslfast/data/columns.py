"""Columns of a manifest: read from the lines of its file, of which numpy cuts the bytes, and labels by class names."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sslfast.data.source import PackedPaths

_BLOCK = 1 << 23  # bytes of lines at a time
_TAB, _LINE = 9, 10
_ESCAPES = (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"))
_ESCAPED = re.compile(r"[\\\t\n\r]")
_UNESCAPES = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
_DIGITS = 18
"""Of a number that fits into 64 bits whatever they are."""


def read_header(file: BinaryIO, path: str, *, version: str, columns: str, remedy: str) -> list[str]:
    """The lines from ``version`` up to the one that begins with ``columns``, without their ends.

    Raises:
        ValueError: there is none, or the first one is another; names ``path`` and ``remedy``.
    """

    def line() -> str:
        return file.readline().decode("utf-8", "surrogateescape")

    header = [line().removesuffix("\n")]
    if header[0] != version:
        raise ValueError(f"{path} is not a manifest (its first line must be {version!r}): {remedy}")
    while not f"{header[-1]}\t".startswith(f"{columns}\t"):
        following = line()
        if not following:
            raise ValueError(f"manifest {path} was cut short (it has no line {columns!r}): {remedy}")
        header.append(following.removesuffix("\n"))
    return header


def read_columns(
    file: BinaryIO, count: int, *, texts: Sequence[int], numbers: Sequence[int], but: int
) -> tuple[list[PackedPaths], list[NDArray[np.int64]], str]:
    """Columns of tab-separated lines by position; a last line without its end, of a file cut short, is left out.

    Args:
        file: from the first of the lines on.
        count: columns of a line.
        texts: those that are strings, escaped.
        numbers: those that are numbers.
        but: number of the column, not the first one, that the digest is not about.

    Returns:
        The strings, the numbers, and the SHA-256 of the lines without one of their columns.

    Raises:
        ValueError: a line has another number of columns, or no number.
    """
    strings: list[list[PackedPaths]] = [[] for _ in texts]
    counts: list[list[NDArray[np.int64]]] = [[np.empty(0, dtype=np.int64)] for _ in numbers]
    sha, rest = hashlib.sha256(), b""
    while block := file.read(_BLOCK):
        whole, end, rest = (rest + block).rpartition(b"\n")
        if not end:
            continue
        data = np.frombuffer(whole + end, dtype=np.uint8)
        cuts = np.flatnonzero((data == _TAB) | (data == _LINE))
        is_line = data[cuts] == _LINE
        if len(cuts) % count or not np.array_equal(is_line, np.arange(len(cuts)) % count == count - 1):
            raise ValueError(f"a line has another number of columns than {count}")
        starts, ends = np.concatenate([[0], cuts[:-1] + 1]).reshape(-1, count), cuts.reshape(-1, count)
        for parts, place in zip(strings, texts, strict=True):
            parts.append(_strings(data, starts[:, place], ends[:, place]))
        for arrays, place in zip(counts, numbers, strict=True):
            arrays.append(_numbers(data, starts[:, place], ends[:, place]))
        sha.update(data[~_between(len(data), starts[:, but] - 1, ends[:, but])].tobytes())
    return (
        [PackedPaths.join(parts) for parts in strings],
        [np.concatenate(arrays) for arrays in counts],
        sha.hexdigest(),
    )


def _between(length: int, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[length]``: whether a place is in one of the spans, which are in order and apart."""
    steps = np.zeros(length + 1, dtype=np.int8)
    steps[starts] += 1
    steps[ends] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _strings(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> PackedPaths:
    text = data[_between(len(data), starts, ends)]
    found = PackedPaths.of_text(text, np.cumsum(ends - starts))
    return PackedPaths(map(unescape, found)) if (text == ord("\\")).any() else found


def _numbers(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of digits, with a sign or without."""
    negative = data[starts] == ord("-")
    starts = starts + negative
    lengths = ends - starts
    longest = int(lengths.max(initial=1))
    if lengths.min(initial=1) < 1 or longest > _DIGITS:
        raise ValueError("no number")
    found = np.zeros(len(starts), dtype=np.int64)
    for place in range(longest):
        there = lengths > place
        digit = data[np.where(there, starts + place, 0)].astype(np.int64) - ord("0")
        if (there & ((digit < 0) | (digit > 9))).any():
            raise ValueError("no number")
        found = np.where(there, 10 * found + digit, found)
    return np.where(negative, -found, found)


def number_classes(names: Iterable[str | None], *, numbered: bool) -> tuple[NDArray[np.int64], list[str]]:
    """Label of each name, and the classes: sorted, with ``numbered`` by number if all of them are numbers."""
    found: dict[str | None, int] = {None: -1}
    labels = np.fromiter((found.setdefault(name, len(found) - 1) for name in names), dtype=np.int64)
    names_found = [name for name in found if name is not None]
    classes = sorted(names_found)
    if numbered and all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    places = {name: place for place, name in enumerate(classes)}
    return np.array([*(places[name] for name in names_found), -1], dtype=np.int64)[labels], classes


def escape(text: str) -> str:
    """A string as it stands in a line."""
    if not _ESCAPED.search(text):
        return text
    for plain, escaped in _ESCAPES:
        text = text.replace(plain, escaped)
    return text


def unescape(text: str) -> str:
    """The string that :func:`escape` was given."""
    if "\\" not in text:
        return text
    parts = iter(text)
    return "".join(_UNESCAPES.get(next(parts, "\\"), "?") if part == "\\" else part for part in parts)
