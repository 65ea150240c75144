"""Parsing and printing that the commands share: tyro, and recipes as the source of default values."""

import os
import sys
from dataclasses import make_dataclass
from typing import Annotated, TypeVar

import tyro

from sslfast.cli.exit_codes import EXIT_CODES
from sslfast.cli.usage import parse
from sslfast.models import CustomTrunkConfig, choose_trunk
from sslfast.plugins import load_plugins
from sslfast.recipes import RECIPES, find_recipe, load_settings
from sslfast.training import LOGGERS, TrainConfig

T = TypeVar("T")

SHORT_OPTIONS = {
    "--workers": "--loader.workers",
    "--on-bad-image": "--loader.on-bad-image",
}
"""Options of nested configurations of ``pretrain`` and ``preview`` that also have a short name."""


def parse_recipe(target: type[T], arguments: list[str], *, command: str) -> T | int:
    """Parse a dataclass with a field ``config: TrainConfig`` whose defaults are those of the recipe in ``--recipe`` or
    of the file in ``--config``.

    Args:
        target: dataclass with the fields ``data`` and ``config`` and whatever else the command needs.
        arguments: of the command.
        command: its name.

    Returns:
        As :func:`parse`.

    Raises:
        ValueError: no recipe is named, or it does not exist; the file has a mistake.
    """
    recipe = _base(arguments, command)
    wanted = {name: _value(arguments, f"--model.{name}") for name in ("name", "factory")}
    recipe.model = choose_trunk(recipe.model, wanted)  # a trunk that is no ResNet has other options
    if isinstance(recipe.model, CustomTrunkConfig):
        arguments = _without(arguments, "--model.name")  # that of a registered network: its factory says all
    # The recipe has chosen the method: the method's fields are plain options, not a subcommand per method.
    words = "Recipe, one of those listed above: the default of every other option."
    name = Annotated[str, tyro.conf.arg(metavar="NAME", help=words)]
    chosen = [("recipe", name), ("method", type(recipe.method)), ("model", type(recipe.model))]
    train_config = make_dataclass("TrainConfig", chosen, bases=(TrainConfig,), kw_only=True)
    config = Annotated[train_config, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    target = make_dataclass(target.__name__, [("config", config)], bases=(target,), kw_only=True)
    data = () if "--print-config" in arguments else tyro.MISSING
    default = target(data=data, config=train_config(**vars(recipe)))  # type: ignore[call-arg]
    # Likewise an optional part of the configuration (a view's jigsaw) is present or absent as the recipe has it.
    is_help = bool({"-h", "--help"} & set(arguments))
    options = {
        "default": default,
        "description": _description() if is_help else None,
        "config": (tyro.conf.AvoidSubcommands,),
    }
    expanded = expand(arguments, recipe.loggers)
    return parse(target, expanded, prog=f"sslfast {command}", **options)


def expand(arguments: list[str], loggers: tuple[str, ...]) -> list[str]:
    """The arguments with short options written out; ``--log NAME``, given any number of times, adds to ``loggers``.

    Raises:
        ValueError: ``--log`` without a name, or beside ``--loggers``.
    """
    expanded, logs = list[str](), list[str]()
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, value = argument.partition("=")
        if option == "--log":
            name = value if equals else next(remaining, "")
            if not name or name.startswith("-"):
                raise ValueError(f"--log needs the name of a log: {', '.join(LOGGERS)}, or module:factory")
            logs.append(name)
        else:
            expanded.append(SHORT_OPTIONS.get(option, option) + equals + value)
    if logs:
        if any(argument.partition("=")[0] == "--loggers" for argument in expanded):
            raise ValueError("--log and --loggers are the same; give one of them")
        expanded += ["--loggers", *dict.fromkeys([*loggers, *logs])]
    return expanded


def report(line: str) -> None:
    """Print one line for the user on standard error."""
    print(f"sslfast: {line}", file=sys.stderr, flush=True)


def _base(arguments: list[str], command: str) -> TrainConfig:
    """The recipe that ``--recipe`` names, or the file of ``--config``; for ``--help`` with neither the first recipe."""
    name, file = _value(arguments, "--recipe"), _value(arguments, "--config")
    is_help = bool({"-h", "--help"} & set(arguments))
    if file is not None and not (is_help and not os.path.lexists(file)):
        return load_settings(file, name)
    if name is None:
        load_plugins()  # all names are listed
        if not is_help:
            known = "|".join(RECIPES)
            raise ValueError(f"--recipe is missing; sslfast {command} DATA --recipe {known}, or --config FILE")
        name = next(iter(RECIPES))
    return find_recipe(name)


def _value(arguments: list[str], option: str) -> str | None:
    """The value of an option that decides which other options exist; the last one given, or None."""
    value: str | None = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    words = iter(arguments)
    rest = []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            rest.append(word)
    return rest


def _description() -> str:
    load_plugins()
    lines = []
    for name, make in RECIPES.items():
        paragraph = " ".join((make.__doc__ or "").strip().partition("\n\n")[0].split())
        lines.append(f"  {name}: {paragraph}")
    return (
        "--recipe NAME, or --config FILE, sets the default of every option below:\n"
        + "\n".join(lines)
        + f"\n\n{EXIT_CODES}"
    )


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", flush=True)
