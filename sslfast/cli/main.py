"""The command ``sslfast``. This file imports nothing heavy: each command imports what it needs when it runs."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sslfast.cli.exit_codes import EXIT_CODES


class Command(NamedTuple):
    usage: str
    words: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (:data:`sslfast.cli.exit_codes.EXIT_CODES`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sslfast import __version__

        print(f"sslfast {__version__}")
        return 0
    try:
        return _find(COMMANDS, arguments[0], "command").run(arguments[1:])
    except KeyboardInterrupt:
        print("sslfast: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (| head); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SSLFAST_TRACEBACK"):
            raise
        print(f"sslfast: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _pretrain(arguments: list[str]) -> int:
    from sslfast.cli.commands import pretrain

    return pretrain(arguments)


def _preview(arguments: list[str]) -> int:
    from sslfast.cli.commands import preview

    return preview(arguments)


def _info(arguments: list[str]) -> int:
    from sslfast.cli.info import main as run

    return run(arguments)


def _demo(arguments: list[str]) -> int:
    from sslfast.cli.demo import main as run

    return run(arguments)


def _evaluate_knn(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.evaluation.knn:evaluate_knn", arguments, "sslfast evaluate knn")


def _evaluate_linear(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.evaluation.linear:evaluate_linear", arguments, "sslfast evaluate linear")


def _evaluate_lowshot(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.evaluation.svm:evaluate_svm", arguments, "sslfast evaluate lowshot")


def _evaluate_semisup(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.evaluation.semisup:evaluate_semisup", arguments, "sslfast evaluate semisup")


def _evaluate_detect(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function(
        "sslfast.evaluation.detection.evaluate:evaluate_detection", arguments, "sslfast evaluate detect"
    )


def _report(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.report.build:report", arguments, "sslfast report")


def _export(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.weights.export:export_trunk", arguments, "sslfast export")


def _neighbours(arguments: list[str]) -> int:
    from sslfast.cli.evaluate import run_function

    return run_function("sslfast.report.neighbours:run_neighbours", arguments, "sslfast neighbours")


def _data_verify(arguments: list[str]) -> int:
    from sslfast.cli.commands import verify

    return verify(arguments)


def _data_prepare(arguments: list[str]) -> int:
    from sslfast.cli.commands import prepare

    return prepare(arguments)


def _bench_ops(arguments: list[str]) -> int:
    from sslfast.bench.ops import main as run

    return run(["ops", *arguments])


def _bench_loader(arguments: list[str]) -> int:
    from sslfast.bench.loader import main as run

    return run(arguments)


def _bench_step(arguments: list[str]) -> int:
    from sslfast.bench.step import main as run

    return run(arguments)


EVALUATIONS = {
    "knn": Command("knn RUN DATA", "weighted k-nearest-neighbour accuracy", _evaluate_knn),
    "linear": Command("linear RUN DATA", "linear classifiers on frozen features: probe, goyal, moco", _evaluate_linear),
    "lowshot": Command("lowshot RUN VOC", "linear SVMs on Pascal VOC, all and few images", _evaluate_lowshot),
    "semisup": Command("semisup RUN DATA", "fine-tuning with 1 % or 10 % of the labels", _evaluate_semisup),
    "detect": Command("detect RUN VOC...", "Faster R-CNN R50-C4 on Pascal VOC or COCO-format data", _evaluate_detect),
}
DATA_COMMANDS = {
    "verify": Command("verify DIR", "decode every image once, list those that cannot be used", _data_verify),
    "prepare": Command("prepare DATA OUT.beton", "one file for the ffcv loader", _data_prepare),
}
BENCHMARKS = {
    "ops": Command("ops", "time and memory of every op beside plain torch", _bench_ops),
    "loader": Command("loader DATA", "samples/s of every usable loader on your images", _bench_loader),
    "step": Command("step [DATA]", "samples/s of a recipe, and where the time of a step goes", _bench_step),
}


def _group(name: str, commands: dict[str, Command]) -> Callable[[list[str]], int]:
    """A command whose first argument is a command of its own."""

    def run(arguments: list[str]) -> int:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: sslfast {name} {'|'.join(commands)} ...\n\n{_command_lines(commands)}")
            return 0 if arguments else 2
        return _find(commands, arguments[0], f"command of {name}").run(arguments[1:])

    return run


COMMANDS = {
    "pretrain": Command("pretrain DATA --recipe NAME", "pretrain an encoder without labels", _pretrain),
    "evaluate": Command(
        "evaluate knn|linear|lowshot|semisup|detect RUN DATA",
        "accuracy of a pretrained encoder beside baselines",
        _group("evaluate", EVALUATIONS),
    ),
    "preview": Command("preview DATA --recipe NAME -o FILE", "picture sheet of what the network sees", _preview),
    "neighbours": Command("neighbours RUN DATA", "picture sheet of images and their nearest neighbours", _neighbours),
    "report": Command("report RUN... -o FILE", "one HTML page about runs, with nothing to fetch", _report),
    "export": Command("export RUN OUT", "the trunk as a file of torchvision, timm, detectron2, ONNX, ...", _export),
    "data": Command("data verify|prepare ...", "check images, store them in one file", _group("data", DATA_COMMANDS)),
    "info": Command("info", "versions, devices, what is usable here and why not", _info),
    "demo": Command("demo", "pretrain and evaluate on real photographs in minutes", _demo),
    "bench": Command(
        "bench ops|loader|step ...",
        "measure ops, loaders and training steps on this machine",
        _group("bench", BENCHMARKS),
    ),
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


def _find(commands: dict[str, Command], name: str, kind: str) -> Command:
    if name not in commands:
        from sslfast.config import nearest

        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, commands)}")
    return commands[name]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "sslfast":
        text += "; pip install 'sslfast[train]'"
    return text
