"""The command ``sslfast``: the table of commands, and what happens when one fails.

Imports nothing heavy: the module of a command is imported when the command runs.
"""

import errno
import importlib
import os
import resource
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper

from sslfast.cli.early import check_options, check_path, show_help
from sslfast.cli.exit_codes import EXIT_CODES
from sslfast.files import what_helps
from sslfast.text import printable


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, or a group of commands such as ``evaluate``."""

    usage: str
    """Its name and positional arguments."""
    help: str
    """One line."""
    function: str = ""
    """``package.module:function``, imported when the command runs; takes the arguments, returns the exit code."""
    calls: str = ""
    """In place of ``function``: ``package.module:function`` whose parameters and configuration are the options; see
    :func:`sslfast.cli.evaluate.run_function`."""
    commands: Mapping[str, "Command"] = field(default_factory=dict)
    """Of a group: its commands."""
    data_at: int | None = None
    """Place of DATA among its arguments, where it must exist: looked at before the seconds that imports take."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (:data:`sslfast.cli.exit_codes.EXIT_CODES`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a file name may hold any bytes; no command fails for showing it
            stream.reconfigure(errors="backslashreplace")
    if arguments == ["--version"]:
        from sslfast import __version__

        print(f"sslfast {__version__}")
        return 0
    try:
        _check_empty(arguments)
        # The job that launch submits imports them.
        if arguments[:1] != ["launch"] and any(word.partition("=")[0] == "--plugin" for word in arguments):
            from sslfast.cli.plugins import import_plugins

            arguments = import_plugins(arguments)
        return _run(COMMANDS, arguments)
    except KeyboardInterrupt:
        print("sslfast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the output has closed the pipe (| head): discard the rest, an error would go to the pipe too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        is_ours = isinstance(error, ValueError | OSError | ImportError) or ran_out_of_memory(error)
        code: int | None = getattr(error, "exit_code", 2 if is_ours else None)
        if code is None or os.environ.get("SSLFAST_TRACEBACK"):
            raise
        print(f"sslfast: error: {_one_line(error)}", file=sys.stderr)
        return code


def _open_missing_streams() -> None:
    """Standard streams that the starting program closed (``2>&-``) are those of /dev/null: Python has None in their
    place, and the next file to be opened, perhaps a checkpoint, would get their number and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(opened, number)
        os.set_inheritable(opened, opened == number)
        setattr(sys, name, os.fdopen(opened, "w" if number else "r", encoding="utf-8"))


def _run(commands: Mapping[str, Command], arguments: list[str], group: str = "") -> int:
    """Run the command that the first argument names, with the others."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_group_help(group, commands) if group else _help())
        return 0 if arguments else 2
    name = arguments[0]
    if name not in commands:
        from sslfast.config import nearest

        kind = f"command of {group}" if group else "command"
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, commands)}")
    command = commands[name]
    if command.commands:
        return _run(command.commands, arguments[1:], name)
    words = [*([group] if group else []), name]
    if show_help(words, arguments[1:]):
        return 0
    _check_data(command, arguments[1:])
    check_options(words, arguments[1:])
    if command.calls:
        from sslfast.cli.evaluate import run_function

        return run_function(command.calls, arguments[1:], " ".join(["sslfast", *words]))
    module, _, function = command.function.partition(":")
    code: int = getattr(importlib.import_module(module), function)(arguments[1:])
    return code


