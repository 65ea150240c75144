"""``sslfast demo``: PIRL end to end on real photographs, in minutes on a CPU.

Writes the data set, pretrains, evaluates beside two baselines, draws two pictures. Finished parts are kept, so an
interrupted demo resumes when the command is run again.
"""

import io
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from sslfast.cli.exit_codes import EXIT_INTERRUPTED, EXIT_NOT_FINITE
from sslfast.cli.usage import parse
from sslfast.config import save_json
from sslfast.data import PHOTOGRAPHS, make_demo_data
from sslfast.evaluation import (
    PROBE_PROTOCOL,
    RAW_PIXELS,
    TRAINED,
    UNTRAINED,
    EvaluationSet,
    FeatureConfig,
    KnnConfig,
    knn_result,
    linear_result,
    load_evaluation_set,
)
from sslfast.files import writing
from sslfast.recipes import RECIPES
from sslfast.report import ReportConfig, report, write_neighbours, write_preview
from sslfast.training import NonFiniteLossError, RunInterruptedError, Trainer

K = (1, 5, 20)
ENCODERS = {RAW_PIXELS: "raw pixels", UNTRAINED: "untrained", TRAINED: "PIRL"}


@dataclass(kw_only=True)
class Demo:
    """Pretrain PIRL on crops of 18 photographs, then classify held-out crops by photograph."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs/demo")
    """Folder for data, runs and pictures."""
    seed: int = 0
    """Seed of the run; each seed has its own run directory."""
    epochs: int | None = None
    """Passes over the data; default: the recipe's."""
    train_per_photo: int = 30
    """Training crops per photograph."""
    val_per_photo: int = 60
    """Validation crops per photograph."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def demo(arguments: list[str]) -> int:
    """Run ``sslfast demo``; returns the exit code."""
    options = parse(Demo, arguments, prog="sslfast demo")
    if isinstance(options, int):
        return options
    try:
        print(run_demo(options), flush=True)
    except RunInterruptedError as stop:
        _say(str(stop))
        return EXIT_INTERRUPTED
    except NonFiniteLossError as error:
        _say(f"error: {error}")
        return EXIT_NOT_FINITE
    return 0


def run_demo(options: Demo) -> str:
    """Run all parts; returns the text to print. Raises as :class:`sslfast.training.Trainer` does."""
    started = time.perf_counter()
    output, run = options.output, options.output / f"seed{options.seed}"
    counts = {"train_per_photo": options.train_per_photo, "val_per_photo": options.val_per_photo}
    with writing(output / "data", remedy="choose another folder with --output"):
        data = make_demo_data(output / "data", **counts)
    config = replace(RECIPES["demo"](), seed=options.seed, device=options.device, knn_every_epochs=1)
    if options.epochs is not None:
        config = replace(config, epochs=options.epochs)
    views = config.method.views()
    preview = output / "preview.png"
    write_preview(data / "train", views, preview, count=6, seed=options.seed)
    _say(f"{len(PHOTOGRAPHS)} photographs, {options.train_per_photo} training crops of each, in {data}")
    trainer = Trainer(config, data / "train", run, report=_say)
    _say(f"PIRL, {config.model.name}, {config.epochs} epochs, {trainer.total_steps} steps of {config.batch_size}")
    trainer.fit()
    trained = time.perf_counter()
    evaluation = load_evaluation_set(run, data, FeatureConfig(device=options.device))
    knn = knn_result(evaluation, KnnConfig(k=K, device=options.device), output=run / "evaluation" / "knn.json")
    linear = linear_result(evaluation, device=options.device, output=run / "evaluation" / "linear.json")
    neighbours = write_neighbours(
        evaluation,
        output / "neighbours.png",
        encoders=list(ENCODERS)[::2],
        queries=len(PHOTOGRAPHS),
        title=f"crops of the right halves and their 6 most similar crops of the left halves, seed {options.seed}",
    )
    done = time.perf_counter()
    facts = {"seconds": {"pretraining": round(trained - started, 1), "evaluation": round(done - trained, 1)}}
    save_json(run / "evaluation" / "demo.json", {"knn": knn["results"], "linear": linear["results"], **facts})
    page = report((run,), ReportConfig(device=options.device), output=output / "report.html", data=data)
    lines = [
        _table(evaluation, knn, linear),
        "",
        f"  augmented views               {preview}",
        f"  nearest neighbours            {neighbours}",
        f"  curves, confusion, map        {page}",
        f"  numbers, weights, logs        {run}",
        f"  seconds                       {trained - started:.0f} pretraining, {done - trained:.0f} evaluation",
    ]
    return "\n".join(lines)


def _table(evaluation: EvaluationSet, knn: dict[str, Any], linear: dict[str, Any]) -> str:
    cells = {(row["encoder"], row["protocol"]): row for row in (*knn["results"], *linear["results"])}
    columns = {**{f"{knn['protocol']}-k{k}": f"kNN, k = {k}" for k in K}, PROBE_PROTOCOL: "linear probe"}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("top-1 accuracy, %")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for encoder, label in ENCODERS.items():
        rows = [cells[encoder, protocol] for protocol in columns]
        table.add_row(label, *(f"{100 * row['top1']:.1f} ± {100 * row['top1_standard_error']:.1f}" for row in rows))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    classes = len(evaluation.classes)
    title = (
        f"Which photograph is this crop of? {classes} photographs, chance {100 / classes:.1f} %, "
        f"{len(evaluation.val_labels):,} crops of halves never seen"
    )
    return f"{title}\n{text.getvalue().rstrip()}"


def _say(line: str) -> None:
    print(f"sslfast demo: {line}", file=sys.stderr, flush=True)
