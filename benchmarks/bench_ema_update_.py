"""ema_update_ beside torch._foreach_lerp_ and the loop over parameters, on ResNet-50's parameters.

pytest benchmarks/bench_ema_update_.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from sslfast.bench.ops import ema_update_case, time_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (dtype, impl)
    for dtype in (torch.float32, torch.bfloat16)
    for impl in ("eager loop", "_foreach_lerp_", "sslfast")
    if (dtype, impl) != (torch.bfloat16, "_foreach_lerp_")  # it takes lists of one dtype
]


@pytest.mark.parametrize(("source_dtype", "impl"), CASES)
def test_ema_update(benchmark: Any, source_dtype: torch.dtype, impl: str) -> None:
    time_case(benchmark, ema_update_case(DEVICE, source_dtype=source_dtype), impl, DEVICE, rounds=50)
