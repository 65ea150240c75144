"""bank_enqueue_ beside MoCo's slice assignment, which reads the head on the host.

pytest benchmarks/bench_bank_enqueue_.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import bank_enqueue_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("impl", ["eager slice", "sslfast"])
@pytest.mark.parametrize("batch", [64, 256, 1024, 8192])
def test_bank_enqueue(benchmark: Any, batch: int, impl: str) -> None:
    time_case(benchmark, bank_enqueue_case(DEVICE, batch=batch), impl, DEVICE, rounds=50)
