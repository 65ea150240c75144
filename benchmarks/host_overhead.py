"""Time that the host spends in one call of an op: Python, dispatcher, checks, autograd; with next to no work to do.

    python -m benchmarks.host_overhead [-o build/overhead] [--device cpu] [--turns 300] [--before OTHER/CHECKOUT]

Tensors are as small as the ops take them, so that a call's time is what surrounds the kernel: on CUDA the time until
the call returns, on a CPU the processor time of the calling thread with the tiny kernel in it (one thread), which
leaves out waiting for other processes. Ops take turns, ten calls at a time; reported are the median of all turns and
their 10 % quantile, which other processes disturb less. Floors are timed in the same turns: what torch.autograd.grad
takes for a clone and for an empty torch.autograd.Function, and the registered op alone; so is torch's own
cross-entropy, forward and backward in C++ and with none of the op's checks, for comparison. ``--before`` times another
checkout in alternation with this one (each in processes of its own), for numbers that can be compared.

Goals: bank_nce forward and backward 60 microseconds, bank_update_ 10. The floors for autograd and for the registered op
take nearly all of the first by themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslfast import ops
from sslfast.bench.timing import quantile
from sslfast.files import replacing

GOALS = {"bank_nce forward and backward": 60.0, "bank_update_": 10.0}
"""Microseconds."""
CALLS = 10
"""In a turn."""


class Identity(torch.autograd.Function):
    """Autograd's own cost for a function in Python."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def cases(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> one call."""
    bank = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).to(device)
    query = torch.nn.functional.normalize(torch.randn(1, 2, 4), dim=-1).to(device).requires_grad_()
    plain = query.detach()
    index = torch.tensor([1, 3], device=device)
    features = torch.randn(2, 4).to(device)
    head = torch.zeros((), dtype=torch.int64, device=device)
    targets, sources = [torch.zeros(3, device=device)], [torch.ones(3, device=device)]
    weight = torch.ones(1, 2, device=device)
    logits = torch.randn(2, 5).to(device).requires_grad_()

    def clone() -> Any:
        return torch.autograd.grad(query.clone(), query, plain)

    def function() -> Any:
        return torch.autograd.grad(Identity.apply(query), query, plain)

    def registered() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.sslfast.bank_nce.default(
                plain, bank, index, None, None, 0, None, 1.0, 2, 0.07, False, True, 0, 0, 8
            )

    def cross_entropy() -> Any:
        loss = torch.nn.functional.cross_entropy(logits, index, reduction="none")
        return torch.autograd.grad(loss, logits, weight[0])

    def both(**options: Any) -> Callable[[], Any]:
        def call() -> Any:
            loss = ops.bank_nce(query, bank, index, num_negatives=2, **options)
            assert isinstance(loss, torch.Tensor)
            return torch.autograd.grad(loss, query, weight)

        return call

    return {
        "bank_nce forward": lambda: ops.bank_nce(plain, bank, index, num_negatives=2),
        "bank_nce forward and backward": both(),
        "bank_nce nce forward and backward": both(loss="nce", z=8.0),
        "bank_nce shared forward and backward": both(negatives="shared"),
        "bank_nce full forward and backward": both(negatives="full"),
        "bank_update_": lambda: ops.bank_update_(bank, index, features),
        "bank_enqueue_": lambda: ops.bank_enqueue_(bank, head, features),
        "ema_update_": lambda: ops.ema_update_(targets, sources, momentum=0.9),
        "negative_rows": lambda: ops.negative_rows(index, num_negatives=2, num_rows=8, seed=0, step=0),
        "floor: clone forward and backward": clone,
        "floor: empty autograd.Function forward and backward": function,
        "floor: registered op of bank_nce alone": registered,
        "torch cross_entropy forward and backward": cross_entropy,
        "torch add forward and backward": lambda: torch.autograd.grad(query + plain, query, plain),
    }


def measure(device: torch.device, turns: int) -> dict[str, list[float]]:
    """[median, 10 % quantile] of the microseconds of each case over ``turns`` turns."""
    torch.set_num_threads(1)
    clock = time.perf_counter_ns if device.type == "cuda" else time.thread_time_ns
    every = cases(device)
    times: dict[str, list[float]] = {name: [] for name in every}
    for number in range(turns + 10):
        for name, call in every.items():
            start = clock()
            for _ in range(CALLS):
                call()
            took = clock() - start
            if number >= 10:
                times[name].append(took / CALLS / 1e3)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the queue must not fill up, else calls wait for the device
    return {name: [round(quantile(values, q), 2) for q in (0.5, 0.1)] for name, values in times.items()}


def alternated(before: Path, device: str, turns: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(before, now): of five processes of each checkout in turn, the medians of their numbers."""
    here = Path(__file__).resolve().parents[1]
    found: dict[Path, list[dict[str, list[float]]]] = {before: [], here: []}
    for _ in range(5):
        for checkout, results in found.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = [
                sys.executable,
                "-m",
                "benchmarks.host_overhead",
                "--device",
                device,
                "--turns",
                str(turns),
                "--print-json",
            ]
            done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    medians = [
        {name: [quantile([one[name][k] for one in results], 0.5) for k in (0, 1)] for name in results[0]}
        for results in found.values()
    ]
    return medians[0], medians[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="without suffix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--before", type=Path, help="another checkout, built, to compare with")
    parser.add_argument("--print-json", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.turns < 1:
        parser.error(f"--turns must be at least 1, got {chosen.turns}")
    before: dict[str, list[float]] = {}
    if chosen.before is not None:
        before, now = alternated(chosen.before.resolve(), chosen.device, chosen.turns)
    else:
        now = measure(torch.device(chosen.device), chosen.turns)
    if chosen.print_json:
        print(json.dumps(now))
        return 0
    lines = [
        f"Host time of a call in microseconds, {chosen.device}, torch {torch.__version__}: median and 10 % quantile of "
        f"{chosen.turns} turns of {CALLS} calls"
        + ("" if chosen.device == "cuda" else "; processor time of the calling thread")
        + (", medians of five processes of each checkout in turn." if before else "."),
        "",
        "| call | " + ("before | 10 % | " if before else "") + "now | 10 % | goal |",
        "|---|" + ("---|---|" if before else "") + "---|---|---|",
    ]
    for name, (median, low) in now.items():
        old = "{:.1f} | {:.1f} | ".format(*before[name]) if before else ""
        lines.append(f"| {name} | {old}{median:.1f} | {low:.1f} | {GOALS.get(name, '')} |")
    print("\n".join(lines))
    if chosen.output is not None:
        facts = {"device": chosen.device, "torch": str(torch.__version__), "goals": GOALS, "now": now, "before": before}
        for suffix, text in ((".json", json.dumps(facts, indent=1)), (".md", "\n".join(lines))):
            with replacing(chosen.output.with_suffix(suffix), remedy="name another file with -o") as temporary:
                temporary.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
