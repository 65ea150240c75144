"""bank_update_ beside gather, blend, normalise and copy back in eager torch.

pytest benchmarks/bench_bank_update_.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import bank_update_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("impl", ["eager gather", "sslfast"])
@pytest.mark.parametrize("batch", [41, 256, 1024, 8192])
def test_bank_update(benchmark: Any, batch: int, impl: str) -> None:
    time_case(benchmark, bank_update_case(DEVICE, batch=batch), impl, DEVICE, rounds=50)