def _check_empty(arguments: Sequence[str]) -> None:
    """ValueError for an argument without a value, which as a path would be the current directory."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            option = argument[:-1] or (before if before.startswith("-") else "an argument")
            raise ValueError(f"{option} is empty: give it a value (a variable of the shell that is not set?)")


def _check_data(command: Command, arguments: list[str]) -> None:
    """ValueError where DATA is missing; nothing where options stand before it, whose values could be taken for it."""
    at = command.data_at
    if at is None or len(arguments) <= at or any(word.startswith("-") for word in arguments[: at + 1]):
        return
    if not {"-h", "--help", "--print-config"} & set(arguments):
        check_path(arguments[at], "DATA")


LAUNCHERS = {
    "slurm": Command(
        usage="slurm ... -- DATA --recipe NAME",
        help="submit sslfast pretrain as a Slurm job that saves and requeues itself before its time limit",
        function="sslfast.cli.launch:slurm",
    ),
}
EVALUATIONS = {
    "knn": Command(
        usage="knn RUN DATA",
        data_at=1,
        help="weighted k-nearest-neighbour accuracy",
        calls="sslfast.evaluation.knn:evaluate_knn",
    ),
    "linear": Command(
        usage="linear RUN DATA",
        data_at=1,
        help="linear classifiers on frozen features: probe, goyal, moco",
        calls="sslfast.evaluation.linear:evaluate_linear",
    ),
    "lowshot": Command(
        usage="lowshot RUN VOC",
        data_at=1,
        help="linear SVMs on Pascal VOC, all and few images",
        calls="sslfast.evaluation.svm:evaluate_svm",
    ),
    "semisup": Command(
        usage="semisup RUN DATA",
        data_at=1,
        help="fine-tuning with 1 % or 10 % of the labels",
        calls="sslfast.evaluation.semisup:evaluate_semisup",
    ),
    "detect": Command(
        usage="detect RUN VOC...",
        help="Faster R-CNN R50-C4 on Pascal VOC or COCO-format data",
        calls="sslfast.evaluation.detection.evaluate:evaluate_detection",
    ),
}
DATA_COMMANDS = {
    "verify": Command(
        usage="verify DIR",
        data_at=0,
        help="decode every image once, list the unusable ones, write a manifest",
        function="sslfast.cli.data:verify",
    ),
    "prepare": Command(
        usage="prepare DATA OUT.beton",
        data_at=0,
        help="store the images in one file for the ffcv loader",
        function="sslfast.cli.data:prepare",
    ),
    "labels": Command(
        usage="labels DATA LABELS -o FILE",
        data_at=0,
        help="label the images of a flat folder or archive by a file (ImageNet's validation set)",
        function="sslfast.cli.data:labels",
    ),
}
BENCHMARKS = {
    "ops": Command(
        usage="ops", help="time and memory of every op beside plain torch", function="sslfast.cli.bench:ops"
    ),
    "loader": Command(
        usage="loader DATA",
        data_at=0,
        help="samples/s of every usable loader on your images",
        function="sslfast.cli.bench:loader",
    ),
    "step": Command(
        usage="step [DATA]",
        help="samples/s of a recipe, and where the time of a step goes",
        function="sslfast.cli.bench:step",
    ),
}
COMMANDS = {
    "pretrain": Command(
        usage="pretrain DATA --recipe NAME",
        data_at=0,
        help="pretrain an encoder without labels",
        function="sslfast.cli.pretrain:pretrain",
    ),
    "evaluate": Command(
        usage=f"evaluate {'|'.join(EVALUATIONS)} RUN DATA",
        help="accuracy of a pretrained encoder beside baselines",
        commands=EVALUATIONS,
    ),
    "preview": Command(
        usage="preview DATA --recipe NAME -o FILE",
        data_at=0,
        help="contact sheet of images, augmented views and the pretext task",
        function="sslfast.cli.pretrain:preview",
    ),
    "embed": Command(
        usage="embed RUN DATA -o FILE.npy|FILE.parquet",
        data_at=1,
        help="features of any images, with path and class",
        calls="sslfast.evaluation.embed:embed",
    ),
    "neighbours": Command(
        usage="neighbours RUN|FILE DATA",
        data_at=1,
        help="contact sheet of images and their nearest neighbours",
        calls="sslfast.report.neighbours:run_neighbours",
    ),
    "report": Command(
        usage="report RUN... -o FILE",
        help="one self-contained HTML page about one or more runs",
        calls="sslfast.report.build:report",
    ),
    "runs": Command(
        usage="runs [DIR]",
        help="table of the runs below a folder: state, settings that differ, best accuracies",
        function="sslfast.cli.runs:runs",
    ),
    "export": Command(
        usage="export RUN OUT",
        help="write the trunk for torchvision, timm, detectron2, ONNX, ...",
        calls="sslfast.weights.export:export_trunk",
    ),
    "data": Command(
        usage="data verify|prepare|labels ...", help="check images, pack them into one file", commands=DATA_COMMANDS
    ),
    "info": Command(
        usage="info", help="versions, devices, usable loaders, missing packages", function="sslfast.cli.info:info"
    ),
    "completion": Command(
        usage="completion bash|zsh|fish",
        help="print a script that completes commands, options and recipes in the shell",
        function="sslfast.cli.completion:completion",
    ),
    "demo": Command(
        usage="demo", help="pretrain and evaluate on real photographs in minutes", function="sslfast.cli.demo:demo"
    ),
    "launch": Command(
        usage="launch slurm ... -- DATA --recipe NAME", help="pretrain as a job of a cluster", commands=LAUNCHERS
    ),
    "bench": Command(
        usage="bench ops|loader|step ...",
        help="time ops, loaders and training steps on this machine",
        commands=BENCHMARKS,
    ),
}


_OPTIONS = (
    ("-h, --help", "this text; after a command: its options"),
    ("--version", "version of sslfast"),
    (
        "--plugin MODULE",
        "of every command: first import MODULE, installed or in the current directory, which may register methods and "
        "recipes; repeatable",
    ),
)


def _help() -> str:
    codes = [line.split(maxsplit=1) for line in EXIT_CODES.splitlines()[1:]]
    return f"""\
