"""Labels in equal numbers by optimal transport (Cuturi 2013; Asano, Rupprecht & Vedaldi, ICLR 2020, section 3.1)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslfast.distributed import gather_rows, mean_over_ranks, world_size


@dataclass(kw_only=True)
class Transport:
    """``Q_ik = exp(f_i + s_ik + g_k)``: what :func:`sinkhorn` found."""

    labels: Tensor
    """``[n]`` int64 of this rank's rows: ``argmax_k Q_ik``, the first of equals."""
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

    ``f_i = -log N - logsumexp_k(s_ik + g_k)`` and ``g_k = -log K - logsumexp_i(s_ik + f_i)`` in turn, in float64 and by
    logarithms, so that no power of a probability vanishes. One pass over the rows an iteration, a block at a time: the
    N x K scores never exist at once. Rows are scaled on their own rank; one ``[K]`` vector per rank is exchanged.

    Args:
        scores: slice of this rank's rows -> ``[b, K]`` fp64 s, that is λ times log-probabilities; called for every
            block of every iteration with the same result.
        count: this rank's rows.
        clusters: K.
        tolerance: relative error of the column sums to stop at.
        max_iterations: to stop at the latest.
        block: rows at a time.
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
        sums = torch.full_like(columns, -math.inf)
        for rows in blocks:
            s = scores(rows)
            f = -math.log(total) - (s + columns).logsumexp(dim=1, keepdim=True)
            sums = torch.logaddexp(sums, (s + f).logsumexp(dim=0))
        sums = gather_rows(sums[None]).logsumexp(dim=0)
        error = float((clusters * (sums + columns).exp() - 1).abs().max())  # host sync: once an iteration
        if error <= tolerance or iteration == max_iterations:
            break
        columns = -math.log(clusters) - sums
    labels = [(scores(rows) + columns).argmax(dim=1) for rows in blocks]
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    return Transport(labels=torch.cat([empty, *labels]), columns=columns, error=error, iterations=iteration)
