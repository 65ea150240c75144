"""``sslfast completion bash|zsh|fish``: a script that completes commands, options, choices, recipes and files.

Options are read from the help of every command: the script is complete for the version that writes it, and completing
starts no Python. ``python -m sslfast.cli.completion FILE`` writes ``known_options.txt`` of :mod:`sslfast.cli.early`,
and ``known_help.txt`` beside it.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import tyro

from sslfast.cli.options import SHORT_OPTIONS
from sslfast.cli.usage import parse
from sslfast.recipes import RECIPES, find_recipe

_COLUMNS = "110"  # one box beside no other, no option broken into lines
_OPTION = re.compile(r"^│ (-{1,2}[A-Za-z].*?)(?: {2,}|│|$)")
_DEFAULT = re.compile(r" \(default: .*\)$")


@dataclass(kw_only=True)
class Completion:
    """Print a script that completes what you type after sslfast: commands, options, choices, recipes, files.

    bash: sslfast completion bash > ~/.local/share/bash-completion/completions/sslfast

    zsh: sslfast completion zsh > a folder of $fpath/_sslfast

    fish: sslfast completion fish > ~/.config/fish/completions/sslfast.fish"""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell that reads the script."""


Run = Callable[[Sequence[str]], int]


def completion(arguments: list[str]) -> int:
    """Run ``sslfast completion``; returns the exit code."""
    chosen = parse(Completion, arguments, prog="sslfast completion")
    if isinstance(chosen, int):
        return chosen
    try:
        import shtab
    except ImportError:
        raise ImportError("sslfast completion needs the package shtab; pip install 'sslfast[completion]'") from None
    from sslfast.cli.main import COMMANDS, main

    parser = build_parser(COMMANDS, main, file=shtab.FILE)
    print(shtab.complete(parser, shell=chosen.shell))
    return 0


def build_parser(commands: Mapping[str, Any], run: Run, *, file: Any = None) -> argparse.ArgumentParser:
    """The whole command line as argparse has it.

    Args:
        commands: the table of commands.
        run: runs one, here with ``--help``.
        file: the mark of an argument that is a file.
    """
    parser = argparse.ArgumentParser(prog="sslfast", description="Self-supervised pretraining of image encoders.")
    parser.add_argument("--version", action="store_true", help="version of sslfast")
    _add(parser, commands, run, [], file)
    return parser


def _add(parser: argparse.ArgumentParser, commands: Mapping[str, Any], run: Run, before: list[str], file: Any) -> None:
    branches = parser.add_subparsers()
    for name, command in commands.items():
        words = [*before, name]
        branch = branches.add_parser(name, help=_plain(command.help), description=_plain(command.help))
        branch.add_argument("--plugin", metavar="MODULE", help="import a module first")
        if command.commands:
            _add(branch, command.commands, run, words, file)
            continue
        known: dict[str, argparse.Action] = {}
        for names, value, help_text in [*_options(_help([*words, "--help"], run)), *_of_recipes(words)]:
            new = [option for option in names if option not in known and option not in ("-h", "--help")]
            if new:
                known |= dict.fromkeys(new, _add_option(branch, new, value, help_text, file))
        positional = branch.add_argument("files", nargs="*", help="files and folders")
        positional.complete = file  # type: ignore[attr-defined]


def _of_recipes(words: list[str]) -> Iterator[tuple[list[str], str, str]]:
    """Options that the help shows for some recipes or trunks alone: fields of their configurations."""
    if words[0] not in ("pretrain", "preview"):
        return
    yield ["--model.factory"], "MODULE:FUNCTION", "a trunk of your own"
    yield ["--model.options"], "NAME VALUE", "its options"
    for name in RECIPES:
        yield from _of_fields(find_recipe(name).method, "method")


