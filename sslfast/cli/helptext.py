"""Help as people read it: paragraphs of docstrings as running text, no markup, wrapped to the terminal."""

import ast
import dataclasses
import inspect
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TextIO


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


def flat(printed: str) -> str:
    """Help that tyro has printed in one column of boxes, as lines of any length without markup: what stands before the
    boxes, then of each its title as ``[title]``, its text, and ``option<TAB>help`` for every option."""
    lines: list[str] = []
    is_box = is_open = is_positional = False  # is_open: the next line of the box goes on with the text before
    for line in printed.splitlines():
        if line.startswith("╭─ "):
            is_box, is_open = True, False
            lines.append(f"[{line.strip('╭─╮ ')}]")
            is_positional = lines[-1].startswith("[positional")
        elif line.startswith(("╰", "│ ──")):
            is_box, is_open = is_box and not line.startswith("╰"), False
        elif not is_box:
            lines.append(line.rstrip())
        else:
            text = line.strip("│")[1:].rstrip()
            name, _, inline = text.partition("  ")
            if text and (text[0] == "-" or (text[0] != " " and is_positional)):
                lines.append(f"{name}\t{inline.strip()}")
                is_open = True
            elif is_open:
                lines[-1] += f" {text.strip()}" if text.strip() else "\\n\\n"
            else:
                lines.append(text.strip())
                is_open = True
    joined = "\n".join(re.sub(r"(\t|\\n) ", r"\1", line) for line in lines)
    joined = re.sub(r":[a-z]+:`~?([^`\n]+)`", r"\1", re.sub(r"``(.*?)``", r"\1", joined))
    return re.sub(r"\n{3,}", "\n\n", joined).strip("\n") + "\n"


def render(text: str, screen: TextIO) -> str:
    """What :func:`flat` made, wrapped and in boxes for the terminal; option names are bold on one."""
    columns = max(40, shutil.get_terminal_size().columns)
    corners, bar, edge = ("╭╮╰╯", "─", "│") if "utf" in (screen.encoding or "").lower() else ("++++", "-", "|")
    bold = ("\x1b[1m", "\x1b[0m") if screen.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    lines: list[str] = []
    is_box = False

    def put(content: str, *, is_name: bool = False) -> None:
        space = " " * (columns - 4 - len(content))
        lines.append(
            f"{edge} {bold[0]}{content}{bold[1]}{space} {edge}" if is_name else f"{edge} {content}{space} {edge}"
        )

    def wrap(content: str, indent: str) -> list[str]:
        parts = content.split("\\n\\n")
        wrapped = [textwrap.wrap(part, columns - 4 - len(indent), break_on_hyphens=False) for part in parts]
        return [indent + line for part in wrapped for line in ([""] if part is not wrapped[0] else []) + part]

    def close() -> None:
        if is_box:
            lines.append(corners[2] + bar * (columns - 2) + corners[3])

    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            close()
            is_box = True
            title = f"{bar} {line[1:-1]} "
            lines.append(corners[0] + title + bar * (columns - 2 - len(title)) + corners[1])
        elif not is_box:
            lines += _wrapped(line, columns) if len(line) > columns else [line]
        elif "\t" in line:
            name, help_text = line.split("\t")
            for part in wrap(name, ""):
                put(part, is_name=True)
            for part in wrap(help_text, " " * 6):
                put(part)
        else:
            for part in wrap(line, ""):
                put(part)
            put(bar * (columns - 4))
    close()
    return "\n".join(lines) + "\n"


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
