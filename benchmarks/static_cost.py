"""What every CUDA kernel costs by its machine code, and the time that follows for the goal's sizes; needs no GPU.

    python -m benchmarks.static_cost [-o benchmarks/results/kernels_cuda_202611] [--arch 80 90a 100] [--op bank_nce]

Run it again after a change of csrc/cuda and commit both files: the test tests/benchmarks/test_static_cost.py holds new
code against the counts in OUT.json. Needs nvcc and cuobjdump (benchmarks/compile_kernels.py).

Compiles csrc/cuda, reads the SASS with its stall counts (benchmarks/sass.py), finds the hot loop of each kernel by its
structure, and writes OUT.json and OUT.md (with ``--op``, the rows of other ops stay as OUT.json has them):

- *hot loops*: per tile, rows or pixels of a warp, what one round of the loop issues on its cheapest full way (rare
  work left out), with its inner loops as often as ``PARTS`` in benchmarks/probes.py says, beside the goals;
- *computed times*: each resource alone for B = 256, V = 2, K = 32,000, N = 1,281,167, D = 128 and a bf16 bank. The
  first number assumes that everything overlaps and is a lower bound; the second that a warp's arithmetic overlaps with
  nothing else. Launches, partial waves and merging of parts are left out;
- *resources* of every kernel: registers, static shared memory, spills, blocks that fit a multiprocessor, hot loop.

Exit code 1 if a kernel spills, or a hot loop of ``PROBES`` there is not found.
"""

import argparse
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.compile_kernels import ARCHITECTURES, ROOT, Kernel, Tools, compile_kernels, compile_named, ops
from benchmarks.probes import BATCH, COLUMNS, NEGATIVES, PARTS, PROBES, ROWS, SIDE, VIEWS, Part, Probe, goals
from benchmarks.sass import MATRIX, Block, Cost, Instruction, Loop, blocks_of, loops_of, way_through

OUTPUT = ROOT / "benchmarks" / "results" / "kernels_cuda_202611"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPU that times are computed for: an H100 SXM, with rates that a copy and a matrix product reach."""

    multiprocessors: int = 132
    clock: float = 1.755e9
    """Hz."""
    copy: float = 3.0e12
    """Bytes/s, read and written."""
    matrix: float = 800e12
    """FLOP/s, bf16."""
    mufu: int = 16
    """Lanes a cycle and multiprocessor."""
    schedulers: int = 4


def hot_loop(code: list[Instruction]) -> tuple[str, Cost]:
    """The longest innermost loop of any kernel, "no loop" and the whole code where it has none."""
    blocks = blocks_of(code)
    loops = loops_of(blocks)
    inner = [loop for loop in loops if not loop.has_inner and len(loop.code(blocks)) > 4]
    if not inner:
        return "no loop", Cost.of(code)
    longest = max(inner, key=lambda loop: len(loop.code(blocks)))
    return "loop", Cost.of(way_through(blocks, longest, loops))


def measure(probe: Probe, kernel: Kernel) -> dict[str, float] | None:
    """What a unit of a probe's loop costs a warp, with its ``PARTS``; None where the kernel has no such loop."""
    blocks = blocks_of(kernel.code)
    loops = loops_of(blocks)
    found = []
    for loop in loops:
        if not set(probe.has) <= {i.family for i in loop.code(blocks)}:
            continue
        way = way_through(blocks, loop, loops, needs=probe.needs, avoids=probe.avoids)
        if not _does(way, probe.needs):
            continue
        units = probe.units(Cost.of(way))
        values = _with_parts(PARTS.get(probe.name, []), probe, way, blocks, loop, loops)
        if units and values is not None:
            found.append({key: value / units for key, value in values.items()})
    return min(found, key=lambda values: values["instructions"], default=None)


def _does(way: list[Instruction], needs: dict[str, int]) -> bool:
    return bool(way) and all(
        sum(bool(re.search(pattern, i.text)) for i in way) >= most for pattern, most in needs.items()
    )


