"""Time of sampled, shared and full negatives over batch size and bank size, beside the peers: where they cross.

    python -m benchmarks.studies.crossover -o build/crossover [--device cuda] [--batch 16 64 256] [--rows 1e5 1e6]

Run from the checkout. One call is the loss of all views and its gradient by the query, with newly drawn negatives.
Writes OUT.json, OUT.md and OUT.png. What does not fit in memory or takes longer than --limit seconds per call is left
out with the reason. Bandwidth counts the bank bytes that must be read once, arithmetic the two products; their
ceilings, a copy and a dense product in the bank's dtype, are measured in the same run.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.peers import PEERS, Peer
from sslfast.bench.charts import draw_panels
from sslfast.bench.timing import (
    call_seconds,
    device_name,
    milliseconds,
    peak_extra_bytes,
    seconds_in_turns,
    versions,
)
from sslfast.ops import bank_nce, build_info, negative_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS, TEMPERATURE = 128, 0.07
SHADES = {  # sslfast first, then its peers: (mode, largest K) -> colors
    ("sampled", False): ["#b91c1c", "#ef4444", "#f5a3a3", "#f7c0c0"],
    ("sampled", True): ["#b45309", "#f08c2e", "#f5c089", "#f9d9b5"],
    ("shared", True): ["#15803d", "#4cb86e", "#a3d9b1"],
    ("full", True): ["#1d4ed8", "#7c3aed", "#c4a5f5", "#0891b2", "#64748b"],
}
USABLE = 0.8  # share of the free memory that a call may take


@dataclass(kw_only=True)
class Sizes:
    """One point of the grid."""

    batch: int
    num_rows: int
    views: int


@dataclass(kw_only=True)
class Way:
    """One implementation in one mode."""

    name: str
    mode: Literal["sampled", "shared", "full"]
    negatives: int
    """K; ignored for full."""
    dtype: torch.dtype
    peer: Peer | None
    """None: sslfast."""

    def count(self, sizes: Sizes) -> int:
        """Bank rows that a query is scored against."""
        return sizes.num_rows if self.mode == "full" else self.negatives + 1

    def floor_bytes(self, sizes: Sizes) -> int:
        """Bank bytes that must be read: the negatives of every sample, or those of the batch and the positives."""
        rows = sizes.batch * (self.negatives + 1) if self.mode == "sampled" else self.count(sizes) + sizes.batch
        return rows * COLUMNS * self.dtype.itemsize

    def flops(self, sizes: Sizes) -> int:
        """Scores and the weighted sum of rows."""
        return 4 * sizes.views * sizes.batch * self.count(sizes) * COLUMNS

    def needed_bytes(self, sizes: Sizes) -> int:
        """Estimate of the memory that a call holds."""
        if self.peer is None:
            return 8 * sizes.views * sizes.batch * COLUMNS
        return 4 * self.peer.values(sizes.views * sizes.batch, self.count(sizes), COLUMNS, sizes.batch)

    def call(self, query: Tensor, bank: Tensor, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Loss and gradient with the negatives of a step."""
        if self.peer is None:
            options: dict[str, Any] = {"num_negatives": self.negatives, "temperature": TEMPERATURE, "step": step}
            query = query.detach().requires_grad_()
            loss = bank_nce(query, bank, index, negatives=self.mode, **options)
            assert isinstance(loss, Tensor)
            return loss.detach(), torch.autograd.grad(loss.sum(), query)[0]
        shape = {"sampled": (len(index), self.negatives), "shared": (self.negatives,)}.get(self.mode)
        negatives = None if shape is None else torch.randint(len(bank), shape, device=bank.device)
        return self.peer.function(query, bank, index, negatives, temperature=TEMPERATURE)


@dataclass(kw_only=True)
class Run:
    """What is measured, and the results so far."""

    device: torch.device
    dtype: torch.dtype
    ways: list[Way]
    rounds: int
    limit: float
    ceilings: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    slow: dict[str, str] = field(default_factory=dict)
    """Way and bank size -> why larger batches are not tried."""


