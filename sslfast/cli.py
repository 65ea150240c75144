"""The command ``sslfast``. This file imports nothing heavy: each command imports what it needs when it runs."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from sslfast.trainer import TrainConfig

T = TypeVar("T")

EXIT_CODES = """\
exit codes:
  0    done
  1    unexpected failure (with a traceback)
  2    wrong usage, configuration or data: one line with the remedy (SSLFAST_TRACEBACK=1 shows where)
  3    the loss became infinite or not a number
  75   stopped by SIGTERM or SIGINT with a checkpoint saved: the same command goes on from there
  130  stopped at once by a second SIGINT (Ctrl-C)"""

SHORT_OPTIONS = {
    "--workers": "--loader.workers",
    "--on-bad-image": "--loader.on-bad-image",
    "--lr-per-256-images": "--optim.lr-per-256-images",
}
"""Options of nested configurations that are also known by a short name."""


class Command(NamedTuple):
    usage: str
    words: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (:data:`EXIT_CODES`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        from sslfast import __version__

        print(f"sslfast {__version__}")
        return 0
    try:
        return _find(COMMANDS, arguments[0], "command").run(arguments[1:])
    except KeyboardInterrupt:
        print("sslfast: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SSLFAST_TRACEBACK"):
            raise
        print(f"sslfast: error: {_one_line(error)}", file=sys.stderr)
        return 2


def pretrain(arguments: list[str]) -> int:
    """``sslfast pretrain DATA --recipe NAME``."""
    import tyro

    config_class, recipe = _recipe(arguments, "pretrain")

    @dataclasses.dataclass(kw_only=True)
    class Pretrain:
        data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
        """Folder of images (class folders or flat, any nesting), or synthetic:N for N made-up images."""
        output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="RUN")] = None
        """Run directory; default runs/RECIPE-FOLDER."""
        resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
        """auto: go on from the newest good checkpoint in RUN if there is one. never: refuse a RUN that holds a run.
        PATH: a checkpoint or another run directory."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Check everything, say what would run, and stop."""
        config: Annotated[config_class, tyro.conf.arg(name="")]  # type: ignore[valid-type]

    default = Pretrain(data=tyro.MISSING, config=recipe)
    chosen = _parse(Pretrain, arguments, default=default, prog="sslfast pretrain")
    if not isinstance(chosen, Pretrain):
        return chosen

    from sslfast.interrupt import EXIT_INTERRUPTED, RunInterruptedError
    from sslfast.summary import summary
    from sslfast.trainer import NonFiniteLossError, Trainer

    config: TrainConfig = chosen.config
    source = _data(chosen.data)
    folder = "synthetic" if isinstance(source, int) else source.resolve().name
    output = chosen.output or Path("runs") / f"{config.recipe}-{folder}"
    trainer = Trainer(config, source, output, resume=chosen.resume)
    _print_table(summary(trainer))
    if chosen.dry_run:
        return 0
    try:
        result = trainer.fit()
    except RunInterruptedError as stop:
        print(f"sslfast: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except NonFiniteLossError as error:
        print(f"sslfast: error: {error}", file=sys.stderr)
        return 3
    _print_table(
        [
            ("steps done", f"{result.step:,} in {result.seconds:.1f} s, {result.samples_per_second:.1f} samples/s"),
            ("waiting", f"{result.loader_wait_share:.1%} of the time for data"),
            ("loss", f"{result.metrics.get('loss', float('nan')):.4f}"),
            ("checkpoint", str(result.checkpoint)),
        ]
    )
    if result.bad_images:
        print(f"{result.bad_images} images could not be used:")
        print((output / "bad_images.txt").read_text(encoding="utf-8", errors="surrogateescape"), end="")
    return 0


def preview(arguments: list[str]) -> int:
    """``sslfast preview DATA --recipe NAME -o FILE``."""
    import tyro

    config_class, recipe = _recipe(arguments, "preview")

    @dataclasses.dataclass(kw_only=True)
    class Preview:
        data: tyro.conf.Positional[Path]
        """Folder of images."""
        output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("preview.png")
        """Picture to write."""
        count: int = 4
        """Images on the sheet."""
        config: Annotated[config_class, tyro.conf.arg(name="")]  # type: ignore[valid-type]

    default = Preview(data=tyro.MISSING, config=recipe)
    chosen = _parse(Preview, arguments, default=default, prog="sslfast preview")
    if not isinstance(chosen, Preview):
        return chosen

    from sslfast.figures.preview import write_preview

    views = chosen.config.method.views()
    write_preview(chosen.data, views, chosen.output, count=chosen.count, seed=chosen.config.seed)
    print(chosen.output)
    return 0


def evaluate(arguments: list[str]) -> int:
    """``sslfast evaluate knn|linear RUN DATA``."""
    return _group("evaluate", EVALUATIONS, arguments)


def data(arguments: list[str]) -> int:
    """``sslfast data check DIR``."""
    return _group("data", DATA_COMMANDS, arguments)


def bench(arguments: list[str]) -> int:
    """``sslfast bench ops``."""
    return _group("bench", BENCHMARKS, arguments)


def info(arguments: list[str]) -> int:
    """``sslfast info``."""
    from sslfast.info import main as run

    return run(arguments) or 0


def demo(arguments: list[str]) -> int:
    """``sslfast demo``."""
    from sslfast.demo import main as run

    return run(arguments) or 0


def _evaluate_knn(arguments: list[str]) -> int:
    from sslfast.evaluation.knn import evaluate_knn

    return _evaluate(evaluate_knn, arguments, "sslfast evaluate knn")


def _evaluate_linear(arguments: list[str]) -> int:
    from sslfast.evaluation.linear import evaluate_linear

    return _evaluate(evaluate_linear, arguments, "sslfast evaluate linear")


def _evaluate(function: Callable[..., dict[str, Any]], arguments: list[str], prog: str) -> int:
    import tyro

    result = _parse(function, arguments, prog=prog, config=(tyro.conf.PositionalRequiredArgs,))
    if isinstance(result, int):
        return result
    print(json.dumps(result, indent=2, default=str))
    return 0


def _data_check(arguments: list[str]) -> int:
    from sslfast.manifest import Manifest

    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(
            "usage: sslfast data check DIR\n\nRead every image once; list those that cannot be used, with the reason."
        )
        return 0 if arguments in (["-h"], ["--help"]) else 2
    manifest = Manifest.scan(Path(arguments[0]), on_bad_image="skip")
    print(f"{len(manifest)} images, {len(manifest.classes)} classes")
    return 0


def _bench_ops(arguments: list[str]) -> int:
    from sslfast.bench import main as run

    return run(["ops", *arguments]) or 0


EVALUATIONS = {
    "knn": Command("knn RUN DATA", "weighted k-nearest-neighbour accuracy", _evaluate_knn),
    "linear": Command("linear RUN DATA", "linear classifier on frozen features", _evaluate_linear),
}
DATA_COMMANDS = {"check": Command("check DIR", "find the images that cannot be used", _data_check)}
BENCHMARKS = {"ops": Command("ops", "samples/s and memory of every op, beside plain torch", _bench_ops)}
COMMANDS = {
    "pretrain": Command("pretrain DATA --recipe NAME", "pretrain an encoder without labels", pretrain),
    "evaluate": Command("evaluate knn|linear RUN DATA", "accuracy of a pretrained encoder beside baselines", evaluate),
    "preview": Command("preview DATA --recipe NAME -o FILE", "picture sheet of what the network sees", preview),
    "data": Command("data check DIR", "find the images that cannot be used", data),
    "info": Command("info", "versions, devices, what is usable here and why not", info),
    "demo": Command("demo", "pretrain and evaluate on real photographs in minutes", demo),
    "bench": Command("bench ops", "measure the ops on this machine", bench),
}


def _help() -> str:
    return (
        "usage: sslfast COMMAND ...\n\nSelf-supervised pretraining of image encoders.\n\ncommands:\n"
        + _command_lines(COMMANDS)
        + "\n\noptions:\n  -h, --help  this text; after a command: its options\n  --version   version of sslfast\n\n"
        + EXIT_CODES
    )


def _command_lines(commands: dict[str, Command]) -> str:
    width = max(len(command.usage) for command in commands.values())
    return "\n".join(f"  {command.usage:<{width}}  {command.words}" for command in commands.values())


def _data(text: str) -> Path | int:
    """A folder, or the N of ``synthetic:N``."""
    kind, colon, number = text.partition(":")
    if kind != "synthetic" or not colon:
        return Path(text)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"DATA synthetic:N needs a number of images of at least 1, got {text!r}")
    return int(number)


