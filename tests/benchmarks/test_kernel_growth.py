"""Hot loops of the kernels with a goal, compiled for 9.0a, may not get longer unnoticed, nor touch registers too early.

Left out, with a line, where nvcc is missing (tests/conftest.py).
"""

import json
from pathlib import Path

import pytest

from benchmarks.compile_kernels import Tools, compile_named
from benchmarks.hazards import early_accesses
from benchmarks.probes import PROBES
from benchmarks.static_cost import OUTPUT, Machine, analyse

GROWTH = 1.05
"""Counts may grow by this without a new report: compilers of other versions differ by a few percent."""


@pytest.mark.parametrize("op", sorted({probe.op for probe in PROBES}))
def test_hot_loops_have_not_grown(op: str, tmp_path: Path) -> None:
    before = {
        loop["name"]: loop
        for loop in json.loads(OUTPUT.with_suffix(".json").read_text())["loops"]
        if next(probe.op for probe in PROBES if probe.name == loop["name"]) == op
    }
    assert before
    names = sorted({loop["kernel"] for loop in before.values()})
    kernels = compile_named(Tools.find(), op, "90a", names, tmp_path)
    assert [kernel.spill_bytes for kernel in kernels] == [0] * len(names)
    assert [access for kernel in kernels for access in early_accesses(kernel.code)] == []
    report = analyse(kernels, Machine())
    now = {loop["name"]: loop for loop in report["loops"]}
    assert [goal["name"] for goal in report["goals"] if not goal["met"]] == []
    remedy = "if it is meant, run `python -m benchmarks.static_cost` and commit its report"
    for name, loop in before.items():
        for key in ("instructions", "stall_cycles", "mufu"):
            assert now[name][key] <= GROWTH * loop[key] + 2, f"{name}: {key} has grown; {remedy}"
