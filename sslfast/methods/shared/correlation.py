"""Penalties on the D x D matrix of correlations between embedding dimensions, in blocks of its rows."""

from typing import Any, cast

import torch
from torch import Tensor

from sslfast.distributed import sum_over_ranks, world_size
from sslfast.models import first_derivative_only, full_precision

_BLOCK = 1 << 24  # elements of the matrix at a time: 64 MB


def correlation_penalty(
    first: Tensor, second: Tensor | None = None, *, count: int, off_diagonal: float, diagonal: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``diagonal * sum_i (c_ii - 1)² + off_diagonal * sum_(i != j) c_ij²`` of ``c = sum over ranks of firstᵀ second /
    count``, and the first sum by itself.

    The matrix and its gradient exist a block of rows at a time; the gradient of the embeddings is computed with the
    loss. Once gradients are averaged over ranks they are those of the loss of all ranks' rows together.

    Args:
        first: ``[B, D]`` of this rank, fp32 or fp64.
        second: ``[B, D]``; None: ``first``.
        count: divisor, of all ranks' rows.
        off_diagonal: weight of the squares off the diagonal.
        diagonal: weight of those on it.

    Returns:
        0-d loss, differentiable once, and 0-d ``sum_i (c_ii - 1)²``, detached.
    """
    name = "correlation_penalty"
    first = first_derivative_only(first, name)
    second = None if second is None else first_derivative_only(second, name)
    return cast(tuple[Tensor, Tensor], _Penalty.apply(first, second, count, off_diagonal, diagonal))


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor | None, count: int, off_diagonal: float, diagonal: float
    ) -> tuple[Tensor, Tensor]:
        other = first if second is None else second
        features = first.shape[1]
        of_first = torch.zeros_like(first)
        of_second = None if second is None else torch.zeros_like(second)
        loss, on = first.new_zeros(()), first.new_zeros(())
        rows, scale = max(1, _BLOCK // features), world_size() / count
        with full_precision(first.device):
            for start in range(0, features, rows):
                block = slice(start, min(start + rows, features))
                part = first[:, block]
                matrix = sum_over_ranks(part.T @ other) / count  # [rows, D]
                own = matrix.diagonal(offset=start)
                excess = own - 1
                own.zero_()
                on += excess.square().sum()
                loss += off_diagonal * torch.linalg.vector_norm(matrix).square()
                matrix.mul_(2 * off_diagonal)
                own.copy_(2 * diagonal * excess)
                of_first[:, block] = scale * (other @ matrix.T)
                if of_second is not None:
                    of_second.addmm_(part, matrix, alpha=scale)
        if of_second is None:  # the matrix is symmetric
            of_first *= 2
        ctx.save_for_backward(of_first, of_second)
        ctx.mark_non_differentiable(on)
        return loss + diagonal * on, on

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _on: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if own is None else own * gradient for own in ctx.saved_tensors), None, None, None)
