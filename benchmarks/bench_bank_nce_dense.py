"""bank_nce_dense, forward and backward, beside the plain form with a [B, N] matrix of scores.

    pytest benchmarks/bench_bank_nce_dense.py --benchmark-enable

``extra_info``: peak memory beyond what the call started with, and bytes of the rows over the time. More peers and the
crossover with sampled negatives: ``benchmarks/studies/crossover.py``.
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import bank_nce_dense_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [
    pytest.param({}, id="B256-N100000-fp32"),
    pytest.param({"dtype": torch.bfloat16}, id="B256-N100000-bf16"),
    pytest.param({"batch": 16}, id="B16-N100000-fp32"),
    pytest.param({"num_negatives": 4096}, id="B256-K4096-fp32"),
    pytest.param({"batch": 41, "num_rows": 9001, "dimensions": 123}, id="odd"),
]


@pytest.mark.parametrize("impl", ["eager [B, N] scores", "sslfast"])
@pytest.mark.parametrize("size", SIZES)
def test_bank_nce_dense(benchmark: Any, size: dict[str, Any], impl: str) -> None:
    time_case(benchmark, bank_nce_dense_case(DEVICE, **size), impl, DEVICE, rounds=7)
