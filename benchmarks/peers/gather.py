"""A list of rows for every sample: gather ``[B, K + 1, D]``, product, cross-entropy, autograd."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def gather_eager(
    query: Tensor, bank: Tensor, index: Tensor, rows: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The form of lemniscate, VISSL and PyContrast, all views in one product: the gathered tensor exists once."""
    return _with_gradient(_gather_loss, query, bank, index, rows, temperature)


def gather_compiled(
    query: Tensor, bank: Tensor, index: Tensor, rows: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same under ``torch.compile``, which may fuse the gather into the product."""
    return _with_gradient(_compiled(), query, bank, index, rows, temperature)


def _gather_loss(query: Tensor, bank: Tensor, index: Tensor, rows: Tensor, temperature: float) -> Tensor:
    rows_BK = torch.cat((index[:, None], rows), dim=1)
    chosen_BKD = bank.index_select(0, rows_BK.reshape(-1)).reshape(*rows_BK.shape, -1)
    scores_BVK = torch.bmm(query.to(bank.dtype).transpose(0, 1), chosen_BKD.transpose(1, 2))
    scores_BVK = scores_BVK.to(query.dtype) / temperature
    target = torch.zeros(scores_BVK.shape[:2], dtype=torch.long, device=query.device)
    return cross_entropy(scores_BVK.transpose(1, 2), target, reduction="none").T


def _with_gradient(
    loss_of: Callable[..., Tensor], query: Tensor, bank: Tensor, index: Tensor, rows: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    query = query.detach().requires_grad_()
    loss = loss_of(query, bank, index, rows, temperature)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    return loss.detach(), gradient


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_gather_loss, dynamic=False)
