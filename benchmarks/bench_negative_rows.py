"""negative_rows beside torch.randint, which draws the same amount but cannot exclude the sample or be replayed.

pytest benchmarks/bench_negative_rows.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import negative_rows_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("impl", ["eager randint", "sslfast"])
@pytest.mark.parametrize(("batch", "num_negatives"), [(41, 1271), (256, 4096), (256, 32000)])
def test_negative_rows(benchmark: Any, batch: int, num_negatives: int, impl: str) -> None:
    time_case(benchmark, negative_rows_case(DEVICE, batch=batch, num_negatives=num_negatives), impl, DEVICE, rounds=15)
