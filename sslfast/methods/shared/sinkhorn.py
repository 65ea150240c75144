"""Balanced labels by optimal transport (Cuturi 2013; Asano, Rupprecht & Vedaldi, ICLR 2020, section 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslfast.distributed import max_over_ranks, mean_over_ranks, sum_over_ranks, world_size


@dataclass(kw_only=True)
class Transport:
    """``Q_ik = softmax_k(s_ik + g_k) / N``, the result of :func:`sinkhorn`."""

    labels: Tensor
    """``[n]`` int64 of this rank's rows: ``argmax_k Q_ik``, ties to the first."""
    columns: Tensor
    """``[K]`` fp64, g."""
    error: float
    """Largest ``|K Σ_i Q_ik - 1|``; rows sum to 1 / N exactly."""
    iterations: int


def sinkhorn(
    scores: Callable[[slice], Tensor],
    count: int,
    clusters: int,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    block: int = 8192,
    device: torch.device | str = "cpu",
) -> Transport:
    """Scale ``exp(s)`` by rows and columns until rows sum to 1 / N and columns to 1 / K.

    With rows scaled exactly, ``Q_ik = softmax_k(s_ik + g_k) / N``, the logarithms of the column factors are updated by
    ``g_k -= log(K Σ_i Q_ik)``, in float64; for a column whose mass underflows, g rises by 690 per iteration. One pass
    over the rows per iteration, in blocks: the N x K scores never exist at once. Rows are scaled on their own rank; one
    ``[K]`` vector is summed over ranks.

    Args:
        scores: slice of this rank's rows -> ``[b, K]`` fp64 s, that is λ times log-probabilities, up to a constant
            of each row; called for every block in every iteration, with the same result.
        count: this rank's rows.
        clusters: K.
        tolerance: stops at this relative error of the column sums.
        max_iterations: stops after as many.
        block: rows per block.
        device: of the scores.

    Raises:
        ValueError: no rows on any rank.
    """
    mean_count = mean_over_ranks(torch.tensor(float(count), dtype=torch.float64))
    total = round(float(mean_count) * world_size())
    if total < 1:
        raise ValueError("there are no rows to label")
    blocks = [slice(start, min(start + block, count)) for start in range(0, count, block)]
    columns = torch.zeros(clusters, dtype=torch.float64, device=device)
    for iteration in range(1, max_iterations + 1):
        sums = torch.zeros_like(columns)
        for rows in blocks:
            sums += (scores(rows) + columns).softmax(dim=1).sum(dim=0)
        masses = mean_over_ranks(sums) * (clusters * world_size() / total)  # 1 each at the solution
        error = float((masses - 1).abs().max())  # host sync: once an iteration
        if error <= tolerance or iteration == max_iterations:
            break
        columns = columns - masses.clamp_min(1e-300).log()
    labels = [(scores(rows) + columns).argmax(dim=1) for rows in blocks]
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return Transport(labels=torch.cat([empty, *labels]), columns=columns, error=error, iterations=iteration)


@torch.no_grad()
def sinkhorn_codes(scores: Tensor, *, epsilon: float, iterations: int, weights: Tensor | None = None) -> Tensor:
    """Codes of a batch: ``exp(s / ε)`` scaled a few times until prototypes have equal shares and samples sum to 1.

    Caron et al., NeurIPS 2020 (SwAV), section 3.1 and appendix A: each iteration scales the columns, whose sums are
    taken over all ranks, then the rows. Nothing is read from the device.

    Args:
        scores: ``[n, K]`` s of this rank's samples, fp32.
        epsilon: ε.
        iterations: at least 1.
        weights: ``[n]`` 1 or 0: samples with 0 take no part, and their codes are 0; None: all take part.

    Returns:
        ``[n, K]``, rows sum to 1.
    """
    largest = max_over_ranks(scores.max() if len(scores) else scores.new_full((), -torch.inf))
    codes = ((scores - largest) / epsilon).exp_()
    if weights is not None:
        codes *= weights[:, None]
    smallest = torch.finfo(codes.dtype).tiny
    for _ in range(iterations):
        codes /= (sum_over_ranks(codes.sum(dim=0)) * codes.shape[1]).clamp_(min=smallest)
        codes /= codes.sum(dim=1, keepdim=True).clamp_(min=smallest)
    return codes