usage: sslfast COMMAND ...

Self-supervised pretraining of image encoders.

commands:
{_command_lines(COMMANDS)}

options:
{_columns(_OPTIONS)}

exit codes:
{_columns([(code, words) for code, words in codes])}"""


def _group_help(name: str, commands: Mapping[str, Command]) -> str:
    return f"usage: sslfast {name} {'|'.join(commands)} ...\n\n{_command_lines(commands)}"


def _command_lines(commands: Mapping[str, Command]) -> str:
    return _columns([(command.usage, command.help) for command in commands.values()])


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns in the width of the terminal; a first cell that would take half of it has a line of its own."""
    width = max(40, shutil.get_terminal_size().columns)
    first = max(len(cell) for cell, _ in rows if len(cell) <= width // 2)
    lines = []
    for cell, words in rows:
        text = textwrap.wrap(words, width - first - 4, break_on_hyphens=False)
        if len(cell) > first:
            lines.append(f"  {cell}")
            cell = ""
        lines += [f"  {cell if i == 0 else '':<{first}}  {line}" for i, line in enumerate(text)]
    return "\n".join(lines)


_REMEDIES = {
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.ENOENT: "correct the path",
}


_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "could not create a primitive",
    "failed to map segment",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system, torch or oneDNN got no memory; also where that kept a library from being loaded."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in _NO_MEMORY)


def _less_memory() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    raised = "" if limit == resource.RLIM_INFINITY else f", or raise the limit of {limit / 2**30:.1f} GiB (ulimit -v)"
    return f"use smaller batches (--batch-size), fewer processes (--workers) or smaller images{raised}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if ran_out_of_memory(error):
        return f"memory ran out ({printable(text)[-120:].lstrip()}): {_less_memory()}"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:  # one that nobody has explained
        remedy = _REMEDIES.get(error.errno) or what_helps(error.errno)
        if error.filename is None and "temporary directory" in error.strerror:  # tempfile's own words
            remedy = "set TMPDIR to a folder that can be written"
        text = f"{error.filename or 'a file'} cannot be used ({error.strerror}){remedy and '; '}{remedy}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "sslfast":
        text += "; pip install 'sslfast[train]'"
    return printable(text)