def known_options() -> str:
    """The text of ``known_options.txt``; see :mod:`sslfast.cli.early`."""
    from sslfast.cli.main import COMMANDS, main

    lines = [f"{' '.join(words)}: {' '.join(sorted(options))}" for words, options in _of_commands(COMMANDS, main, [])]
    groups: dict[str, list[str]] = {}
    for name in RECIPES:
        recipe = find_recipe(name)
        fields = (*_of_fields(recipe.method, "method"), *_of_fields(recipe.model, "model"))
        options = sorted({option for options, _, _ in fields for option in options})
        groups.setdefault(" ".join(options), []).append(name)
    return "\n".join([*lines, *(f"recipe {' '.join(names)}: {options}" for options, names in groups.items())]) + "\n"


def known_help() -> str:
    """The text of ``known_help.txt``: of each command the help as :func:`sslfast.cli.helptext.flat` makes it."""
    from sslfast.cli.main import COMMANDS, main

    texts = []
    with mock.patch("sslfast.cli.usage.render", lambda text, _screen: text):
        for words in _names(COMMANDS, []):
            texts.append(f"= {' '.join(words)}\n{_help([*words, '--help'], main)}")
    return "\n".join(texts)


def _names(commands: Mapping[str, Any], before: list[str]) -> Iterator[list[str]]:
    for name, command in commands.items():
        words = [*before, name]
        yield from _names(command.commands, words) if command.commands else [words]


def _of_commands(commands: Mapping[str, Any], run: Run, before: list[str]) -> Iterator[tuple[list[str], set[str]]]:
    for name, command in commands.items():
        words = [*before, name]
        if command.commands:
            yield from _of_commands(command.commands, run, words)
        elif before != ["launch"]:  # behind -- stand another command's
            found = {option for options, _, _ in _options(_help([*words, "--help"], run)) for option in options}
            if words[0] in ("pretrain", "preview"):
                found |= {*SHORT_OPTIONS, "--log"}
            yield words, {name for name in found if re.match(r"--(?!method\.|model\.)", name)}


def _of_fields(config: Any, prefix: str) -> Iterator[tuple[list[str], str, str]]:
    for name, hint in typing.get_type_hints(type(config)).items():
        if name not in getattr(config, "__dataclass_fields__", {}):
            continue
        option, value = f"--{prefix}.{name}".replace("_", "-"), getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _of_fields(value, f"{prefix}.{name}")
        elif isinstance(value, bool):
            yield [option, f"--{prefix}.no-{name}".replace("_", "-")], "", ""
        else:
            is_choice = typing.get_origin(hint) is Literal
            yield [option], "{" + ",".join(map(str, typing.get_args(hint))) + "}" if is_choice else "VALUE", ""


def _help(arguments: list[str], run: Run) -> str:
    text = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _COLUMNS
    try:
        with contextlib.redirect_stdout(text):
            run(arguments)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    text.seek(0)
    return text.read()


def _options(text: str) -> Iterator[tuple[list[str], str, str]]:
    """Names, form of the value and help of every option in a help text."""
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        found = _OPTION.match(line)
        if found is None:
            continue
        names, value = [], ""
        for part in found[1].split(", "):
            name, _, value = part.partition(" ")
            names.append(name)
        inline = line[found.end(1) :].strip("│ ")
        yield names, value, _DEFAULT.sub("", inline or following.strip("│ "))


def _add_option(
    parser: argparse.ArgumentParser, names: list[str], value: str, help_text: str, file: Any
) -> argparse.Action:
    text = _plain(help_text)
    if not value:
        return parser.add_argument(*names, action="store_true", help=text)
    choices = list(RECIPES) if names[-1] == "--recipe" else _choices(value)
    action = parser.add_argument(*names, choices=choices, metavar=None if choices else _plain(value), help=text)
    if not choices and re.search(r"PATH|FILE|RUN|DIR", value):
        action.complete = file  # type: ignore[attr-defined]
    return action


def _choices(value: str) -> list[str] | None:
    found = re.search(r"\{([^}]*)\}", value)
    choices = [] if found is None else [choice for choice in found[1].split(",") if choice != "None"]
    return choices or None


def _plain(text: str) -> str:
    """Without what argparse or a shell would read as more than text."""
    return re.sub(r"[`'\"$%\\{}\[\]]", "", text)[:90]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(known_options(), encoding="utf-8")
    Path(sys.argv[1]).with_name("known_help.txt").write_text(known_help(), encoding="utf-8")
