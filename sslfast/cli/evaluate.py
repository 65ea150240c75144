"""Commands that call one function: its parameters and the fields of its configuration are the command's options."""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro

from sslfast.cli.helptext import paragraphs
from sslfast.cli.usage import parse
from sslfast.data import check_apart
from sslfast.distributed import process_group
from sslfast.evaluation import ResultNotWritten, evaluation_folder
from sslfast.files import OUTPUT, check_writable


def run_function(target: str, arguments: list[str], prog: str) -> int:
    """Call a function with what the arguments say and print its result on the first rank; returns the exit code.

    The result is printed by ``render_table`` of the function's module, where there is one, else as ``str``; also one
    whose file cannot be written, before that error is raised.

    Args:
        target: ``package.module:function``. Parameters without a default are positional arguments of the command, a
            parameter that is a dataclass contributes its fields as options, others are options. A parameter that is a
            callable keeps its default.
        arguments: of the command.
        prog: the command, for its help.
    """
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    render = getattr(module, "render_table", str)
    try:
        function = getattr(module, name)
        command = as_command(function)
        call = parse(command, arguments, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
        if isinstance(call, int):
            return call
        if isinstance(path := call.keywords.get("output"), Path) and call.keywords.get("format") != "hub":
            is_option = inspect.signature(function).parameters["output"].default is not inspect.Parameter.empty
            remedy = OUTPUT if is_option else "name another file as OUT"
            check_writable(path, remedy=remedy)
            check_apart([path], _read(call, "output"), remedy=remedy)
        if "run" in call.keywords and call.keywords.get("output", call) is None:  # beside the run
            check_writable(evaluation_folder(call.keywords["run"]) / f"{prog.split()[-1]}.json", remedy=OUTPUT)
        result = call()
    except ResultNotWritten as error:
        print(render(error.result), flush=True)  # hours of work, maybe
        raise
    if process_group().is_main:
        print(render(result))
    return 0


def _read(call: functools.partial[Any], written: str) -> list[Path]:
    """Every path that a call reads: its arguments and the fields of its configuration."""
    found = [*call.args, *(value for name, value in call.keywords.items() if name != written)]
    found += [value for config in found if dataclasses.is_dataclass(config) for value in vars(config).values()]
    found += [value for several in found if isinstance(several, tuple) for value in several]
    return [value for value in found if isinstance(value, Path)]


def as_command(function: Callable[..., Any]) -> Callable[..., functools.partial[Any]]:
    """A function with annotations for tyro that returns the call, to be made."""
    parameters = []
    described = docstring_parser.parse(function.__doc__ or "").params
    words = {found.arg_name: paragraphs(found.description or "") for found in described}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if callable(parameter.default) and parameter.default is not parameter.empty:
            continue
        if dataclasses.is_dataclass(parameter.annotation):
            option = tyro.conf.arg(name="")
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            option = tyro.conf.arg(metavar=name.upper(), help=words.get(name))  # in the help, RUN and not PATH
        elif name == "output":
            option = tyro.conf.arg(aliases=["-o"], help=words.get(name))
        else:
            option = tyro.conf.arg(help=words.get(name))
        parameters.append(parameter.replace(annotation=Annotated[parameter.annotation, option]))
    command = functools.wraps(function)(lambda *values, **options: functools.partial(function, *values, **options))
    del command.__wrapped__  # tyro would read the annotations of that one
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