def _with_parts(
    parts: list[Part],
    probe: Probe,
    way: list[Instruction],
    blocks: dict[int, Block],
    loop: Loop,
    loops: list[Loop],
) -> dict[str, float] | None:
    """Counts of one round; None where a part is not in the loop."""
    inside = [other for other in loops if _holds(loop, other)]
    followed = inside if any(part.inner for part in parts) else []
    skipped = {i.address for other in followed for i in other.code(blocks)}

    def counts(some: list[Instruction]) -> dict[str, int]:
        return Cost.of([i for i in some if i.address not in skipped]).counts()

    plain = counts(way)
    values: dict[str, float] = dict(plain)
    for part in parts:
        found: dict[str, int] | None = None
        if part.inner:
            ways = [way_through(blocks, other, loops, needs=part.needs, avoids=part.avoids) for other in inside]
            found = next((Cost.of(other).counts() for other in ways if _does(other, part.needs)), None)
        else:
            needs = {**probe.needs, **part.needs}
            whole = way_through(blocks, loop, loops, needs=needs, avoids=part.avoids or probe.avoids)
            if _does(whole, needs):
                found = {key: value - plain[key] for key, value in counts(whole).items()}
        if found is None:
            return None
        for key, value in found.items():
            values[key] += part.rounds * value
    return values


def _holds(outer: Loop, inner: Loop) -> bool:
    return inner.members < outer.members


