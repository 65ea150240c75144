"""Reading machine code: loops, ways through them, stall counts."""

import json
import shutil

import pytest

from benchmarks.compile_kernels import Kernel, Tools
from benchmarks.probes import PARTS, PROBES, Part, Probe
from benchmarks.sass import Cost, blocks_of, loops_of, parse, predicates_written, way_through
from benchmarks.static_cost import OUTPUT, markdown, measure


def sass(lines: str) -> str:
    """What ``cuobjdump -sass`` prints for lines of "address stall text"."""
    found = []
    for line in lines.strip().splitlines():
        address, stall, text = line.split(None, 2)
        high = int(stall) << 41
        found.append(f"        /*{address}*/                   {text} ;      /* 0x0000000000000000 */")
        found.append(f"                                                       /* 0x{high:016x} */")
    return "\n".join(found)


LOOP = sass("""
0000 1 MOV R1, c[0x0][0x28]
0010 4 ISETP.NE.AND P0, PT, R2, RZ, PT
0020 2 LDG.E.128 R4, desc[UR4][R2.64]
0030 5 @!P0 BRA 0x60
0040 8 MUFU.EX2 R5, R4
0050 2 FADD R6, R6, R5
0060 5 @P0 BRA 0x90
0070 9 FMUL R7, R7, R8
0080 9 FMUL R7, R7, R8
0090 4 HMMA.16816.F32.BF16 R12, R4, R8, R12
00a0 6 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4
00b0 5 @!P1 BRA 0xa0
00c0 5 @P2 BRA 0x10
00d0 5 EXIT
00e0 0 BRA 0xe0
""")  # fmt: skip


def test_loops_and_stall_counts() -> None:
    code = parse(LOOP)
    assert [i.stall for i in code[:5]] == [1, 4, 2, 5, 8]
    assert code[2].name == "LDG.E.128"
    assert code[2].bytes == 16
    blocks = blocks_of(code)
    loops = loops_of(blocks)
    assert [(loop.head, loop.depth, loop.has_inner) for loop in loops if len(loop.members) > 1 or loop.depth > 1] == [
        (0x10, 1, True), (0xA0, 2, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "instructions", "mufu"),
    # The two branches on P0 agree: with the exponential and without the products, or the other way round.
    [({}, 10, 1), ({r"MUFU": 1}, 10, 1), ({r"FMUL": 2}, 10, 0)],
)
def test_the_way_through_a_loop(needs: dict[str, int], instructions: int, mufu: int) -> None:
    blocks = blocks_of(parse(LOOP))
    loops = loops_of(blocks)
    cost = Cost.of(way_through(blocks, loops[0], loops, needs=needs))
    assert (cost.instructions, cost.mufu, cost.matrix, cost.loaded_bytes) == (instructions, mufu, 1, 16)


def test_a_way_avoids_what_another_case_of_the_kernel_does() -> None:
    blocks = blocks_of(parse(LOOP))
    loops = loops_of(blocks)
    assert Cost.of(way_through(blocks, loops[0], loops, needs={"FMUL": 2}, avoids="FMUL")).mufu == 1
    assert way_through(blocks, loops[0], loops, avoids="HMMA") == []


# Loads, then an inner loop that does A (three instructions) or B (two), then rare work, then stores.
NESTED = sass("""
0010 2 LDG.E.128 R4, desc[UR4][R2.64]
0020 5 @P0 BRA 0x60
0030 1 FMUL R5, R5, R6
0040 1 FMUL R5, R5, R6
0050 5 BRA 0x70
0060 9 MUFU.EX2 R5, R5
0070 5 @P1 BRA 0x20
0080 5 @P2 BRA 0xb0
0090 4 IMAD.HI R7, R7, R8, R9
00a0 4 IMAD.HI R7, R7, R8, R9
00b0 1 STG.E.128 desc[UR4][R2.64], R4
00c0 5 @P3 BRA 0x10
00d0 5 EXIT
""")  # fmt: skip


def test_inner_loops_count_as_often_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(name="nested", op="x", kernel="x", unit="row", units=lambda _: 2.0, total=1.0, needs={"STG": 1})
    kernel = Kernel(
        op="x", arch="90a", name="x", registers=8, shared_bytes=0, spill_bytes=0, threads=32, code=parse(NESTED)
    )
    parts = [
        Part(name="A", rounds=3, inner=True, needs={"FMUL": 2}),
        Part(name="B", rounds=0.5, inner=True, needs={"MUFU": 1}),
        Part(name="rare", rounds=0.25, needs={r"IMAD\.HI": 2}),
    ]
    monkeypatch.setitem(PARTS, "nested", parts)
    found = measure(probe, kernel)
    # Per round 4 around the inner loop, 3 times 5 for A, half of 3 for B, a quarter of 2; two units a round.
    assert found is not None
    assert found["instructions"] == (4 + 3 * 5 + 0.5 * 3 + 0.25 * 2) / 2
    assert (found["mufu"], found["global"]) == (0.25, 1.0)
    monkeypatch.setitem(PARTS, "nested", [Part(name="none", rounds=1, inner=True, needs={"HMMA": 1})])
    assert measure(probe, kernel) is None


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("ISETP.GT.AND P3, PT, R0, R53, P0", ["P3", "PT"]),
        ("IADD3 R54, P0, P3, R32, UR16, R28", ["P0", "P3"]),
        ("IADD3.X R55, R33, UR17, R22, P0, P3", []),
        ("@!P4 FSEL R33, R53.reuse, R52.reuse, P3", []),
        ("VOTE.ALL P1, P2", ["P1", "P2"]),
        ("BRA P1, 0x40", []),
    ],
)
def test_predicates_written(text: str, written: list[str]) -> None:
    assert predicates_written(parse(sass(f"0000 1 {text}"))[0]) == written


def test_report_lists_every_probe() -> None:
    report = json.loads(OUTPUT.with_suffix(".json").read_text())
    assert {loop["name"] for loop in report["loops"]} | set(report["missing"]) == {probe.name for probe in PROBES}
    assert not any(kernel["spill_bytes"] for kernel in report["kernels"])
    assert report["missing"] == []
    assert {goal["name"] for goal in report["goals"]} == {
        "dense InfoNCE", "dense NCE", "sampled InfoNCE", "render_views",
    }  # fmt: skip
    assert all(goal["met"] for goal in report["goals"])
    assert all(loop["mufu"] > 0 for loop in report["loops"])
    assert markdown(report) == OUTPUT.with_suffix(".md").read_text()
    assert report["times"]["sampled InfoNCE"]["copy"] == pytest.approx(1e3 * 256 * 32001 * 256 / 3e12, rel=1e-3)


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="nvcc was not found; put the CUDA toolkit's bin folder on PATH"):
        Tools.find()
