"""The plain torch forms that ops are compared with, as public trainers write them."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def gather_infonce(query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE against own negatives of every sample: gather ``[B, K + 1, D]``, bmm, cross-entropy.

    The form of lemniscate, VISSL and PyContrast. Autograd keeps the gathered tensor, which exists once for all views.

    Args:
        query: ``[V, B, D]`` fp32 or fp64, V views.
        bank: ``[N, D]``; its dtype is that of the products.
        index: ``[B]`` int64, bank row of the positive.
        negatives: ``[B, K]`` int64, bank rows of the negatives.
        temperature: τ > 0.

    Returns:
        ``[V, B]`` losses in nats, in the dtype of ``query``.
    """
    rows_BK = torch.cat((index[:, None], negatives), dim=1)
    chosen_BKD = bank.index_select(0, rows_BK.reshape(-1)).reshape(*rows_BK.shape, -1)
    scores_BVK = torch.bmm(query.to(bank.dtype).transpose(0, 1), chosen_BKD.transpose(1, 2))
    scores = (scores_BVK.to(query.dtype) / temperature).flatten(0, 1)
    target = torch.zeros(len(scores), dtype=torch.long, device=query.device)
    return cross_entropy(scores, target, reduction="none").reshape(scores_BVK.shape[:2]).T


def matmul_infonce(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    negatives: Tensor | None,
    *,
    temperature: float,
    exclude_self: bool = True,
) -> Tensor:
    """InfoNCE against the same rows for every sample: one product, cross-entropy; ``[V B, N]`` scores exist.

    The form of lemniscate's ``nce-k 0``. Arguments and result as :func:`gather_infonce`, but for

    Args:
        negatives: ``[K]`` int64, bank rows of the negatives of all samples; None: every other row of the bank.
        exclude_self: leave entries of ``negatives`` that are the sample's own row out for that sample.
    """
    flat = query.reshape(-1, query.shape[-1])
    chosen = bank if negatives is None else bank[negatives]
    scores = (flat.to(bank.dtype) @ chosen.T).to(flat.dtype) / temperature
    target = index.repeat(query.shape[0])
    if negatives is not None:  # the positive becomes column 0
        if exclude_self:
            scores = scores.masked_fill(negatives == target[:, None], -torch.inf)
        positive = (flat.to(bank.dtype) * bank[target]).sum(-1, keepdim=True).to(flat.dtype) / temperature
        scores, target = torch.cat((positive, scores), dim=1), torch.zeros_like(target)
    return cross_entropy(scores, target, reduction="none").reshape(query.shape[:-1])


def scatter_update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float) -> None:
    """The usual update of a memory bank: gather, blend, normalise, copy back."""
    vectors = bank.index_select(0, index).mul_(momentum).add_(features, alpha=1 - momentum)
    bank.index_copy_(0, index, vectors.div_(vectors.norm(dim=1, keepdim=True)))


def slice_enqueue_(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    """MoCo's queue: the head is read on the host, and the size of the bank must be a multiple of the batch."""
    start = int(head)
    bank[start : start + len(keys)] = keys
    head.fill_((start + len(keys)) % len(bank))


def loop_ema_(targets: list[Tensor], sources: list[Tensor], *, momentum: float) -> None:
    """MoCo's momentum encoder: one tensor after the other."""
    for target, source in zip(targets, sources, strict=True):
        target.mul_(momentum).add_(source, alpha=1 - momentum)
