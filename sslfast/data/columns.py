"""Reading the lines of a manifest file into columns, without a Python object for every row."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sslfast.data.source import PackedPaths

_CHUNK = 1 << 16  # rows that are objects at a time


def read_header(lines: Iterator[str], path: str, *, version: str, columns: str, remedy: str) -> list[str]:
    """The lines from ``version`` up to the one that begins with ``columns``, without their ends.

    Raises:
        ValueError: there is none, or the first one is another; names ``path`` and ``remedy``.
    """
    header = [next(lines, "").removesuffix("\n")]
    if header[0] != version:
        raise ValueError(f"{path} is not a manifest (its first line must be {version!r}): {remedy}")
    while not f"{header[-1]}\t".startswith(f"{columns}\t"):
        line = next(lines, None)
        if line is None:
            raise ValueError(f"manifest {path} was cut short (it has no line {columns!r}): {remedy}")
        header.append(line.removesuffix("\n"))
    return header


def read_columns(
    lines: Iterator[str], *, texts: Sequence[int], numbers: Sequence[int], unescape: Callable[[str], str]
) -> tuple[list[PackedPaths], list[NDArray[np.int64]]]:
    """Columns of tab-separated lines by position; a last line without its end, of a file cut short, is left out.

    Raises:
        IndexError, ValueError, OverflowError: a line has too few columns, or no number.
    """
    found: list[list[PackedPaths]] = [[] for _ in texts]
    counts: list[list[NDArray[np.int64]]] = [[np.empty(0, dtype=np.int64)] for _ in numbers]
    while chunk := list(islice(lines, _CHUNK)):
        rows = [line[:-1].split("\t") for line in chunk if line.endswith("\n")]
        for parts, place in zip(found, texts, strict=True):
            parts.append(PackedPaths([unescape(row[place]) for row in rows]))
        for arrays, place in zip(counts, numbers, strict=True):
            arrays.append(np.array([int(row[place]) for row in rows], dtype=np.int64))
    return [PackedPaths.join(parts) for parts in found], [np.concatenate(arrays) for arrays in counts]