def blocks_a_multiprocessor(kernel: Kernel) -> int | None:
    """By threads, registers and static shared memory; None where the block's size is not in the code."""
    if kernel.threads is None:
        return None
    warps = -(-kernel.threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256 * warps
    kibibytes = {"80": 164, "90a": 228, "90": 228, "100": 228}.get(kernel.arch, 100)
    return min(64 // warps, 65536 // registers, kibibytes * 1024 // (kernel.shared_bytes + 1024), 32)


def times(machine: Machine, probe: Probe, values: dict[str, float], kernel: Kernel) -> dict[str, Any]:
    """Milliseconds that each resource alone takes for the loop, and both bounds of all of them."""
    chip = machine.multiprocessors * machine.clock
    warps = (blocks_a_multiprocessor(kernel) or 1) * (probe.warps or (kernel.threads or 256) // 32)
    parts = {
        "issue": values["instructions"] * probe.total / (machine.schedulers * chip),
        "stalls": values["stall_cycles"] * probe.total / (max(warps, machine.schedulers) * chip),
        "exponentials": values["mufu"] * 32 * probe.total / (machine.mufu * chip),
        "copy": probe.floor_bytes / machine.copy,
        "matrix": probe.flops / machine.matrix,
    }
    milliseconds = {name: 1e3 * seconds for name, seconds in parts.items()}
    floor = max(milliseconds["copy"], milliseconds["matrix"])
    computed = max(milliseconds.values())
    apart = max(milliseconds["issue"], milliseconds["stalls"]) + max(floor, milliseconds["exponentials"])
    return {
        **{name: round(value, 4) for name, value in milliseconds.items()},
        "floor_ms": round(floor, 4),
        "computed_ms": round(computed, 4),
        "without_overlap_ms": round(apart, 4),
        "binds": max(milliseconds, key=lambda name: milliseconds[name]),
    }


def analyse(kernels: list[Kernel], machine: Machine) -> dict[str, Any]:
    """Hot loops of the probes, goals, computed times; ``missing`` names the probes whose loop was not found."""
    loops: list[dict[str, Any]] = []
    measured: dict[str, tuple[Probe, dict[str, float], Kernel]] = {}
    missing = []
    for probe in PROBES:
        found = [
            (values, kernel)
            for kernel in kernels
            if kernel.op == probe.op and kernel.arch == "90a" and re.search(probe.kernel, kernel.name)
            for values in [measure(probe, kernel)]
            if values is not None
        ]
        if not found:
            missing.append(probe.name)
            continue
        values, kernel = min(found, key=lambda pair: pair[0]["instructions"])
        measured[probe.name] = (probe, values, kernel)
        loops.append({
            "name": probe.name, "kernel": kernel.name, "unit": probe.unit,
            **{key: round(value, 1) for key, value in values.items()},
            "registers": kernel.registers, "spill_bytes": kernel.spill_bytes,
            "blocks": blocks_a_multiprocessor(kernel),
        })  # fmt: skip
    totals = {name: values for name, (_, values, _) in measured.items()}
    return {
        "loops": loops,
        "units": {name: {key: round(value, 1) for key, value in total.items()} for name, total in totals.items()},
        "times": {name: times(machine, *entry) for name, entry in measured.items()},
        "goals": [
            {
                **asdict(goal),
                "instructions": round(goal.instructions, 1),
                "counted": round(counted, 1),
                "counted_stalls": round(stalls, 1),
                "met": counted <= goal.instructions and (goal.stall_cycles is None or stalls <= goal.stall_cycles),
            }
            for goal in goals(totals.get("dense InfoNCE"))
            for counted in [goal.counted(totals, "instructions")]
            for stalls in [goal.counted(totals, "stall_cycles")]
            if counted is not None and stalls is not None
        ],
        "parts": {name: [asdict(part) for part in parts] for name, parts in PARTS.items()},
        "missing": missing,
    }


def describe(kernel: Kernel) -> dict[str, Any]:
    """A row of the table of resources."""
    kind, cost = hot_loop(kernel.code)
    everything = Cost.of(kernel.code)
    return {
        "op": kernel.op, "arch": kernel.arch, "kernel": kernel.name, "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes, "spill_bytes": kernel.spill_bytes, "threads": kernel.threads,
        "blocks": blocks_a_multiprocessor(kernel), "hot": kind, **cost.counts(),
        "matrix_instructions": {name: everything.families[name] for name in MATRIX if name in everything.families},
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    machine = report["machine"]
    lines = [
        "# What the CUDA kernels cost, by their machine code",
        "",
        f"`python -m benchmarks.static_cost`, nvcc {report['nvcc']}, headers of torch {report['torch']}. "
        "**Computed, not measured.**",
    ]
    if report["units"]:
        lines += [
            "",
            "## Hot loops, 9.0a",
            "",
            "What a warp issues for a unit of work on the cheapest full way through the loop: a tile of 64 x 128 "
            "scores (shared by four warps), 8 bank rows scored for two views, a pixel in every lane (four pixels in a "
            "round). Stall cycles: least time of a lone warp. Included is, for each round:",
            "",
            *(
                f"- {name}: " + ", ".join(f"{part['name']} {part['rounds']:g} times" for part in parts) + ";"
                for name, parts in report["parts"].items()
            ),
            "",
            "`render_views` with all four jitters and without the photometric set and blur: a pass for the mean that "
            "contrast needs (the jitters before contrast, averaged over all orders), then the pass that writes.",
            "",
            *_table(
                ["loop", "unit", "instructions", "stall cycles", "MUFU", "matrix", "shared", "global", "registers",
                 "spill bytes", "blocks an SM"],
                [[row["name"], row["unit"], row["instructions"], row["stall_cycles"], row["mufu"], row["matrix"],
                  row["shared"], row["global"], row["registers"], row["spill_bytes"], row["blocks"]]
                 for row in report["loops"]],
            ),
            "",
            "| goal | instructions | counted | stall cycles | counted | |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for goal in report["goals"]:
            limit = "–" if goal["stall_cycles"] is None else f"{goal['stall_cycles']:,.0f}"
            lines.append(
                f"| {goal['name']} | {goal['instructions']:,.0f} | {goal['counted']:,.0f} | {limit} | "
                f"{goal['counted_stalls']:,.0f} | {'met' if goal['met'] else 'not met'} |"
            )
        lines += [
            "",
            f"## Computed times: B = {BATCH}, V = {VIEWS}, K = {NEGATIVES:,}, N = {ROWS:,}, D = {COLUMNS}, bf16; "
            f"B V pictures of {SIDE} x {SIDE}",
            "",
            f"For {machine['multiprocessors']} multiprocessors at {machine['clock'] / 1e9:.3f} GHz, a copy of "
            f"{machine['copy'] / 1e12:.1f} TB/s and bf16 products at {machine['matrix'] / 1e12:.0f} TFLOP/s (H100 "
            "SXM). Milliseconds. Floor: bytes that must move, or products. \"All overlaps\" is a lower bound; "
            "\"nothing overlaps\" adds a warp's arithmetic to the floor. Launches, partial waves and the merging of "
            "parts are not in it.",
            "",
            *_table(
                ["kernel", "copy", "products", "exponentials", "issue", "stalls", "floor", "all overlaps",
                 "nothing overlaps", "binds"],
                [[name, row["copy"], row["matrix"], row["exponentials"], row["issue"], row["stalls"],
                  row["floor_ms"], row["computed_ms"], row["without_overlap_ms"], row["binds"]]
                 for name, row in report["times"].items()],
            ),
        ]  # fmt: skip
    if report["missing"]:
        lines += ["", "Loops not found: " + ", ".join(report["missing"]) + "."]
    lines += [
        "",
        "## Resources of every kernel",
        "",
        "Registers of a thread; static shared memory (tiles of the dense kernels are dynamic); spilled bytes; threads "
        "of a block where the kernel bounds them, and blocks that then fit a multiprocessor by threads, registers and "
        "static shared memory. Of the longest innermost loop, or of the whole kernel where it has none: instructions "
        "of one round, stall cycles, MUFU, matrix instructions, shared and global accesses.",
        "",
        *_table(
            ["op", "arch", "kernel", "registers", "shared", "spills", "threads", "blocks", "hot", "instructions",
             "stalls", "MUFU", "matrix", "shared acc.", "global acc."],
            [[row["op"], row["arch"], f"`{row['kernel']}`", row["registers"], row["shared_bytes"], row["spill_bytes"],
              row["threads"], row["blocks"], row["hot"], row["instructions"], row["stall_cycles"], row["mufu"],
              row["matrix"], row["shared"], row["global"]]
             for row in report["kernels"]],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [
        ["–" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def main(argv: list[str] | None = None) -> int:
    """Compile, read, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help="without suffix")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--op", nargs="+", default=ops(), choices=ops())
    chosen = parser.parse_args(argv)
    tools, machine = Tools.find(), Machine()
    every, file = set(chosen.op) == set(ops()), chosen.output.with_suffix(".json")
    before = {} if every else json.loads(file.read_text()) if file.exists() else {}
    kept = [row for row in before.get("kernels", []) if row["op"] not in chosen.op]
    kernels: list[Kernel] = []
    probed: list[Kernel] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for op in chosen.op:
            for arch in chosen.arch:
                kernels += compile_kernels(tools, op, arch, folder)
                print(f"{op} {arch}: {len(kernels)} kernels so far", flush=True)
        for op in {row["op"] for row in kept}:
            names = {loop["kernel"] for loop in before["loops"] if _op_of(loop["name"]) == op}
            probed += compile_named(tools, op, "90a", sorted(names), folder) if names else []
    rows = sorted([*kept, *map(describe, kernels)], key=lambda row: (row["op"], ARCHITECTURES.index(row["arch"])))
    report = {
        "nvcc": tools.version(),
        "torch": torch.__version__,
        "machine": asdict(machine),
        **analyse([*kernels, *probed], machine),
        "kernels": rows,
    }
    if "90a" not in chosen.arch:
        report["missing"] = []
    report["missing"] = [name for name in report["missing"] if _op_of(name) in {row["op"] for row in rows}]
    file.write_text(json.dumps(report, indent=1) + "\n")
    chosen.output.with_suffix(".md").write_text(markdown(report))
    for goal in report["goals"]:
        print(f"{goal['name']}: {goal['counted']:g} instructions, {'met' if goal['met'] else 'not met'}")
    spilled = sorted({f"{row['kernel']} ({row['arch']})" for row in rows if row["spill_bytes"]})
    if spilled:
        print("sslfast: registers spill in " + ", ".join(spilled), file=sys.stderr)
    if report["missing"]:
        print("sslfast: no hot loop found of " + ", ".join(report["missing"]), file=sys.stderr)
    return 1 if spilled or report["missing"] else 0


def _op_of(name: str) -> str:
    return next(probe.op for probe in PROBES if probe.name == name)


if __name__ == "__main__":
    sys.exit(main())
