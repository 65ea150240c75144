"""Names that others chose, as text that any terminal, page or picture takes."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator

_JOINERS = "\u200c\u200d"
"""Format characters that words of living scripts and emoji need."""
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Categories without a glyph of their own: controls, changes of direction, undecodable bytes, line separators."""


def printable(text: str) -> str:
    """A name for one line: control characters, changes of direction and undecodable bytes as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(escaped(c) if is_hidden(c) else c for c in text)


def csv_lines(rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Rows as lines of CSV that end with a line feed, from which every name is read back.

    ``csv.writer`` quotes the line ends that it writes itself, and every reader ends a line at a bare carriage return.
    """
    for row in rows:
        line = io.StringIO(newline="")
        csv.writer(line).writerow(row)  # ends with "\r\n", and so quotes both
        yield line.getvalue()[:-2] + "\n"


def is_hidden(character: str) -> bool:
    """Whether a character has no glyph, or changes how others are shown."""
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS


def escaped(character: str) -> str:
    """A character as Python writes it in a string: ``\\n``, ``\\u732b``; an undecodable byte as ``\\xe9``."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
