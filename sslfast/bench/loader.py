"""``sslfast bench loader``: samples/s of every usable loader on your own images, alone and with the view stage.

What is timed is what training does: batches of a recipe's views in the order of an epoch, through the same
``build_loader`` and ``ViewStage``. Loaders keep their workers busy between batches, so they cannot take turns: each
runs for ``--seconds`` after a warm-up, one after the other.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sslfast.data import Manifest, open_data
from sslfast.device import resolve_device, resolve_precision, wait_for
from sslfast.loaders import LOADERS, LoaderConfig, build_loader, loader_status, loaders_for
from sslfast.recipes import RECIPES
from sslfast.views import Batch, ViewConfig, ViewStage

WARM_UP = 3  # batches


def measure_batches(
    make: Callable[[], tuple[Iterator[Any], Callable[[], None]]],
    *,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Any source of batches for ``seconds``: rate, processor, GPU and memory use.

    Args:
        make: builds it: batches without end, and what stops its workers. They count for ``cores`` once stopped.
        batch_size: samples of a batch.
        seconds: how long to time, at least five batches.
        device: where batches end up.

    Returns:
        JSON values: ``samples_per_second`` (all batches over their time), 20 and 80 % quantiles and median over
        batches, ``cores`` (processor seconds of this process and its workers over wall seconds, start included),
        ``gpu_percent`` (mean share of time with a kernel running, as NVML samples it; None without a GPU or NVML),
        ``peak_mib`` of this process.
    """
    cpu, started = _cpu_seconds(), time.perf_counter()
    batches, close = make()
    times: list[float] = []
    busy: list[float] = []
    try:
        for number in range(sys.maxsize):
            if len(times) >= 5 and sum(times) >= seconds:
                break
            start = time.perf_counter()
            next(batches)
            wait_for(device)
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
                if sum(times) > len(busy) + 1:
                    busy += _gpu_percent(device)
    finally:
        close()
    wall = time.perf_counter() - started
    rates = sorted(batch_size / t for t in times)
    return {
        "batches": len(times),
        # Work comes in bursts of as many batches as there are workers: the mean over all of them is the rate.
        "samples_per_second": round(len(times) * batch_size / sum(times), 1),
        "quantile_20": round(rates[len(rates) // 5], 1),
        "quantile_80": round(rates[-1 - len(rates) // 5], 1),
        "median": round(statistics.median(rates), 1),
        "cores": round((_cpu_seconds() - cpu) / wall, 2),
        "gpu_percent": round(statistics.mean(busy), 1) if busy else None,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def measure_loader(
    name: str,
    manifest: Manifest | None,
    views: dict[str, ViewConfig],
    *,
    batch_size: int,
    workers: int | None,
    seconds: float,
    device: torch.device,
    render: bool,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """One loader for ``seconds``: what ``measure_batches`` says of it.

    Args:
        name: of the loader.
        manifest: the images; None for ``synthetic``.
        views: of a recipe.
        batch_size: samples of a batch.
        workers: as ``LoaderConfig.workers``.
        seconds: how long to time, at least five batches.
        device: where batches go.
        render: also run the view stage on every batch.
        dtype: of the rendered views; default: the device's for training.

    Returns:
        JSON values: ``measure_batches``' and ``loader``, ``with_views``, ``workers``, ``bad_images`` and
        ``megabytes_per_second`` of image files (None for ``synthetic``).
    """
    dtype = resolve_precision("auto", device) if dtype is None else dtype
    stage = ViewStage(views, seed=0, dtype=dtype, channels_last=device.type == "cuda")
    config = LoaderConfig(name=name, workers=workers, on_bad_image="skip")  # type: ignore[arg-type]
    bad_images = 0

    def make() -> tuple[Iterator[Any], Callable[[], None]]:
        loader = build_loader(
            config,
            views=views,
            batch_size=batch_size,
            seed=0,
            manifest=manifest,
            synthetic_rows=10_000 * batch_size if manifest is None else None,
            device=device,
        )

        def close() -> None:
            nonlocal bad_images
            bad_images = len(loader.bad_images)
            loader.close()

        batches = forever(loader)
        return (stage(batch) for batch in batches) if render else batches, close

    measured = measure_batches(make, batch_size=batch_size, seconds=seconds, device=device)
    bytes_per_image = None if manifest is None else float(manifest.bytes.mean())
    return {
        "loader": name,
        "with_views": render,
        "workers": workers,
        **measured,
        "megabytes_per_second": bytes_per_image and round(measured["samples_per_second"] * bytes_per_image / 1e6, 1),
        "bad_images": bad_images,
    }


def forever(loader: Any) -> Iterator[Batch]:
    """Batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _gpu_percent(device: torch.device) -> list[float]:
    """NVML's latest sample, or nothing where there is none."""
    if device.type != "cuda":
        return []
    try:
        return [float(torch.cuda.utilization(device))]
    except (ImportError, RuntimeError):  # no NVML bindings, or a driver that does not tell
        return []


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def render_table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a table; MB/s are bytes of image files."""
    header = f"{'loader':10} {'what':12} {'samples/s':>10} {'20 %':>8} {'80 %':>8} {'MB/s':>8} {'cores':>6}"
    lines = [f"{header} {'GPU %':>6} {'MiB':>7}"]
    for row in rows:
        what = "with views" if row["with_views"] else "crops"
        megabytes, gpu = ("–" if row[key] is None else row[key] for key in ("megabytes_per_second", "gpu_percent"))
        lines.append(
            f"{row['loader']:10} {what:12} {row['samples_per_second']:10.1f} {row['quantile_20']:8.1f} "
            f"{row['quantile_80']:8.1f} {megabytes:>8} {row['cores']:6.2f} {gpu:>6} {row['peak_mib']:7d}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """``sslfast bench loader DATA [--recipe NAME] [--loader NAME ...]``."""
    parser = argparse.ArgumentParser(prog="sslfast bench loader", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of images, manifest, or .beton file")
    parser.add_argument("--recipe", choices=RECIPES, default="pirl-paper", help="whose views")
    parser.add_argument("--loader", nargs="+", choices=LOADERS, help="default: all that read this data")
    parser.add_argument("--workers", type=int, help="default: the cores")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="timed for each line of the table")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--chart", type=Path, help="also draw them (.png)")
    chosen = parser.parse_args(sys.argv[1:] if argv is None else argv)
    device = resolve_device(chosen.device)
    manifest = open_data(chosen.data, on_bad_image="skip")
    if len(manifest) < chosen.batch_size:
        raise ValueError(f"--batch-size {chosen.batch_size} is more than the {len(manifest)} images; lower it")
    rows = []
    for name in chosen.loader or loaders_for(manifest):
        usable, reason, remedy = loader_status()[name]
        if not usable:
            print(f"{name}: not usable: {reason}; {remedy}", flush=True)
            continue
        for render in (False, True):
            rows.append(
                measure_loader(
                    name,
                    None if name == "synthetic" else manifest,
                    RECIPES[chosen.recipe]().method.views(),
                    batch_size=chosen.batch_size,
                    workers=chosen.workers,
                    seconds=chosen.seconds,
                    device=device,
                    render=render,
                )
            )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{len(manifest)} images, recipe {chosen.recipe}, batches of {chosen.batch_size}, {where}")
    print(render_table(rows))
    if chosen.json is not None:
        facts = {"device": where, "torch": str(torch.__version__), "platform": platform.platform()}
        chosen.json.write_text(json.dumps({**facts, "recipe": chosen.recipe, "rows": rows}, indent=2) + "\n")
    if chosen.chart is not None:
        from sslfast.report import draw_bars

        rates = {
            f"{row['loader']}, {'with views' if row['with_views'] else 'crops'}": row["samples_per_second"]
            for row in rows
        }
        title = f"{chosen.recipe}, batches of {chosen.batch_size}, {where}: samples/s"
        draw_bars(rates, chosen.chart, title=title, unit="/s")
    return 0