def ways(dtype: torch.dtype, negatives: list[int], without: list[str]) -> list[Way]:
    """sslfast in its modes, then the peers; for a half-type bank the eager gather in fp32 too, as others run it."""
    found = []
    for mode, peers in (("sampled", PEERS), ("shared", PEERS), ("full", PEERS)):
        for count in negatives if mode == "sampled" else [max(negatives)]:
            size = "" if mode == "full" else f" K={count:,}"
            for peer in [None, *(peer for peer in peers if peer.mode == mode)]:
                base = Way(
                    name=f"{mode}{size}: {'sslfast' if peer is None else peer.name}",
                    mode=mode,  # type: ignore[arg-type]
                    negatives=count,
                    dtype=dtype,
                    peer=peer,
                )
                found.append(base)
                if peer is not None and peer.name == "eager gather" and dtype != torch.float32:
                    found.append(Way(**{**vars(base), "name": base.name + " fp32", "dtype": torch.float32}))
    return [way for way in found if not any(word in way.name for word in without)]


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """Best of several: GB/s of a copy (read and written), TFLOP/s of a square product in the bank's dtype."""
    megabytes, side = (1024, 8192) if device.type == "cuda" else (1, 64) if tiny else (128, 1024)
    pair = [torch.ones(megabytes * 2**18, device=device) for _ in range(2)]
    copy = min(call_seconds(lambda: pair[0].copy_(pair[1]), device) for _ in range(7))
    pair.clear()
    matrix = torch.randn(side, side, device=device).to(dtype)
    product = min(call_seconds(lambda: matrix @ matrix, device) for _ in range(7))
    return {"copy_gb_per_s": 2 * megabytes * 2**20 / copy / 1e9, "matmul_tflop_per_s": 2 * side**3 / product / 1e12}


