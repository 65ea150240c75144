"""bank_update_ beside gather, blend, normalise and copy back in eager torch.

pytest benchmarks/bench_bank_update_.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from sslfast.bench import bank_update_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("impl", ["eager gather", "sslfast"])
@pytest.mark.parametrize("batch", [41, 256, 1024, 8192])
def test_bank_update(benchmark: Any, batch: int, impl: str) -> None:
    case = bank_update_case(DEVICE, batch=batch)
    case.check()
    benchmark.group = f"{case.op} {case.size}, {DEVICE}"

    def run() -> None:
        case.implementations[impl]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=50, warmup_rounds=5)
