"""Every op at the sizes of its goal, on the device's own clock, beside its peers and the ceilings of the same run.

    python -m benchmarks.studies.goal_sizes -o build/goals [--device cuda] [--tiny]

Run from the checkout. ``bank_nce`` forward and backward: sampled, shared and full negatives, InfoNCE and NCE, fp32 and
bf16 banks of 1,281,167 rows of 128 columns, K = 32,000, B = 64, 256, 1024, one and two views; the peers of
``benchmarks/peers`` for InfoNCE of two views; ``render_views`` of 256 pictures beside torchvision's transforms v2 and
the copy rate; the other ops beside their plain forms. Results are compared before anything is timed. Times are CUDA
events around graph replays (events around calls where a call cannot be captured): the host has no part in them.

Writes OUT.json, OUT.md and OUT.png after every measurement, the most important ones first: what a hanging kernel, a
lost GPU or the end of the time leaves undone is all that is missing. A measurement of more than a minute ends the
process. ``--resume`` goes on behind the measurement that ended the last one, which counts as an error.

Exit code 1 if bank_update_, bank_enqueue_ or ema_update_ take more or less than one launch, results differ or a
measurement failed; 3 if the GPU was lost on the way. ``--tiny``: sizes for a rehearsal.
"""

import argparse
import faulthandler
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from benchmarks.peers import PEERS
from benchmarks.studies.crossover import Sizes as CrossoverSizes
from benchmarks.studies.crossover import Way, free_bytes, measure_ceilings, unit_rows
from sslfast.bench.charts import draw_bars
from sslfast.bench.ops import Case, bank_enqueue_case, bank_update_case, ema_update_case, op_cases
from sslfast.bench.timing import device_name, device_seconds, milliseconds, versions
from sslfast.device import wait_for
from sslfast.ops import bank_nce, build_info, negative_rows, render_views, render_views_reference
from sslfast.views import AugmentConfig, CropConfig, ViewConfig, draw_view

COLUMNS, TEMPERATURE = 128, 0.07
SHARES = {"sampled": 0.8, "shared": 0.6, "full": 0.6, "render_views": 0.6}
"""Goals: the floor of an op at a measured ceiling over its time, bf16, B = 256, V = 2."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LONGEST = 60.0
"""Seconds of one measurement."""


@dataclass(kw_only=True)
class Plan:
    """What is measured."""

    device: torch.device
    rows: int = 1_281_167
    negatives: int = 32_000
    batches: tuple[int, ...] = (64, 256, 1024)
    views: tuple[int, ...] = (1, 2)
    pictures: int = 256
    side: int = 224
    rounds: int = 15
    goal_batch: int = 256
    is_tiny: bool = False
    """A rehearsal: no peers under torch.compile, no large case."""

    @classmethod
    def tiny(cls, device: torch.device) -> "Plan":
        return cls(
            device=device, rows=300, negatives=16, batches=(4,), views=(2,), pictures=2, side=16, rounds=2,
            goal_batch=4, is_tiny=True,
        )  # fmt: skip


@dataclass(kw_only=True)
class Results:
    """Rows of the tables, and what went wrong."""

    ceilings: dict[str, dict[str, float]]
    """Dtype -> copy and product rates."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Peers that do not fit the memory."""
    done: list[str] = field(default_factory=list)
    """Measurements that are over."""
    running: str | None = None

    def add(self, name: str, times: tuple[list[float], str], *, floor_bytes: float, flops: float, **more: Any) -> None:
        """One row: time, floor by the ceilings of its dtype, share of the floor."""
        seconds, clock = times
        rates = self.ceilings[more.get("dtype", "fp32")]
        floor = max(floor_bytes / rates["copy_gb_per_s"] / 1e9, flops / rates["matmul_tflop_per_s"] / 1e12)
        share = floor / statistics.median(seconds)
        self.rows.append(
            {"name": name, **more, **milliseconds(seconds), "clock": clock, "floor_ms": round(1e3 * floor, 4),
             "share_of_floor": round(share, 4)}
        )  # fmt: skip