def unit_rows(num_rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[num_rows, D]`` random unit vectors, drawn in pieces."""
    generator = torch.Generator(device).manual_seed(0)
    bank = torch.empty(num_rows, COLUMNS, device=device, dtype=dtype)
    for piece in bank.split(2**18):
        piece.copy_(normalize(torch.randn(piece.shape, generator=generator, device=device), dim=1))
    return bank


def check(run: Run, query: Tensor, bank: Tensor, index: Tensor) -> None:
    """Check that every way gives sslfast's loss and gradient on sslfast's negatives, before any is timed."""
    tolerance = 1e-4 if run.dtype == torch.float32 else 5e-2
    for way in run.ways:
        if way.peer is None:
            continue
        own = Way(**{**vars(way), "peer": None})
        draw = {"num_negatives": way.negatives, "num_rows": len(bank), "seed": 0, "step": 0}
        negatives = None if way.mode == "full" else negative_rows(index, **draw, shared=way.mode == "shared")
        ours = own.call(query, bank, index, 0)
        theirs = way.peer.function(query, bank.to(way.dtype), index, negatives, temperature=TEMPERATURE)
        for a, b in zip(ours, theirs, strict=True):
            difference, size = (a - b).abs().max().item(), b.abs().max().item()
            if not difference <= tolerance * max(size, 1.0):
                raise RuntimeError(
                    f"{way.name} differs from sslfast by {difference:.2g} on the same negatives; nothing was timed"
                )


def measure_point(run: Run, sizes: Sizes, query: Tensor, banks: dict[torch.dtype, Tensor], index: Tensor) -> None:
    """Measure every way at one size; they take turns, so that a noisy machine slows all alike."""
    torch.compiler.reset()  # past a handful of shapes torch.compile would silently fall back to eager mode
    calls: dict[str, tuple[Way, Callable[[], Any]]] = {}
    for way in run.ways:
        reason = run.slow.get(f"{way.name} {sizes.num_rows}") or unfit(run, way, sizes)
        if reason is None:
            bank = banks.setdefault(way.dtype, banks[run.dtype].to(way.dtype))
            counter = iter(range(10**9))

            def call(way: Way = way, bank: Tensor = bank, counter: Any = counter) -> None:
                way.call(query, bank, index, next(counter))

            try:
                call()  # compiles what compiles
                took = call_seconds(call, run.device)
                if took > run.limit:
                    reason = f"{took:.1f} s a call at B={sizes.batch}, over --limit {run.limit:g}"
                    run.slow[f"{way.name} {sizes.num_rows}"] = reason
                else:
                    calls[way.name] = way, call
            except torch.OutOfMemoryError:
                reason = "out of memory"
        if reason is not None:
            run.rows.append(describe(way, sizes) | {"skipped": reason})
    times = seconds_in_turns({name: call for name, (_way, call) in calls.items()}, run.device, rounds=run.rounds)
    for name, (way, call) in calls.items():
        run.rows.append(describe(way, sizes) | summary(run, way, sizes, times[name], call))


def unfit(run: Run, way: Way, sizes: Sizes) -> str | None:
    """Why a call cannot be made, or None."""
    needed, free = way.needed_bytes(sizes), free_bytes(run.device)
    if way.dtype != run.dtype:
        needed += sizes.num_rows * COLUMNS * way.dtype.itemsize
    if needed > USABLE * free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    return None


def describe(way: Way, sizes: Sizes) -> dict[str, Any]:
    """The columns of a row that say what was measured."""
    dtype = next(name for name, value in DTYPES.items() if value == way.dtype)
    return {"way": way.name, "mode": way.mode, "dtype": dtype, **vars(sizes)}


def summary(run: Run, way: Way, sizes: Sizes, times: list[float], call: Callable[[], Any]) -> dict[str, Any]:
    """The numbers of a row."""
    median = statistics.median(times)
    bandwidth, rate = way.floor_bytes(sizes) / median / 1e9, way.flops(sizes) / median / 1e12
    peak = peak_extra_bytes(run.device, call)
    return {
        **milliseconds(times),
        "gb_per_s": round(bandwidth, 3),
        "share_of_copy": round(bandwidth / run.ceilings["copy_gb_per_s"], 4),
        "tflop_per_s": round(rate, 5),
        "share_of_matmul": round(rate / run.ceilings["matmul_tflop_per_s"], 4),
        "peak_extra_mib": None if peak is None else round(peak / 2**20, 2),
    }


def crossings(rows: list[dict[str, Any]]) -> list[str]:
    """For each bank size and sampled way of sslfast: the smallest batch from which full is faster."""
    lines = []
    timed = {(row["num_rows"], row["way"], row["batch"]): row["median_ms"] for row in rows if "median_ms" in row}
    for num_rows, way in sorted({(n, w) for n, w, _ in timed if w.startswith("sampled") and w.endswith("sslfast")}):
        batches = sorted(b for n, w, b in timed if (n, w) == (num_rows, way) and (n, "full: sslfast", b) in timed)
        faster = [timed[num_rows, "full: sslfast", b] < timed[num_rows, way, b] for b in batches]
        first = next((b for i, b in enumerate(batches) if all(faster[i:])), None)
        where = (
            f"from B = {first} up"
            if first is not None
            else f"at no B up to {batches[-1]}"
            if batches
            else "not measured"
        )
        lines.append(f"- N = {num_rows:,}: full is faster than {way.removesuffix(': sslfast')} {where}.")
    return lines


def render(run: Run, facts: dict[str, Any]) -> str:
    """Markdown: device, ceilings, crossings, all numbers, what was left out."""
    head = ["N", "B", "V", "way", "bank", "median ms", "20 %", "80 %", "GB/s", "of copy", "TFLOP/s", "of matmul", "MiB"]
    lines = [
        f"# Sampled, shared and full negatives: {facts['device']}",
        "",
        f"`{facts['command']}`",
        "",
        f"torch {facts['torch']}, {facts['build']}; D = {COLUMNS}, temperature {TEMPERATURE}, loss and gradient, "
        f"{run.rounds} calls each in turn.",
        f"Ceilings of this run: copy {run.ceilings['copy_gb_per_s']:.1f} GB/s, product in the bank's dtype "
        f"{run.ceilings['matmul_tflop_per_s']:.3f} TFLOP/s.",
        "Shares of the copy above 1: bank rows came from a cache.",
        "",
        *crossings(run.rows),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in (row for row in run.rows if "median_ms" in row):
        memory = "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:,.1f}"
        cells = [f"{row['num_rows']:,}", row["batch"], row["views"], row["way"], row["dtype"]]
        cells += [f"{row[key]:.3f}" for key in ("median_ms", "quantile20_ms", "quantile80_ms")]
        cells += [f"{row['gb_per_s']:.2f}", f"{row['share_of_copy']:.2f}"]
        cells += [f"{row['tflop_per_s']:.4f}", f"{row['share_of_matmul']:.2f}", memory]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    skipped = [row for row in run.rows if "skipped" in row]
    if skipped:
        lines += ["", "Left out:", ""]
        lines += [f"- N = {r['num_rows']:,}, B = {r['batch']}, {r['way']}: {r['skipped']}" for r in skipped]
    return "\n".join(lines) + "\n"


def chart(run: Run, output: Path, device: str) -> None:
    """One panel for each bank size: milliseconds against the batch."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in run.rows:
        if "median_ms" in row:
            panel = panels.setdefault(f"N = {row['num_rows']:,}", {})
            panel.setdefault(row["way"], []).append((row["batch"], row["median_ms"]))
    styles = {}
    for group in dict.fromkeys(way.name.split(":")[0] for way in run.ways):
        members = [way for way in run.ways if way.name.split(":")[0] == group]
        shades = SHADES[members[0].mode, members[0].negatives == max(way.negatives for way in run.ways)]
        for way, color in zip(members, itertools.cycle(shades), strict=False):
            styles[way.name] = (color, 5 if way.peer is None else 2)
    title = f"Loss and gradient of {run.rows[0]['views']} views: {device}"
    draw_panels(panels, output, title=title, x_label="batch", y_label="ms per call", styles=styles)


def save(run: Run, facts: dict[str, Any], output: Path) -> None:
    """Write the three files, after every point: an end on the way leaves what there is."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(facts | {"rows": run.rows}, indent=1) + "\n")
    output.with_suffix(".md").write_text(render(run, facts))
    if any("median_ms" in row for row in run.rows):
        chart(run, output.with_suffix(".png"), facts["device"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; sizes are smaller on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="files OUT.json, OUT.md, OUT.png")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, nargs="+", help="default 16 ... 4096, on a CPU 16 ... 256")
    parser.add_argument("--rows", type=float, nargs="+", help="bank sizes; default 1e5 1281167 1e7, on a CPU 1e5")
    parser.add_argument(
        "--negatives", type=int, nargs="+", default=[4096, 32000], help="K of sampled; shared: the largest"
    )
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, help="of the bank; default bf16, on a CPU fp32")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each way")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds per call above which a way is left out")
    parser.add_argument(
        "--without", nargs="*", default=[], help="leave out ways whose name contains one of these words"
    )
    chosen = parser.parse_args(argv)
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = torch.device(chosen.device).type == "cpu"
    chosen.batch = sorted(chosen.batch or ([16, 64, 256] if on_cpu else [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]))
    chosen.rows = sorted(int(rows) for rows in chosen.rows or ([1e5] if on_cpu else [1e5, 1_281_167, 1e7]))
    chosen.dtype = chosen.dtype or ("fp32" if on_cpu else "bf16")
    for name in ("batch", "rows", "negatives"):
        if min(getattr(chosen, name)) < 2:
            parser.error(f"--{name} must be at least 2, got {min(getattr(chosen, name))}")
    if chosen.views < 1 or chosen.rounds < 1:
        parser.error(f"--views and --rounds must be at least 1, got {chosen.views} and {chosen.rounds}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measure the grid and write the three files."""
    chosen = parse(argv)
    device, dtype = torch.device(chosen.device), DTYPES[chosen.dtype]
    run = Run(
        device=device,
        dtype=dtype,
        ways=ways(dtype, chosen.negatives, chosen.without),
        rounds=chosen.rounds,
        limit=chosen.limit,
        ceilings=measure_ceilings(device, dtype),
    )
    name = device_name(device)
    options = [f"--{key} {' '.join(map(str, getattr(chosen, key)))}" for key in ("batch", "rows", "negatives")]
    options += [f"--{key} {getattr(chosen, key)}" for key in ("device", "views", "dtype", "rounds", "limit")]
    options += [f"--without {' '.join(chosen.without)}"] if chosen.without else []
    facts = {
        "command": f"python -m benchmarks.studies.crossover -o OUT {' '.join(options)}",
        "device": name,
        **versions(),
        "build": build_info()["note"],
        "ceilings": run.ceilings,
    }
    generator = torch.Generator(device).manual_seed(1)
    checked = False
    for num_rows in chosen.rows:
        if num_rows * COLUMNS * dtype.itemsize > USABLE * free_bytes(device):
            for batch in chosen.batch:
                sizes = Sizes(batch=batch, num_rows=num_rows, views=chosen.views)
                run.rows += [describe(way, sizes) | {"skipped": "the bank does not fit memory"} for way in run.ways]
            continue
        banks = {dtype: unit_rows(num_rows, device, dtype)}
        for batch in chosen.batch:
            shape = (chosen.views, batch, COLUMNS)
            query = normalize(torch.randn(shape, generator=generator, device=device), dim=-1)
            index = torch.randint(num_rows, (batch,), generator=generator, device=device)
            if not checked:
                few = min(batch, 4)
                check(run, query[:, :few], banks[dtype], index[:few])
                checked = True
            sizes = Sizes(batch=batch, num_rows=num_rows, views=chosen.views)
            measure_point(run, sizes, query, banks, index)
            save(run, facts, chosen.output)
            print(f"N = {num_rows:,}, B = {batch}: {sum('median_ms' in row for row in run.rows)} measured", flush=True)
    save(run, facts, chosen.output)
    print("\n".join(crossings(run.rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
