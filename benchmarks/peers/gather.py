"""Own negatives for every sample: gather ``[B, K + 1, D]``, product, cross-entropy, autograd."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sslfast.bench.peers import gather_infonce


def gather_eager(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The form of lemniscate, VISSL and PyContrast, all views in one product: the gathered tensor exists once."""
    return with_gradient(gather_infonce, query, bank, index, negatives, temperature)


def gather_compiled(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same under ``torch.compile``, which may fuse the gather into the product."""
    return with_gradient(_compiled(), query, bank, index, negatives, temperature)


def with_gradient(
    loss_of: Callable[..., Tensor],
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    negatives: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss and, by autograd, the gradient of its sum by ``query``."""
    query = query.detach().requires_grad_()
    loss = loss_of(query, bank, index, negatives, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    return loss.detach(), gradient


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(gather_infonce, dynamic=False)