def _find(commands: dict[str, T], name: str, kind: str) -> T:
    if name not in commands:
        from sslfast.config import nearest

        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, commands)}")
    return commands[name]


def _group(name: str, commands: dict[str, Command], arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: sslfast {name} {'|'.join(commands)} ...\n\n{_command_lines(commands)}")
        return 0 if arguments else 2
    return _find(commands, arguments[0], f"{name} command").run(arguments[1:])


def _recipe(arguments: list[str], command: str) -> tuple[type, Any]:
    """The configuration class and values of the recipe that ``--recipe`` names; for ``--help`` the first one."""
    from sslfast.recipes import RECIPES

    name: str | None = None
    for position, argument in enumerate(arguments):
        if argument == "--recipe" and position + 1 < len(arguments):
            name = arguments[position + 1]
        elif argument.startswith("--recipe="):
            name = argument.removeprefix("--recipe=")
    if name is None:
        if not {"-h", "--help"} & set(arguments):
            raise ValueError(f"--recipe is missing; sslfast {command} DATA --recipe {'|'.join(RECIPES)}")
        name = next(iter(RECIPES))
    config = _find(RECIPES, name, "recipe")()
    config.recipe = name
    return type(config), config


def _recipe_lines() -> str:
    from sslfast.recipes import RECIPES

    lines = [f"  {name}: {(make.__doc__ or '').strip().partition(chr(10))[0]}" for name, make in RECIPES.items()]
    return "recipes (--recipe NAME sets the defaults of all options):\n" + "\n".join(lines)


def _parse(target: Callable[..., T], arguments: list[str], *, prog: str, **options: Any) -> T | int:
    """What tyro makes of the arguments, or the exit code after it has printed help or an error."""
    import tyro

    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(SHORT_OPTIONS.get(name, name) + equals + value)
    if "default" in options:
        options["description"] = f"{_recipe_lines()}\n\n{EXIT_CODES}"
    try:
        return tyro.cli(target, args=expanded, prog=prog, **options)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", flush=True)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "sslfast":
        text += "; pip install 'sslfast[train]'"
    return text
