"""InfoNCE between the embeddings of one batch in blocks: gradients flow to queries and keys, the score matrix is never
stored.

``sslfast.ops.bank_nce`` is for banks and queues, whose vectors take no gradient.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 21
"""Scores per block (8 MiB in fp32), rounded to whole rows, at least one."""


def info_nce(
    queries: Tensor, keys: Tensor, positives: Tensor, *, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """``loss_i = log sum_j exp(q_i . k_j / τ) - q_i . k_p(i) / τ``, sums in fp32 (van den Oord et al. 2018, eq. 4).

    Args:
        queries: ``[N, D]`` floating.
        keys: ``[M, D]`` floating.
        positives: ``[N]`` int64, the positive key of each query.
        temperature: τ > 0.
        excluded: ``[N]`` int64, key that is left out for a query, for example itself. None: no key is.

    Returns:
        ``[N]`` fp32 (fp64 for fp64) losses in nats, differentiable once in ``queries`` and ``keys``.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    lse = cast(Tensor, _LogSumExp.apply(queries, keys, excluded, 1 / temperature))
    return lse - (queries * keys[positives]).sum(dim=1) / temperature


class _LogSumExp(torch.autograd.Function):
    """``[N]``: ``log sum_j exp(scale q_i . k_j)``; blocks of scores are computed twice, forward and backward."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, excluded: Tensor | None, scale: float) -> Tensor:
        lse = queries.new_empty(len(queries))
        for rows, scores in _scores(queries, keys, excluded, scale):
            lse[rows] = scores.logsumexp(dim=1)
        ctx.save_for_backward(queries, keys, excluded, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, excluded, lse = ctx.saved_tensors
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        for rows, scores in _scores(queries, keys, excluded, ctx.scale):
            weights = scores.sub_(lse[rows, None]).exp_().mul_(gradient[rows, None] * ctx.scale)
            of_queries[rows] = weights @ keys
            of_keys.addmm_(weights.T, queries[rows])
        return of_queries, of_keys, None, None


def _scores(queries: Tensor, keys: Tensor, excluded: Tensor | None, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of queries, and their scores against all keys; without autocast, which would round them to bf16."""
    size = max(1, _BLOCK // max(1, len(keys)))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        with torch.autocast(queries.device.type, enabled=False):
            scores = (queries[rows] * scale) @ keys.T
        if excluded is not None:
            scores.scatter_(1, excluded[rows, None], -torch.inf)
        yield rows, scores
