"""``sslfast bench loader``: samples/s of every usable loader on your own images, alone and with the view stage.

What is timed is what training does: batches of a recipe's views in the order of an epoch, through the same
``build_loader`` and ``ViewStage``. Loaders keep their workers busy between batches, so they cannot take turns: each
runs for some seconds after a warm-up, one after the other.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sslfast.bench.timing import WARM_UP, call_seconds, device_name, quantile, versions
from sslfast.config import nearest
from sslfast.data import Manifest, open_data
from sslfast.device import resolve_precision
from sslfast.loaders import LOADERS, LoaderConfig, build_loader, loader_status, loaders_for
from sslfast.recipes import find_recipe
from sslfast.views import Batch, ViewConfig, ViewStage


def measure_batches(
    make: Callable[[], tuple[Iterator[Any], Callable[[], None]]],
    *,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Time any source of batches: rate, CPU, GPU and memory use.

    Args:
        make: returns an endless iterator of batches and the function that stops its workers, which count for ``cores``
            only once stopped.
        batch_size: samples per batch.
        seconds: how long to time; at least five batches.
        device: where batches end up.

    Returns:
        JSON values: ``samples_per_second`` (all batches over their time), 20 and 80 % quantiles and median over
        batches, ``cores`` (CPU seconds of this process and its workers over wall seconds, start-up included),
        ``gpu_percent`` (mean share of time with a kernel running, sampled by NVML; None without a GPU or NVML),
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
            took = call_seconds(lambda: next(batches), device)
            if number >= WARM_UP:
                times.append(took)
                if sum(times) > len(busy) + 1:
                    busy += _gpu_percent(device)
    finally:
        close()
    wall = time.perf_counter() - started
    rates = [batch_size / t for t in times]
    return {
        "batches": len(times),
        # Batches come in bursts of as many as there are workers: the rate is that of all of them.
        "samples_per_second": round(len(times) * batch_size / sum(times), 1),
        "quantile_20": round(quantile(rates, 0.2), 1),
        "quantile_80": round(quantile(rates, 0.8), 1),
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
    """Time one loader.

    Args:
        name: of the loader.
        manifest: the images; None for ``synthetic``.
        views: of a recipe.
        batch_size: samples per batch.
        workers: as ``LoaderConfig.workers``.
        seconds: how long to time; at least five batches.
        device: where batches end up.
        render: also run the view stage on every batch.
        dtype: of the rendered views; default: the one that training uses on the device.

    Returns:
        JSON values: those of ``measure_batches`` and ``loader``, ``with_views``, ``workers``, ``bad_images`` and
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
    """The batches of all epochs, endlessly."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _gpu_percent(device: torch.device) -> list[float]:
    """NVML's latest sample; empty where there is none."""
    if device.type != "cuda":
        return []
    try:
        return [float(torch.cuda.utilization(device))]
    except (ImportError, RuntimeError):  # no NVML bindings, or a driver without it
        return []


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
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


def measure_loaders(
    data: Path,
    *,
    recipe: str,
    loaders: Sequence[str],
    workers: int | None,
    batch_size: int,
    seconds: float,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time loaders on the images of a folder, manifest or .beton file, without and with the views of a recipe.

    Args:
        data: the images; unusable ones are skipped.
        recipe: whose views.
        loaders: names; empty: all that read the data.
        workers: of each loader; None: one per core.
        batch_size: samples per batch.
        seconds: for each measurement.
        device: where batches end up.
        report: takes a line about every loader that cannot be used here.

    Returns:
        JSON values: ``device``, ``torch``, ``platform``, ``recipe``, ``images``, ``batch_size`` and ``rows``, those of
        :func:`measure_loader`.

    Raises:
        ValueError: unknown recipe or loader, fewer images than ``batch_size``.
    """
    views = find_recipe(recipe).method.views()
    manifest = open_data(data, on_bad_image="skip")
    if len(manifest) < batch_size:
        raise ValueError(f"--batch-size {batch_size} is more than the {len(manifest)} images; lower it")
    for name in loaders:
        if name not in LOADERS:
            raise ValueError(f"unknown loader {name!r}; {nearest(name, LOADERS)}")
    rows = []
    for name in loaders or loaders_for(manifest):
        usable, reason, remedy = loader_status()[name]
        if not usable:
            report(f"{name}: not usable: {reason}; {remedy}")
            continue
        for render in (False, True):
            rows.append(
                measure_loader(
                    name,
                    None if name == "synthetic" else manifest,
                    views,
                    batch_size=batch_size,
                    workers=workers,
                    seconds=seconds,
                    device=device,
                    render=render,
                )
            )
    facts = {"device": device_name(device), **versions(), "recipe": recipe}
    return {**facts, "images": len(manifest), "batch_size": batch_size, "rows": rows}
