"""Finding the first tensor that is not finite."""

import pytest
import torch

from sslfast.models.finite import are_finite, first_nonfinite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (257,), (3, 5, 7, 2)])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    good = torch.ones(shape).to(dtype)
    values = (torch.nan,) if dtype == torch.float8_e4m3fn else (torch.nan, torch.inf, -torch.inf)
    for value in values:
        for place in {0, good.numel() // 2, good.numel() - 1}:
            bad = torch.ones(good.numel())
            bad[place] = value
            pairs = [("a", good), ("b", bad.view(shape).to(dtype)), ("c", bad.view(shape).to(dtype))]
            assert first_nonfinite(pairs) == "b"


def test_largest_values_integers_and_empty_tensors_are_finite() -> None:
    tensors = [torch.full((9,), torch.finfo(torch.float32).max), torch.arange(3), torch.zeros(0, 4), torch.zeros(3) > 0]
    tensors += [torch.full((5, 4), 3e38)[:, ::2], torch.eye(3).to_sparse()]
    assert are_finite(tensors).tolist() == [True] * 6
    assert first_nonfinite([]) is None