@cache
def bank_of(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The bank, once for all measurements."""
    return unit_rows(rows, device, dtype)


def losses(plan: Plan, results: Results, *, mode: str, label: str, batch: int, compiled: bool = False) -> None:
    """bank_nce in one mode, and its peers; ``compiled``: the peers under torch.compile alone."""
    generator = torch.Generator(plan.device).manual_seed(batch)
    dtype = DTYPES[label]
    bank = bank_of(plan.rows, plan.device, dtype)
    index = torch.randint(plan.rows, (batch,), generator=generator, device=plan.device)
    way = Way(name=mode, mode=mode, negatives=plan.negatives, dtype=dtype, peer=None)  # type: ignore[arg-type]
    for views in plan.views:
        shape = (views, batch, COLUMNS)
        query = normalize(torch.randn(shape, generator=generator, device=plan.device), dim=-1)
        sizes = CrossoverSizes(batch=batch, num_rows=plan.rows, views=views)
        for loss in () if compiled else ("infonce", "nce"):
            call = _own(query, bank, index, mode, loss, plan.negatives)
            results.add(
                f"bank_nce {mode} {loss}", device_seconds(call, plan.device, rounds=plan.rounds),
                floor_bytes=way.floor_bytes(sizes), flops=way.flops(sizes), dtype=label, batch=batch, views=views,
                implementation="sslfast",
            )  # fmt: skip
        if views == max(plan.views):
            _peers(plan, results, query, bank, index, way, sizes, label, compiled)


def _own(query: Tensor, bank: Tensor, index: Tensor, mode: str, loss: str, negatives: int) -> Callable[[], Any]:
    leaf = query.detach().clone().requires_grad_()
    options: dict[str, Any] = {"z": 2.2 * len(bank)} if loss == "nce" else {}

    def call() -> Any:
        value = bank_nce(
            leaf, bank, index, negatives=mode, num_negatives=negatives, temperature=TEMPERATURE, loss=loss, **options  # type: ignore[arg-type]
        )  # fmt: skip
        return value, torch.autograd.grad(value.sum(), leaf)[0]  # type: ignore[union-attr]

    return call


def _peers(
    plan: Plan,
    results: Results,
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    way: Way,
    sizes: CrossoverSizes,
    label: str,
    compiled: bool,
) -> None:
    """The other ways to the same loss; compared with sslfast's before they are timed."""
    rows = None
    if way.mode != "full":
        shared = way.mode == "shared"
        rows = negative_rows(index, num_negatives=plan.negatives, num_rows=plan.rows, seed=0, step=0, shared=shared)
    ours = _own(query, bank, index, way.mode, "infonce", plan.negatives)()
    for peer in (peer for peer in PEERS if peer.mode == way.mode):
        if ("compiled" in peer.name) != compiled:
            continue
        needed = 4 * peer.values(sizes.views * sizes.batch, way.count(sizes), COLUMNS, sizes.batch)
        if needed > 0.4 * free_bytes(plan.device):  # a captured graph has memory of its own
            results.left_out.append(f"{peer.name}, {way.mode}, {label}, B = {sizes.batch}: {needed / 1e9:.0f} GB")
            continue
        facts = {"dtype": label, "batch": sizes.batch, "views": sizes.views, "implementation": peer.name}

        def call(peer: Any = peer) -> Any:
            return peer.function(query, bank, index, rows, temperature=TEMPERATURE)

        for mine, theirs in zip(ours, call(), strict=True):
            scale = max(theirs.abs().max().item(), 1.0)
            if not (mine - theirs).abs().max().item() <= (1e-3 if label == "fp32" else 6e-2) * scale:
                results.errors.append(f"bank_nce {way.mode} differs from {peer.name} at {facts}")
        results.add(
            f"bank_nce {way.mode} infonce", device_seconds(call, plan.device, rounds=min(plan.rounds, 5)),
            floor_bytes=way.floor_bytes(sizes), flops=way.flops(sizes), **facts,
        )  # fmt: skip


def pictures(plan: Plan, results: Results) -> None:
    """render_views with all jitters, fp32 and bf16, beside torchvision v2 picture by picture."""
    import torchvision.transforms.v2 as tv

    generator = torch.Generator().manual_seed(0)
    shape = (plan.pictures, 3, plan.side, plan.side)
    crops = torch.randint(256, shape, generator=generator).to(plan.device, torch.uint8)
    augment = AugmentConfig(jitter_probability=1.0, hue=0.4, grayscale_probability=0.0)
    view = ViewConfig(crop=CropConfig(size=plan.side), augment=augment)
    drawn = draw_view(torch.arange(plan.pictures, device=plan.device), view, seed=0, position=0, epoch=0).pixel
    chain = tv.Compose(
        [tv.RandomHorizontalFlip(), tv.ToDtype(torch.float32, scale=True), tv.ColorJitter(0.4, 0.4, 0.4, 0.4),
         tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )  # fmt: skip
    expected = render_views_reference(crops[:2], drawn[:2], photometric=False, blur=False)
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        options: dict[str, Any] = {"photometric": False, "blur": False, "dtype": dtype}
        off = (render_views(crops[:2], drawn[:2], **options).float() - expected).abs().max().item()
        if off > (1e-3 if label == "fp32" else 2e-2):
            results.errors.append(f"render_views {label} differs from its reference by {off:.2g}")
        floor = crops.numel() * (1 + dtype.itemsize)
        facts = {"dtype": label, "batch": plan.pictures, "views": 1}
        for layout in (False, True):
            call = partial(render_views, crops, drawn, **options, channels_last=layout)

            results.add(
                "render_views" + (" channels_last" if layout else ""),
                device_seconds(call, plan.device, rounds=plan.rounds, repeats=5),
                floor_bytes=floor, flops=0, implementation="sslfast", **facts,
            )  # fmt: skip
    results.add(
        "render_views",
        device_seconds(lambda: torch.stack([chain(c) for c in crops]), plan.device, rounds=min(plan.rounds, 3)),
        floor_bytes=crops.numel() * 5, flops=0, dtype="fp32", batch=plan.pictures, views=1,
        implementation="torchvision v2",
    )  # fmt: skip


def other_ops(plan: Plan, results: Results, cases: list[Case]) -> None:
    """Ops beside their plain forms, checked."""
    for case in cases:
        try:
            case.check()
        except AssertionError as error:
            results.errors.append(f"{case.op} {case.size}: {str(error).strip().splitlines()[0]}")
        for name, call in case.implementations.items():
            results.add(
                f"{case.op} {case.size}", device_seconds(call, plan.device, rounds=plan.rounds, repeats=5),
                floor_bytes=case.floor_bytes, flops=0, implementation=name,
            )  # fmt: skip


def count_launches(plan: Plan, results: Results) -> None:
    """Updates of state are one launch each."""
    sizes: dict[str, Any] = {"batch": 4, "num_rows": 50} if plan.is_tiny else {}
    cases = [
        bank_update_case(plan.device, **sizes),
        bank_enqueue_case(plan.device, **sizes),
        ema_update_case(plan.device, shapes=[(3, 5), (7,)] if plan.is_tiny else None),
    ]
    for case in cases:
        case.check()
        results.launches[case.op] = launches(case.implementations["sslfast"], plan.device, case.op)
        if results.launches[case.op] != 1:
            results.errors.append(f"{case.op}: {results.launches[case.op]} launches, the goal is one")


def launches(call: Callable[[], Any], device: torch.device, op: str) -> int:
    """Kernels, copies and fills that one call puts on the GPU; on a CPU calls of the op."""
    call()
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    for _ in range(2):  # the first profile of a process starts the tracer and may miss what runs meanwhile
        with profile(activities=[kind]) as found:
            call()
            wait_for(device)
    events = found.events() or []
    if device.type == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    return sum(event.name == f"sslfast::{op}" for event in events)


def measurements(plan: Plan, results: Results) -> dict[str, Callable[[], None]]:
    """Name -> measurement, by worth."""

    def scored(label: str, batch: int) -> dict[str, Callable[[], None]]:
        return {
            f"bank_nce {mode}, {label}, B = {batch}": partial(
                losses, plan, results, mode=mode, label=label, batch=batch
            )
            for mode in ("full", "sampled", "shared")
        }

    found: dict[str, Callable[[], None]] = {"launches": partial(count_launches, plan, results)}
    found |= scored("bf16", plan.goal_batch)
    found["render_views"] = partial(pictures, plan, results)
    others = [batch for batch in plan.batches if batch != plan.goal_batch]
    for label, batch in [*(("bf16", b) for b in others), ("fp32", plan.goal_batch), *(("fp32", b) for b in others)]:
        found |= scored(label, batch)
    if not plan.is_tiny:
        cases = partial(op_cases, plan.device)
        found["other ops"] = lambda: other_ops(
            plan, results, [case for case in cases() if not case.op.startswith("bank_nce")]
        )
        for mode in ("sampled", "shared", "full"):
            found[f"{mode} under torch.compile"] = partial(
                losses, plan, results, mode=mode, label="bf16", batch=plan.goal_batch, compiled=True
            )
    return found


def is_lost(device: torch.device) -> bool:
    """Whether the GPU's context is of no more use, as after a trap or an illegal access."""
    try:
        wait_for(device)
    except RuntimeError:
        return True
    return False


def render(facts: dict[str, Any], results: Results, goals: list[dict[str, Any]]) -> str:
    """Markdown: ceilings, goals, all rows."""
    lines = [f"# Ops at the sizes of their goals: {facts['device']}", "", f"torch {facts['torch']}, {facts['build']}."]
    lines += [
        f"Ceilings of this run, {dtype}: copy {rates['copy_gb_per_s']:.0f} GB/s, product "
        f"{rates['matmul_tflop_per_s']:.1f} TFLOP/s."
        for dtype, rates in results.ceilings.items()
    ]
    lines += ["", "| goal | share of the floor | wanted | |", "|---|---|---|---|"]
    lines += [
        f"| {g['name']} | {g['share']:.3f} | {g['wanted']:.2f} | {'met' if g['met'] else 'not met'} |" for g in goals
    ]
    lines += [f"| {op}: launches | {count} | 1 | {'met' if count == 1 else 'not met'} |"
              for op, count in results.launches.items()]  # fmt: skip
    head = ["what", "dtype", "B", "V", "implementation", "median ms", "20 %", "80 %", "floor ms", "of floor", "clock"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results.rows:
        cells = [row["name"], row.get("dtype", ""), row.get("batch", ""), row.get("views", ""), row["implementation"]]
        cells += [row[key] for key in ("median_ms", "quantile20_ms", "quantile80_ms", "floor_ms", "share_of_floor")]
        lines.append("| " + " | ".join(map(str, [*cells, row["clock"]])) + " |")
    lines += ["", *(f"- WRONG: {error}" for error in results.errors)]
    lines += [f"- left out, does not fit the memory: {line}" for line in results.left_out]
    lines += [f"- not measured: {name}" for name in facts["left"]]
    return "\n".join(lines) + "\n"


def goals_of(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """Each goal of SHARES with the share reached: bf16, B = 256, the largest V."""
    found = []
    for row in results.rows:
        word = "render_views" if row["name"] == "render_views" else row["name"].split()[1] if " " in row["name"] else ""
        is_size = row.get("batch") in (plan.goal_batch, plan.pictures) and row.get("dtype") == "bf16"
        if row["implementation"] == "sslfast" and word in SHARES and is_size and (
            word == "render_views" or row["views"] == max(plan.views)
        ):  # fmt: skip
            share = row["share_of_floor"]
            found.append({"name": row["name"], "share": share, "wanted": SHARES[word], "met": share >= SHARES[word]})
    return found


def save(output: Path, plan: Plan, results: Results, left: list[str]) -> None:
    """Write JSON and Markdown, and the chart once there is a bar."""
    goals = goals_of(plan, results)
    facts = {"device": device_name(plan.device), **versions(), "build": build_info()["note"], "left": left}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({**facts, "goals": goals, **vars(results)}, indent=1) + "\n")
    output.with_suffix(".md").write_text(render(facts, results, goals))
    bars = {
        f"{row['implementation']}: {row['name'].removeprefix('bank_nce ')}": row["median_ms"]
        for row in results.rows
        if row.get("dtype") == "bf16" and row.get("batch") == plan.goal_batch and row.get("views") == max(plan.views)
    }
    if bars and not left:
        title = (
            f"bank_nce, B = {plan.goal_batch}, V = {max(plan.views)}, K = {plan.negatives:,}, N = {plan.rows:,}, bf16"
        )
        draw_bars(bars, output.with_suffix(".png"), title=title, unit="ms", highlight="sslfast")


def main(argv: list[str] | None = None) -> int:
    """Measure, write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="files OUT.json, OUT.md, OUT.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--resume", action="store_true", help="leave out what OUT.json has")
    chosen = parser.parse_args(argv)
    device = torch.device(chosen.device)
    plan = Plan.tiny(device) if chosen.tiny else Plan(device=device)
    if chosen.resume:
        before = json.loads(chosen.output.with_suffix(".json").read_text())
        results = Results(**{name: before[name] for name in Results.__dataclass_fields__})
        if results.running is not None:
            results.errors.append(f"{results.running}: ended the process, or took longer than {LONGEST:.0f} s")
            results.done.append(results.running)
    else:
        ceilings = {label: measure_ceilings(device, dtype, tiny=chosen.tiny) for label, dtype in DTYPES.items()}
        results = Results(ceilings=ceilings)
    every = measurements(plan, results)
    for name, measure in every.items():
        if name in results.done:
            continue
        results.running = name
        save(chosen.output, plan, results, [name for name in every if name not in results.done])
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            results.errors.append(f"{name}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
        faulthandler.cancel_dump_traceback_later()
        results.running = None
        results.done.append(name)
        print(f"{name}: {len(results.rows)} rows", flush=True)
        if is_lost(device):
            save(chosen.output, plan, results, [name for name in every if name not in results.done])
            return 3
    save(chosen.output, plan, results, [])
    print("\n".join(f"WRONG: {error}" for error in results.errors) or "results agree, one launch each")
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
