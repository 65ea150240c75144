"""Mistakes in the arguments of a command, which tyro describes in boxes, as one line like every other error."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sslfast.cli.helptext import explain, flat, render
from sslfast.config import check_numbers
from sslfast.files import check_writable

T = TypeVar("T")

LIMITS: dict[str, tuple[float, float]] = {
    "rounds": (1, 10**6),
    "seconds": (0, 10**6),
    "steps": (1, 10**9),
    "batch_size": (1, 1 << 20),
    "workers": (0, 1024),
    "count": (1, 1000),
    "seed": (0, 2**63 - 1),
    "epochs": (1, 10**6),
    "train_per_photo": (1, 10**6),
    "val_per_photo": (1, 10**6),
    "jpg_share": (0, 1),
    "max_resolution": (8, 1 << 16),
    "quality": (1, 100),
    "white_level": (255, 65535),
    "max_pixels": (1, 1 << 32),
    "nodes": (1, 10**5),
    "gpus_per_node": (0, 64),
    "processes_per_node": (1, 1024),
    "cpus_per_process": (1, 1024),
    "memory_gb": (1, 10**5),
    "hours": (0.01, 24 * 366),
    "save_seconds": (1, 10**5),
    "requeues": (0, 10**4),
}
"""Smallest and largest value of every number among the options of commands that have a dataclass of their own."""

_WIDE = "10000"  # columns: nothing is broken into lines
_ONE_BOX = "129"  # columns: boxes of help stand below each other
_EDGES = "│╭╮╰╯|+ \t"
_RULE = re.compile(r"[─\-]{4,}")
_NESTED = re.compile(r"Error parsing [\w.]+: ")
_OPTION = re.compile(r"Error parsing (\S+): (.*)")
_MISSING = re.compile(r"(?:Missing from .*?:|Required options:?)")
_NUMBER = re.compile(r"(?:invalid literal for (int)\(\)|could not convert string to float).*: ('.*')")
_VALUES = re.compile(r"Could not find valid parse for arguments: \[(.*)\]")
_CHOICE = re.compile(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.")


def parse(target: Callable[..., T], arguments: list[str], *, prog: str, **options: Any) -> T | int:
    """The value that tyro builds from the arguments, or the exit code after it has printed help.

    Raises:
        ValueError: the arguments are wrong; one line that names them and what is possible.
    """
    printed = io.StringIO()
    is_help = bool({"-h", "--help"} & set(arguments))
    if is_help:
        explain(target)
        explain(type(options.get("default")))
    shown = _Help()
    try:
        with _columns(_ONE_BOX if is_help else _WIDE), redirect_stderr(printed), redirect_stdout(shown):
            value = tyro.cli(target, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        print(render(flat(shown.getvalue()), sys.stdout) if is_help else shown.getvalue(), end="")
        code = stop.code if isinstance(stop.code, int) else 2
        if code == 0 or not printed.getvalue().strip():
            return code
        raise ValueError(one_line(printed.getvalue(), prog)) from None
    sys.stderr.write(printed.getvalue())
    if dataclasses.is_dataclass(value):
        try:
            check_numbers(value, LIMITS)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"--{name.rpartition('.')[2].replace('_', '-')} {rest}") from None
        for name in ("json", "chart"):
            if isinstance(path := getattr(value, name, None), Path):
                check_writable(path, remedy=f"name another file with --{name}")
    return value


def one_line(box: str, prog: str) -> str:
    """The line for what tyro printed about wrong arguments."""
    rows = [row.strip(_EDGES) for row in box.splitlines()]
    parts: list[list[str]] = [[]]
    for row in rows[1:]:  # the first one is the title; without Unicode a rule follows
        if _RULE.fullmatch(row):
            parts.append([])
        elif row:
            parts[-1].append(row)
    first, *others = [part for part in parts if part and "full helptext" not in part[0]] or [["wrong arguments"]]
    message = " ".join(first)
    see = f"; `{prog} --help` lists the options"
    if _NESTED.match(message) and not message.startswith("Error parsing -"):
        return _NESTED.sub("", message, count=1)  # the configuration's own words
    if _MISSING.match(message):
        names = [row.split()[0] for row in first[1:] if re.fullmatch(r"(--?)?[A-Za-z][\w.\-/]*( .*)?", row)]
        return f"{names[0] if names else 'an argument'} is missing{see}"
    if message.startswith("Unrecognized options:"):
        words = message.removeprefix("Unrecognized options:").replace(",", "").split()
        near = [row for part in others for row in part if row.startswith("--")]
        names = list(dict.fromkeys(row.split()[0] for row in near))
        return f"unknown option or argument {' '.join(words)}" + (
            f"; did you mean {' or '.join(names[:3])}?" if names else see
        )
    if choice := _CHOICE.search(message):
        return f"{choice[2]} must be one of {choice[3].replace(chr(39), '')}; got {choice[1]}"
    if option := _OPTION.match(message):
        expected = next((row.split("(")[0] for part in others for row in part if row.startswith("--")), "")
        number, values = _NUMBER.search(option[2]), _VALUES.match(option[2])
        if number is not None:
            return f"{option[1]} must be {'a whole' if number[1] else 'a'} number, got {number[2]}{see}"
        if values is not None and expected:
            return f"{option[1]} must be {expected.partition(' ')[2].strip()}, got {values[1]}{see}"
        return f"{option[1]}: {option[2]}{see}"
    return message.rstrip(".") + see


class _Help(io.StringIO):
    """Keeps what tyro prints, in the one form that :func:`flat` reads, whatever the screen."""

    encoding = "utf-8"


@contextmanager
def _columns(count: str) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = count
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before
