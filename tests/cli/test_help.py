"""Help and completion: wrapped, without markup, and complete for every command."""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sslfast.cli import main as cli
from sslfast.cli.completion import build_parser
from sslfast.cli.helptext import explain, flat, paragraphs, render
from sslfast.recipes import RECIPES


def names(commands: dict[str, cli.Command], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in commands.items():
        yield from names(dict(command.commands), (*before, name)) if command.commands else [(*before, name)]


@pytest.mark.parametrize("words", [(), ("evaluate",), *names(cli.COMMANDS)], ids=" ".join)
@pytest.mark.parametrize("columns", [80, 121])
def test_help_is_wrapped_and_has_no_markup(
    words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert not re.search(r"``|:(class|func|mod|meth|attr|data):|\x1b", text)
    longest = max(text.splitlines(), key=len)
    assert len(longest) <= columns or "|".join(RECIPES) in longest, longest
    edges = [line for line in text.splitlines() if line.startswith("│")]
    assert all(line.endswith("│") for line in edges)


def test_paragraphs() -> None:
    assert paragraphs("One\n    two (a,\n    .b).\n\n    Three\n    `x`.") == "One two (a, .b).\n\nThree `x`."


PRINTED = """usage: it

one two

╭─ positional arguments ─────╮
│ DATA  Of :class:`~a.Thing` │
│       and ``more           │
│       words``.             │
╰────────────────────────────╯
╭─ b options ────────────────╮
│ What                       │
│ it is.                     │
│ ────────────────────────── │
│ --k INT                    │
│     One.                   │
│                            │
│     Two.                   │
╰────────────────────────────╯
"""
FLAT = """usage: it

one two

[positional arguments]
DATA\tOf a.Thing and more words.
[b options]
What it is.
--k INT\tOne.\\n\\nTwo.
"""


class Screen(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]


def test_help_without_boxes_and_in_those_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flat(PRINTED) == FLAT
    monkeypatch.setenv("COLUMNS", "40")
    lines = render(FLAT, Screen()).splitlines()
    assert lines[4] == f"╭─ positional arguments {'─' * 15}╮"
    assert lines[5:7] == [f"│ {'DATA':36} │", f"│       {'Of a.Thing and more words.':30} │"]
    assert {len(line) for line in lines[4:]} == {40}
    assert lines[-5:-1] == [f"│ {text:36} │" for text in ("--k INT", "      One.", "", "      Two.")]
    ascii_screen = Screen()
    ascii_screen.encoding = "ascii"
    assert render(FLAT, ascii_screen).isascii()
    long = "x" * 99
    assert max(map(len, render(f"a {long}\n[o]\n--o\t{long}\n", Screen()).splitlines()[1:])) >= 40


def test_docstrings_become_the_help_of_fields() -> None:
    @dataclass(kw_only=True)
    class Options:
        size: int = 1
        """First
        (second) line."""
        other: int = 2

    explain(Options)
    assert Options.__dataclass_fields__["size"].metadata["help"] == "First (second) line."
    assert "help" not in Options.__dataclass_fields__["other"].metadata


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import shtab

    folder = tmp_path_factory.mktemp("completion")
    parser = build_parser(cli.COMMANDS, cli.main, file=shtab.FILE)
    found = {}
    for shell in ("bash", "zsh", "fish"):
        found[shell] = folder / shell
        found[shell].write_text(shtab.complete(parser, shell=shell))
    return found


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["pre"], {"pretrain", "preview"}),
        (["pretrain", "--recipe", "pirl-r"], {"pirl-rotation", "pirl-rotation-jigsaw"}),
        (["pretrain", "x", "--optim.name", "l"], {"lars", "lamb"}),
        (["pretrain", "x", "--method.teacher"], {"--method.teacher-temperature", "--method.teacher-warmup-epochs"}),
        (["pretrain", "--model.fac"], {"--model.factory"}),
        (["preview", "x", "--rec"], {"--recipe"}),
        (["evaluate", "l"], {"linear", "lowshot"}),
        (["evaluate", "knn", "--temp"], {"--temperature"}),
        (["export", "--format", "torchv"], {"torchvision"}),
        (["data", "prepare", "--on-bad-image", ""], {"error", "skip"}),
        (["runs", "--co"], {"--columns"}),
        (["completion", "--plug"], {"--plugin"}),
    ],
)
def test_bash_completes(typed: list[str], expected: set[str], scripts: dict[str, Path]) -> None:
    before = typed[-2] if len(typed) > 1 else "sslfast"
    script = f"""
source "$1"; shift
COMP_WORDS=(sslfast "$@"); COMP_CWORD=$#; COMPREPLY=()
_shtab_sslfast sslfast "{typed[-1]}" "{before}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script, "bash", scripts["bash"], *typed], capture_output=True, text=True)
    assert done.stderr == ""
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_the_same(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    for word in ("pirl-rotation-jigsaw", "optim.lr-per-256-images", "method.image-view.crop.size", "lowshot"):
        assert word in text
    if program := shutil.which(shell):
        done = subprocess.run([program, "-n", scripts[shell]], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_without_its_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    line = capsys.readouterr().err
    assert "sslfast completion needs the package shtab; pip install 'sslfast[completion]'" in line
    assert cli.main(["completion", "powershell"]) == 2
    assert "must be one of bash, zsh, fish" in capsys.readouterr().err
