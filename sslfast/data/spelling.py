"""Names that look the same and are not: two Unicode forms, letter case, spaces at the ends, invisible characters."""

import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

_SHOWN = 3


def looks_like(name: str) -> str:
    """The same for names that look alike."""
    visible = "".join(c for c in unicodedata.normalize("NFC", name) if not _is_invisible(c))
    plain = unicodedata.normalize("NFC", " ".join(visible.split()).casefold())
    return plain.lstrip("0") or "0" if plain.isdecimal() else plain


def difference(one: str, other: str) -> str:
    """In what two names differ that look alike."""
    one, other = unicodedata.normalize("NFC", one), unicodedata.normalize("NFC", other)
    if one == other:
        return "the Unicode form of the letters (NFC and NFD; macOS writes NFD)"
    if one.casefold() == other.casefold():
        return "upper and lower case"
    if one.strip().casefold() == other.strip().casefold():
        return "spaces at the end"
    if one.strip().isdecimal() and one.strip().lstrip("0") == other.strip().lstrip("0"):
        return "leading zeros"
    return "spaces or invisible characters"


def alike(ours: Iterable[str], theirs: Iterable[str]) -> str:
    """The first pairs of names that look alike and in what they differ; empty where there is none."""
    found = {looks_like(name): name for name in ours}
    pairs = [(found[looks_like(name)], name) for name in theirs if found.get(looks_like(name), name) != name]
    shown = [f"{one!a} and {other!a} differ in {difference(one, other)}" for one, other in pairs[:_SHOWN]]
    more = [f"and {len(pairs) - _SHOWN} more pairs"] if len(pairs) > _SHOWN else []
    return "; ".join(shown + more)


def alike_among(names: Collection[str]) -> str:
    """:func:`alike` of names of one set."""
    first: dict[str, str] = {}
    others = [name for name in sorted(names) if first.setdefault(looks_like(name), name) != name]
    return alike(first.values(), others)


def similar_file(path: Path) -> str:
    """Where there is no such file: the remark that one whose name looks the same is there; empty where none is."""
    try:
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    found = alike([path.name], there)
    return f"; a file with a name that looks the same is there: {found}" if found else ""


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cf", "Cc") and not character.isspace()
