"""The penalty on correlations against the formula in float64, in blocks of any size."""

import pytest
import torch
from torch import Tensor

from sslfast.methods.shared import correlation
from sslfast.methods.shared.correlation import correlation_penalty


def naive(first: Tensor, second: Tensor, *, count: int, off_diagonal: float, diagonal: float) -> Tensor:
    matrix = first.T @ second / count
    eye = torch.eye(len(matrix), dtype=torch.bool)
    return diagonal * (matrix[eye] - 1).square().sum() + off_diagonal * matrix[~eye].square().sum()


@pytest.mark.parametrize("block", [1, 14, 15, 1 << 24])  # 1, 2 and 3 rows of 5 or 7, and all
@pytest.mark.parametrize("features", [2, 5, 7])
@pytest.mark.parametrize("paired", [True, False])
def test_equals_the_formula(paired: bool, features: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "_BLOCK", block)
    generator = torch.Generator().manual_seed(features)
    first, second = torch.randn(2, 6, features, generator=generator, dtype=torch.float64).unbind()
    leaves = [first.requires_grad_(), second.requires_grad_()][: 1 + paired]
    options = {"count": 4, "off_diagonal": 0.3, "diagonal": 1.7 if paired else 0.0}
    loss, on = correlation_penalty(first, second if paired else None, **options)  # type: ignore[arg-type]
    expected = naive(first, second if paired else first, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    other = second if paired else first
    torch.testing.assert_close(on, ((first * other).sum(0) / 4 - 1).square().sum().detach(), rtol=1e-12, atol=0)
    assert not on.requires_grad
    for own, wanted in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-13)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    loss, _ = correlation_penalty(x, count=4, off_diagonal=1.0)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="correlation_penalty: only first derivatives"):
        gradient.sum().backward()


def test_no_matrix_survives() -> None:
    """What autograd keeps are the gradients of the embeddings, not D x D numbers."""
    kept: list[Tensor] = []
    x, y = torch.randn(2, 3, 50, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        correlation_penalty(x, y, count=3, off_diagonal=1.0, diagonal=1.0)
    assert {tuple(t.shape) for t in kept} == {(3, 50)}


def test_a_nan_is_not_hidden() -> None:
    x = torch.randn(4, 3)
    x[1, 1] = torch.nan
    assert correlation_penalty(x, count=4, off_diagonal=1.0)[0].isnan()
