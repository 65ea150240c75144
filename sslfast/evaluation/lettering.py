"""Names on pictures: a font of the machine that has their characters, or else escapes in place of the missing ones.

Pillow's own font has Latin letters alone and draws every other character as the same box. Fonts are looked for in the
folders of the system and of the user, and in matplotlib where it is installed; nothing is downloaded.
"""

import bisect
import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont, features

from sslfast.runs import print_error
from sslfast.text import escaped, printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_MOST_FONTS = 5000
_MOST_CHARACTERS = 300
_CHECKED_AT = 20
_ABSENT = "\uffff"
"""No character, so that every font draws its box for it."""
_UNASSIGNED = "\u0378"
_STYLES = ("mono", "serif", "condensed", "light", "thin", "black", "bold", "italic", "oblique", "math")


class Lettering:
    """Chooses text and font for the names on one picture.

    Args:
        fonts: files to look in when Pillow's own font does not do; None: those of :func:`font_files`.
    """

    def __init__(self, fonts: tuple[Path, ...] | None = None) -> None:
        self._fonts = fonts
        self._missing: dict[str, None] = {}

    def __call__(self, text: str, size: int) -> tuple[str, Font]:
        """What to draw for a name, and the font to draw it with at ``size`` pixels.

        The first font that has all characters; else the one that lacks the fewest, with these as escapes. Control
        characters and changes of direction are always escapes.
        """
        text = printable(unicodedata.normalize("NFC", text))
        needed = frozenset(c for c in text if not c.isascii() and not _is_joining(c))
        path, lacking = self._choose(needed)
        self._missing.update(dict.fromkeys(sorted(lacking)))
        shown, is_escaped = "", False
        for character in text:
            # A mark goes with its letter.
            is_mark = unicodedata.category(character).startswith("M") or _is_joining(character)
            is_escaped = character in lacking or (is_escaped and is_mark)
            if is_escaped:
                shown += escaped(character)
            elif _has_shaping() or not _is_joining(character):  # without it they are boxes
                shown += character
        return shown, load_font(path, size)

    def fitted(self, text: str, size: int, width: float, *, keep_end: bool = False) -> tuple[str, Font]:
        """As :meth:`__call__`, shortened to ``width`` pixels: the beginning is kept, or the end."""
        few = text[-_MOST_CHARACTERS:] if keep_end else text[:_MOST_CHARACTERS]
        shown, font = self(few, size)
        if len(few) == len(text) and font.getlength(shown) <= width:
            return shown, font

        def cut(count: int) -> str:
            return "..." + shown[len(shown) - count :].lstrip() if keep_end else shown[:count].rstrip() + "..."

        count = bisect.bisect_right(range(1, len(shown)), width, key=lambda some: font.getlength(cut(some)))
        while keep_end and count and unicodedata.combining(shown[-count]):  # a mark that lost its letter
            count -= 1
        return cut(count), font

    def report(self) -> None:
        """Say once, on standard error, which characters no font has."""
        if self._missing:
            some = list(self._missing)
            shown = " ".join(f"{c} ({escaped(c)})" for c in some[:5]) + (" ..." if len(some) > 5 else "")
            print_error(
                f"no font that was found here draws {len(some)} of the characters in the names, which the picture "
                f"shows as escapes: {shown}; install a font that has them, for example Noto"
            )
            self._missing.clear()

    def _choose(self, needed: frozenset[str]) -> tuple[Path | None, frozenset[str]]:
        path, lacking = None, _lacking(None, needed)
        for other in (font_files() if self._fonts is None else self._fonts) if lacking else ():
            found = _lacking(other, needed)
            if len(found) < len(lacking):
                path, lacking = other, found
            if not lacking:
                break
        return path, lacking


@lru_cache(maxsize=1)
def font_files() -> tuple[Path, ...]:
    """TrueType and OpenType files of this machine, upright regular ones first."""
    found: dict[Path, None] = {}
    for folder in _font_folders():
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith((".ttf", ".otf", ".ttc")) and len(found) < _MOST_FONTS:
                    found[Path(parent, name)] = None
    return tuple(sorted(found, key=lambda path: sum(style in path.stem.lower() for style in _STYLES)))


@lru_cache(maxsize=256)
def load_font(path: Path | None, size: int) -> Font:
    """The font in a file, or Pillow's own, at ``size`` pixels. Raises OSError where it cannot be used."""
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _font_folders() -> Iterator[Path]:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts")
    elif sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"
        yield Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft" / "Windows" / "Fonts"
    else:
        yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "fonts"
        yield home / ".fonts"
        for folder in (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":"):
            if folder:
                yield Path(folder) / "fonts"
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        yield Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"


def _lacking(path: Path | None, needed: frozenset[str]) -> frozenset[str]:
    return frozenset(c for c in needed if not _has(path, c))


@lru_cache(maxsize=1 << 16)
def _has(path: Path | None, character: str) -> bool:
    """Whether a font draws a character, and not the box that it draws for none.

    Fonts of last resort, which draw a sign of its block for every character, have none.
    """
    if not _has_shaping() and unicodedata.bidirectional(character) in ("R", "AL"):
        return False  # letters would stand in the wrong order
    try:
        box = _drawn(path, _ABSENT)
        return character.isspace() or (_drawn(path, character) != box == _drawn(path, _UNASSIGNED))
    except (OSError, ValueError):  # a damaged font, or one of pictures in other sizes
        return False


def _drawn(path: Path | None, character: str) -> tuple[object, ...]:
    font = _plain_font(path)
    mask, offset = font.getmask2(character)
    return mask.size, offset, bytes(mask), font.getlength(character)


@lru_cache(maxsize=64)
def _plain_font(path: Path | None) -> ImageFont.FreeTypeFont:
    """A font without shaping, which sets a mark that has no letter on a dotted circle."""
    font = load_font(path, _CHECKED_AT)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType")
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _is_joining(character: str) -> bool:
    """Joiners and variation selectors: without a glyph of their own."""
    return character in "\u200c\u200d" or "\ufe00" <= character <= "\ufe0f"


@lru_cache(maxsize=1)
def _has_shaping() -> bool:
    """Whether Pillow orders text from right to left and joins letters."""
    return bool(features.check("raqm"))
