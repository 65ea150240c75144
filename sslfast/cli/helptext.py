"""Help as people read it: paragraphs of docstrings as running text, no markup, wrapped to the terminal."""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from types import MappingProxyType
from typing import Any

_BOX = "╭│╰|+"


def explain(target: Any) -> None:
    """Store the docstring of every field of a dataclass, and of dataclasses inside it, as tyro's help of the field.

    tyro reads docstrings itself, but keeps their line breaks.
    """
    for cls in _dataclasses(target, set()):
        own = vars(cls).get("__dataclass_fields__", {})
        for name, text in _field_docstrings(cls):
            if name in own:
                own[name].metadata = MappingProxyType({"help": paragraphs(text), **own[name].metadata})


def paragraphs(docstring: str) -> str:
    """Running text of a docstring: line breaks inside a paragraph are spaces."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(" ".join(part.split()) for part in parts)


def tidy(text: str, columns: int) -> str:
    """Help that tyro has printed, without markup of docstrings; lines outside of boxes wrapped to ``columns``."""
    lines = []
    for line in text.splitlines():
        line = line.rstrip()
        while "``" in line:  # a box keeps its edges
            line = re.sub(
                r"``([^│\n]*?)(│|$)", lambda found: found[1] + "  " * bool(found[2]) + found[2], line, count=1
            )
        if "│" not in line:
            line = re.sub(r":[a-z]+:`~?([^`]+)`", r"\1", line)
        is_plain = len(line) > columns and not line.startswith(tuple(_BOX)) and "\x1b" not in line
        lines += _wrapped(line, columns) if is_plain else [line]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n" * bool(lines)


def _wrapped(line: str, columns: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4 * line.startswith(" "))
    return textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _dataclasses(target: Any, seen: set[Any]) -> Iterator[type]:
    """Classes of a dataclass and of its bases, and those that annotations of it or of a function name."""
    if not callable(target) or target in seen:
        return
    seen.add(target)
    if isinstance(target, type):
        if not dataclasses.is_dataclass(target):
            return
        yield from (cls for cls in target.__mro__ if dataclasses.is_dataclass(cls))
    for hint in typing.get_type_hints(target, include_extras=True).values():
        waiting = [hint]
        while waiting:
            part = waiting.pop()
            waiting += [*typing.get_args(part)]
            if isinstance(part, type):
                yield from _dataclasses(part, seen)


def _field_docstrings(cls: type) -> Iterator[tuple[str, str]]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time: its bases have the docstrings
        return
    body = getattr(tree, "body", [])
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = getattr(following, "value", None)
            if isinstance(following, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.target.id, value.value
