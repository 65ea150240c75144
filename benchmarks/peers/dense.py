"""The same negatives for the whole batch: the bank, or K rows of it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.gather import with_gradient
from sslfast.bench.peers import matmul_infonce

HEADS = 8
CHUNK = 8192  # bank rows


def matmul(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The plain form: one product, cross-entropy, autograd; ``[V B, N]`` scores exist (lemniscate's ``nce-k 0``)."""
    return with_gradient(matmul_infonce, query, bank, index, negatives, temperature)


def matmul_compiled(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same under ``torch.compile``: pointwise work and reductions fused, the products stay the library's."""
    return with_gradient(_compiled(), query, bank, index, negatives, temperature)


def chunked(
    query: Tensor, bank: Tensor, index: Tensor, negatives: None, *, temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Eager streaming: chunks of the bank, running log-sum-exp (Milakov & Gimelshein 2018), weighted rows rescaled.

    ``gradient = (softmax(s) M - m_0) / τ`` falls out of the same pass, and no ``[V B, N]`` tensor exists.
    """
    flat = query.reshape(-1, query.shape[-1])
    scaled = (flat / temperature).to(bank.dtype)
    maximum = flat.new_full((len(flat), 1), -torch.inf)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(flat)
    for part in bank.split(chunk):
        scores = (scaled @ part.T).to(flat.dtype)
        higher = torch.maximum(maximum, scores.amax(dim=1, keepdim=True))
        weights, factor = (scores - higher).exp_(), (maximum - higher).exp_()
        total = total * factor + weights.sum(dim=1, keepdim=True)
        weighted = weighted * factor + (weights.to(bank.dtype) @ part).to(flat.dtype)
        maximum = higher
    lse = (maximum + total.log()).reshape(query.shape[:-1])
    return _finish(query, bank, index, lse, (weighted / total).reshape(query.shape), temperature)


def split_attention(
    query: Tensor, bank: Tensor, index: Tensor, negatives: None, *, temperature: float, heads: int = HEADS
) -> tuple[Tensor, Tensor]:
    """Scaled-dot-product attention with the bank as keys and values: its output is ``softmax(s) M``.

    The bank is split into "heads" that the library processes in parallel, all with the same queries (flash-decoding);
    their outputs merge by their log-sum-exps. The public ``scaled_dot_product_attention`` returns no log-sum-exp, so
    this calls the kernels behind it: flash on the CPU and, for half types, on CUDA; memory-efficient for fp32 on CUDA.
    ``flex_attention(return_lse=True)`` would give it too, under torch.compile alone.
    """
    flat = query.reshape(-1, query.shape[-1]).to(bank.dtype)
    length = len(bank) // heads
    parts = [(flat, bank[: heads * length].unflatten(0, (heads, length)))] if length else []
    if heads * length < len(bank):
        parts.append((flat, bank[None, heads * length :]))  # the rest is a head of its own
    outputs, sums = zip(*(_attention(q, k, 1 / temperature) for q, k in parts), strict=True)
    lse_HQ, out_HQD = torch.cat(sums), torch.cat(outputs).to(query.dtype)
    lse = lse_HQ.to(query.dtype).logsumexp(0)
    merged = ((lse_HQ.to(query.dtype) - lse).exp()[..., None] * out_HQD).sum(0)
    return _finish(query, bank, index, lse.reshape(query.shape[:-1]), merged.reshape(query.shape), temperature)


def _attention(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(``[H, Q, D]``, log-sum-exp ``[H, Q]``) of queries ``[Q, D]`` against keys, also the values, ``[H, L, D]``."""
    query, keys = query[None, None].expand(1, len(keys), -1, -1), keys[None]
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out = aten._scaled_dot_product_flash_attention_for_cpu(query, keys, keys, 0.0, False, scale=scale)
    elif query.dtype in (torch.float16, torch.bfloat16):
        out = aten._scaled_dot_product_flash_attention(query, keys, keys, 0.0, False, False, scale=scale)
    else:
        out = aten._scaled_dot_product_efficient_attention(query, keys, keys, None, True, 0.0, False, scale=scale)
    return out[0][0], out[1][0, :, : query.shape[2]]  # efficient attention pads its log-sum-exp


def _finish(
    query: Tensor, bank: Tensor, index: Tensor, lse: Tensor, weighted: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient from the log-sum-exp and the softmax-weighted sum of rows."""
    positive = bank[index].to(query.dtype)
    loss = lse - (query * positive).sum(-1) / temperature
    return loss, (weighted - positive) / temperature


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(matmul_infonce, dynamic=False)
