"""The few iterations of Sinkhorn behind SwAV's codes."""

import pytest
import torch
from torch import Tensor

from sslfast.methods.shared.sinkhorn import sinkhorn_codes


def scores(samples: int, prototypes: int) -> Tensor:
    return 2 * torch.rand(samples, prototypes, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1


def by_the_paper(s: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Q in the paper's form: K x B, rows to 1 / K, then columns to 1 / B."""
    q = (s / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize(("samples", "prototypes"), [(8, 3), (3, 8), (1, 4), (5, 5)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_the_paper(samples: int, prototypes: int, iterations: int) -> None:
    s = scores(samples, prototypes)
    codes = sinkhorn_codes(s, epsilon=0.05, iterations=iterations)
    torch.testing.assert_close(codes, by_the_paper(s, 0.05, iterations), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(samples, dtype=torch.float64))


def test_many_iterations_are_an_equal_partition() -> None:
    codes = sinkhorn_codes(scores(12, 4), epsilon=0.2, iterations=500)
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_samples_of_weight_0_take_no_part() -> None:
    s = scores(9, 4)
    weights = torch.tensor([1.0] * 6 + [0.0] * 3, dtype=torch.float64)
    codes = sinkhorn_codes(s, epsilon=0.05, iterations=3, weights=weights)
    torch.testing.assert_close(codes[:6], by_the_paper(s[:6], 0.05, 3), rtol=1e-11, atol=1e-14)
    assert not codes[6:].any()


def test_sharp_codes_do_not_overflow_and_a_nan_is_not_hidden() -> None:
    s = scores(6, 4).float()
    assert sinkhorn_codes(s, epsilon=1e-3, iterations=3).isfinite().all()
    s[2, 1] = torch.nan
    assert sinkhorn_codes(s, epsilon=0.05, iterations=3).isnan().any()
