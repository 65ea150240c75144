"""bank_nce, forward and backward, beside the eager gather form of the public memory-bank code.

    pytest benchmarks/bench_bank_nce.py --benchmark-enable

``extra_info``: peak memory beyond what the call started with, and bytes of the scored rows over the time.
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import bank_nce_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [
    pytest.param({}, id="B256-K4096-fp32"),
    pytest.param({"views": 2}, id="B256-K4096-V2-fp32"),
    pytest.param({"dtype": torch.bfloat16}, id="B256-K4096-bf16"),
    pytest.param({"batch": 41, "num_negatives": 1271, "dimensions": 123}, id="odd"),
]


@pytest.mark.parametrize("impl", ["eager gather", "sslfast"])
@pytest.mark.parametrize("size", SIZES)
def test_bank_nce(benchmark: Any, size: dict[str, Any], impl: str) -> None:
    time_case(benchmark, bank_nce_case(DEVICE, **size), impl, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bank_nce_binary(benchmark: Any, dtype: torch.dtype) -> None:
    time_case(benchmark, bank_nce_case(DEVICE, loss="nce", dtype=dtype), "sslfast", DEVICE)
