"""What the benchmarks share: clocks that wait for the device, implementations in turns, quantiles, peak memory."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sslfast.device import wait_for

WARM_UP = 3
"""Batches or steps before anything is timed: workers start, cuDNN chooses its algorithms."""


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu`` and the number of torch's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What a file of measurements records beside the device: ``torch`` and ``platform``."""
    return {"torch": str(torch.__version__), "platform": platform.platform()}


def call_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device idle before and after it."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """Median of :func:`call_seconds` over ``rounds`` calls, after one that is not counted."""
    return statistics.median([call_seconds(function, device) for _ in range(rounds + 1)][1:])


def seconds_in_turns(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """:func:`call_seconds` of each function in every round: a noisy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(call_seconds(function, device))
    return times


def device_seconds(
    function: Callable[[], Any], device: torch.device, *, rounds: int, repeats: int = 1
) -> tuple[list[float], str]:
    """Times of a call on the device's own clock, and what that clock was.

    CUDA: ``"graph"``, events around replays of a graph of ``repeats`` calls, in which the host has no part; where a
    call cannot be captured ``"events"``, events around ``repeats`` calls. CPU: ``"host"``, :func:`call_seconds`.

    Args:
        function: the call; run three times before it is timed.
        device: where it runs.
        rounds: number of times.
        repeats: calls in one time, which is divided by it: short calls need several.
    """

    def many() -> None:
        for _ in range(repeats):
            function()

    for _ in range(WARM_UP if device.type == "cuda" else 1):
        function()
    if device.type != "cuda":
        return [call_seconds(many, device) / repeats for _ in range(rounds)], "host"
    replay, clock = _captured(many, device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    replay()
    for start, end in pairs:
        start.record()
        replay()
        end.record()
    wait_for(device)
    return [start.elapsed_time(end) / 1e3 / repeats for start, end in pairs], clock


def _captured(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Any], str]:
    wait_for(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):  # autograd's and cuBLAS's first calls are not captured
            function()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # the call waits for the device, or allocates what a graph cannot hold
        wait_for(device)
        return function, "events"
    return graph.replay, "graph"


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the others lies, by the nearest rank."""
    return sorted(values)[round(share * (len(values) - 1))]


def milliseconds(times: Sequence[float]) -> dict[str, float]:
    """``median_ms``, ``quantile20_ms`` and ``quantile80_ms`` of times in seconds."""
    return {
        "median_ms": round(statistics.median(times) * 1e3, 4),
        "quantile20_ms": round(quantile(times, 0.2) * 1e3, 4),
        "quantile80_ms": round(quantile(times, 0.8) * 1e3, 4),
    }


def peak_extra_bytes(device: torch.device, function: Callable[[], Any]) -> int | None:
    """Peak memory of one call beyond what was held before it; None where it cannot be measured.

    CUDA: torch's allocator. CPU: the peak of the resident set (Linux).
    """
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()  # garbage that is freed during the call would hide its peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
        before = _status_kib("VmRSS")
        function()
        return max(0, _status_kib("VmHWM") - before) * 1024
    except (OSError, StopIteration):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])
