"""Scoring against a bank whose rows are split over ranks: queries are gathered, sums are scattered back.

Every rank scores the queries of all ranks against its own rows (``bank_nce(shard=...)``). Rank r has log-sum-exp
``e_r``, loss part ``l_r`` and that part's gradient ``g_r``; rank p holds the positive, ``m_0`` with score ``s_0``:

    lse = log(sum_r exp(e_r))
    InfoNCE: loss = lse - s_0, s_0 = e_p - l_p
             grad = sum_r w_r g_r - (1 - w_p) m_0 / τ, w_r = exp(e_r - lse): no softmax weight scales -m_0 / τ
    NCE:     loss = sum_r l_r
             grad = sum_r g_r

Queries and indices are gathered, maxima and sums of exponentials ``[V, R B]`` reduced over ranks, loss and gradient
(``D + 1`` numbers a query) summed on the rank that the query came from. All of it happens in the forward pass.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from sslfast.distributed import gather_rows, max_over_ranks, rank, reduce_scatter_rows, sum_over_ranks
from sslfast.ops import bank_nce


@torch.compiler.disable  # graph break: collectives, and a derivative inside the forward pass
def score_over_shards(
    query: Tensor,
    vectors: Tensor,
    index: Tensor,
    *,
    shard: tuple[int, int],
    loss: Literal["infonce", "nce"],
    temperature: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The result of :func:`sslfast.ops.bank_nce` for this rank's queries against the bank of all ranks.

    Args:
        query: ``[V, B, D]`` floating, B the same on every rank; differentiable, computed in fp32 (fp64 for fp64
        vectors).
        vectors: ``[n, D]``, this rank's shard.
        index: ``[B]`` int64, rows of the whole bank.
        shard: (first row of this shard, rows of the whole bank).
        loss, temperature, options: of ``bank_nce``; NCE needs ``z``.

    Returns:
        ``(losses, log-sum-exps)``, each ``[V, B]``; the latter detached. :meth:`MemoryBank.score` guards against
        second derivatives.

    Raises:
        ValueError, RuntimeError: as ``bank_nce`` does.
    """
    query = query if vectors.dtype == torch.float64 else query.float()
    options |= {"shard": shard, "loss": loss, "temperature": temperature}
    return cast(tuple[Tensor, Tensor], _ScoreOverShards.apply(query, vectors, index, options))


class _ScoreOverShards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, vectors: Tensor, index: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        batch, infonce = query.shape[1], options["loss"] == "infonce"
        index = gather_rows(index)  # [R B]
        gathered = gather_rows(query.detach().transpose(0, 1)).transpose(0, 1)  # [V, R B, D]
        local = index - options["shard"][0]
        here = (local >= 0) & (local < len(vectors))

        with torch.enable_grad():
            gathered.requires_grad_(ctx.needs_input_grad[0])
            part, part_lse = cast(
                tuple[Tensor, Tensor], bank_nce(gathered, vectors, index, **options, return_lse=True)
            )  # [V, R B]
            grad = torch.autograd.grad(part.sum(), gathered)[0] if gathered.requires_grad else None

        highest = max_over_ranks(part_lse)  # finite: one rank holds the positive
        lse = highest + sum_over_ranks((part_lse - highest).exp()).log()
        scalar = torch.where(here, part_lse - part.detach(), 0.0) if infonce else part.detach()
        columns = [scalar[..., None]]
        if grad is not None:
            if infonce:
                weight = (part_lse - lse).exp()
                positive = vectors[local.clamp(0, len(vectors) - 1)].to(grad.dtype) / options["temperature"]
                other = torch.where(here, 1 - weight, 0.0)
                grad = weight[..., None] * grad - other[..., None] * positive
            columns.append(grad)
        summed = reduce_scatter_rows(torch.cat(columns, dim=-1).transpose(0, 1)).transpose(0, 1)  # [V, B, 1 + D]

        first = rank() * batch
        lse = lse[:, first : first + batch].clone()
        losses = lse - summed[..., 0] if infonce else summed[..., 0].clone()
        ctx.mark_non_differentiable(lse)
        if grad is not None:
            ctx.save_for_backward(summed[..., 1:])
        return losses, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return gradients[0][..., None] * grad, None, None, None
