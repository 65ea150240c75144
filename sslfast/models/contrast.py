"""InfoNCE between the embeddings of one batch in blocks: gradients flow to queries and keys, the score matrix is never
stored.

``sslfast.ops.bank_nce`` is for banks and queues, whose vectors take no gradient.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_COLDEST, _HOTTEST = 1e-30, 1e30
"""Temperatures: beyond, scores of unit vectors leave fp32."""
_BLOCK = 1 << 21
"""Scores per block (8 MiB in fp32), rounded to whole rows, at least one."""


def info_nce(
    queries: Tensor, keys: Tensor, positives: Tensor, *, temperature: float | Tensor, excluded: Tensor | None = None
) -> Tensor:
    """``loss_i = log sum_j exp(q_i . k_j / τ) - q_i . k_p(i) / τ``, sums in fp32 (van den Oord et al. 2018, eq. 4).

    Second derivatives and forward-mode derivatives are computed with the score matrix stored.

    Args:
        queries: ``[N, D]`` floating.
        keys: ``[M, D]`` floating.
        positives: ``[N]`` int64, the positive key of each query.
        temperature: τ in [1e-30, 1e30]; or a 0-d floating tensor, through which a gradient flows.
        excluded: ``[N]`` int64, key that is left out for a query, for example itself. None: no key is.

    Returns:
        ``[N]`` fp32 (fp64 for fp64) losses in nats, differentiable in ``queries`` and ``keys``.

    Raises:
        ValueError: temperature, a shape, dtype or device; fewer than 2 keys that a query is compared with where a
            gradient is asked for, since the loss is then 0 whatever the embeddings.
    """
    _check(queries, keys, positives, excluded, temperature)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    if isinstance(temperature, Tensor):  # a learned one: its gradient is that of the scaled queries
        queries, temperature = queries / temperature, 1.0
    if _is_transformed(queries, keys):
        lse = _log_sum_exp(queries, keys, excluded, 1 / temperature)
    else:
        lse = cast(Tensor, _LogSumExp.apply(queries, keys, excluded, 1 / temperature))
    return lse - (queries * keys[positives]).sum(dim=1) / temperature


def _check(
    queries: Tensor, keys: Tensor, positives: Tensor, excluded: Tensor | None, temperature: float | Tensor
) -> None:
    if isinstance(temperature, Tensor):  # without a host sync
        in_range = (temperature >= _COLDEST) & (temperature <= _HOTTEST)
        torch._assert_async(in_range, f"info_nce: temperature must be in [{_COLDEST:g}, {_HOTTEST:g}]")
    elif not _COLDEST <= temperature <= _HOTTEST:
        raise ValueError(f"info_nce: temperature must be in [{_COLDEST:g}, {_HOTTEST:g}], got {temperature=}")
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or 0 in (*queries.shape, *keys.shape):
        raise ValueError(
            "info_nce: queries and keys must be [N, D] and [M, D], none of them 0, "
            f"got {list(queries.shape)} and {list(keys.shape)}"
        )
    if not (queries.is_floating_point() and keys.is_floating_point()):
        raise ValueError(f"info_nce: queries and keys must be floating, got {queries.dtype} and {keys.dtype}")
    for name, rows in (("positives", positives), ("excluded", excluded)):
        if rows is not None and (rows.shape != queries.shape[:1] or rows.dtype != torch.int64):
            raise ValueError(
                f"info_nce: {name} must be int64 [{len(queries)}], one a query, got {rows.dtype} {list(rows.shape)}"
            )
    for name, tensor in (("keys", keys), ("positives", positives), ("excluded", excluded)):
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(
                f"info_nce: {name} is on {tensor.device} and queries on {queries.device}; move one with .to(device)"
            )
    compared = len(keys) if excluded is None else len(keys) - 1
    if compared < 2 and torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        raise ValueError(
            f"info_nce: a query is compared with {compared} key, so the loss is 0 whatever the embeddings; "
            "give at least 2 samples"
        )


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether a forward-mode derivative is asked for, or ``torch.func`` transforms the call."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which the ``meta`` device of memory estimates does not have."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _log_sum_exp(queries: Tensor, keys: Tensor, excluded: Tensor | None, scale: float) -> Tensor:
    """``[N]``: ``log sum_j exp(scale q_i . k_j)`` in plain torch, differentiable in every way, ``[N, M]`` stored."""
    with full_precision(queries.device):
        scores = (queries * scale) @ keys.T
    if excluded is not None:
        scores = scores.scatter(1, excluded[:, None], -torch.inf)
    return scores.logsumexp(dim=1)


class _LogSumExp(torch.autograd.Function):
    """:func:`_log_sum_exp` in blocks of scores, which are computed twice, forward and backward."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, excluded: Tensor | None, scale: float) -> Tensor:
        lse = queries.new_empty(len(queries))
        for rows, scores in _scores(queries, keys, excluded, scale):
            lse[rows] = scores.logsumexp(dim=1)
        ctx.save_for_backward(queries, keys, excluded, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, excluded, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the derivative is differentiated in its turn
            lse = _log_sum_exp(queries, keys, excluded, ctx.scale)
            wanted = [x for x, needed in zip((queries, keys), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(lse, wanted, gradient, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None)
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        with full_precision(queries.device):
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
        with full_precision(queries.device):
            scores = (queries[rows] * scale) @ keys.T
        if excluded is not None:
            scores.scatter_(1, excluded[rows, None], -torch.inf)
        yield rows, scores
