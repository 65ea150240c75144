"""``sslfast bench ops``, ``loader`` and ``step``: options, tables, files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sslfast.bench import charts, timing
from sslfast.bench import loader as loaders
from sslfast.bench import ops as op_benchmarks
from sslfast.bench import step as steps
from sslfast.cli.usage import parse
from sslfast.config import save_json
from sslfast.data import parse_data
from sslfast.device import resolve_device
from sslfast.ops import build_info
from sslfast.recipes import find_recipe

_JSON = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(kw_only=True)
class Ops:
    """Time and peak memory of every op beside the plain torch form that it replaces, results compared first."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    rounds: int = 15
    """Timed calls of each implementation."""
    json: _JSON = None
    """Also write the numbers here."""


@dataclass(kw_only=True)
class Loader:
    """Samples/s of every usable loader on your images: decoding and cropping alone, and with the views rendered.

    Batches are those of training: a recipe's views in the order of an epoch. Loaders are timed one after the other,
    each for --seconds after a warm-up."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """What `sslfast pretrain` takes as DATA: a folder, shards, a list, a manifest, a .beton file, a URL, ..."""
    recipe: str = "pirl-paper"
    """Recipe whose views are rendered."""
    loader: tuple[str, ...] = ()
    """Loaders to time; default: all that read DATA."""
    workers: int | None = None
    """Loader workers; default: one per core."""
    batch_size: int = 32
    """Samples per batch."""
    seconds: float = 10.0
    """Time for each row of the table."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: _JSON = None
    """Also write the numbers here."""
    chart: _JSON = None
    """Also draw them (.png)."""


@dataclass(kw_only=True)
class Step:
    """Samples/s of a recipe, and where the time of a training step goes.

    The whole step is timed as training runs it; then its parts are timed alone on one batch, each with the device idle
    before and after, so parts that overlap in training add up to more than the step. A supervised step of the same
    trunk and a large matrix product, measured in the same run, put the numbers in proportion."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "synthetic:100000"
    """What `sslfast pretrain` takes as DATA; synthetic:N are N synthetic images."""
    recipe: str = "pirl-paper"
    """Recipe to time."""
    batch_size: int | None = None
    """Samples per step; default: the recipe's."""
    loader: str = "auto"
    """Loader; auto chooses one that reads DATA."""
    workers: int | None = None
    """Loader workers; default: one per core."""
    steps: int = 20
    """Timed steps."""
    rounds: int = 5
    """Timed calls of each part."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast; auto: where the device computes in it."""
    json: _JSON = None
    """Also write the numbers here."""
    chart: _JSON = None
    """Also draw the parts (.png)."""


def ops(arguments: list[str]) -> int:
    """Run ``sslfast bench ops``; returns the exit code."""
    chosen = parse(Ops, arguments, prog="sslfast bench ops")
    if isinstance(chosen, int):
        return chosen
    device = resolve_device(chosen.device)
    rows = [
        row
        for case in op_benchmarks.op_cases(device)
        for row in op_benchmarks.measure(case, device, rounds=chosen.rounds)
    ]
    facts = {"device": timing.device_name(device), **timing.versions()}
    print(f"{facts['device']}, torch {facts['torch']}, {build_info()['note']}")
    print(op_benchmarks.render(rows))
    _save(chosen.json, {**facts, "rows": rows})
    return 0


def loader(arguments: list[str]) -> int:
    """Run ``sslfast bench loader``; returns the exit code."""
    chosen = parse(Loader, arguments, prog="sslfast bench loader")
    if isinstance(chosen, int):
        return chosen
    facts = loaders.measure_loaders(
        chosen.data,
        recipe=chosen.recipe,
        loaders=chosen.loader,
        workers=chosen.workers,
        batch_size=chosen.batch_size,
        seconds=chosen.seconds,
        device=resolve_device(chosen.device),
    )
    settings = f"recipe {chosen.recipe}, batches of {chosen.batch_size}, {facts['device']}"
    print(f"{facts['images']} images, {settings}")
    print(loaders.render_table(facts["rows"]))
    _save(chosen.json, facts)
    if chosen.chart is not None:
        rates = {
            f"{row['loader']}, {'with views' if row['with_views'] else 'crops'}": row["samples_per_second"]
            for row in facts["rows"]
        }
        charts.draw_bars(rates, chosen.chart, title=f"{settings}: samples/s", unit="/s")
    return 0


def step(arguments: list[str]) -> int:
    """Run ``sslfast bench step``; returns the exit code."""
    chosen = parse(Step, arguments, prog="sslfast bench step")
    if isinstance(chosen, int):
        return chosen
    config, data = find_recipe(chosen.recipe), parse_data(chosen.data)
    name = "synthetic" if isinstance(data, int) else chosen.loader
    config = replace(
        config,
        batch_size=chosen.batch_size or config.batch_size,
        device=chosen.device,
        precision=chosen.precision,
        loader=replace(config.loader, name=name, workers=chosen.workers),  # type: ignore[arg-type]
    )
    report = steps.measure_step(config, data, steps=chosen.steps, rounds=chosen.rounds)
    print(steps.render(report))
    _save(chosen.json, {**timing.versions(), **report.as_dict()})
    if chosen.chart is not None:
        parts = {name: 1e3 * seconds for name, seconds in {"whole step": report.step, **report.parts}.items()}
        title = f"{report.recipe}, batch {report.batch_size}, {report.device}: parts of a step"
        charts.draw_bars(parts, chosen.chart, title=title, unit="ms")
    return 0


def _save(path: Path | None, facts: Mapping[str, Any]) -> None:
    if path is not None:
        save_json(path, facts, remedy="name another file with --json")
