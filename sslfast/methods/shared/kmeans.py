"""k-means over all rows, which ranks share; a function of points, seed and epoch, up to the order of sums over ranks.

faiss finds the nearest centroids, which is nearly all of the work; centroids and empty clusters are handled here, in
float64 sums, so that every rank, and a resumed run of as many, gets the same labels. A rank holds its own points, and
exchanges sums: ``[K, d]`` an update, ``[D, D]`` for the components.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.distributed import broadcast_object, gather_objects, gather_uneven, rank, sum_over_ranks
from sslfast.ops.philox import Stream, random_uint32

_BLOCK = 1 << 14  # rows that are float64 at a time
_QUERIES = 1 << 16  # rows that are searched for at a time


def import_faiss() -> Any:
    """The module; ImportError with the remedy where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"k-means needs faiss, which does not import ({error}): pip install faiss-cpu") from error
    return faiss


def whiten(
    points: Tensor, dimensions: int, *, sample: int = 0, rows: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Project rows to their first principal components of unit variance, then L2-normalise (Caron et al. 2018, section
    3.3).

    Directions with less than a millionth of the largest variance are left out. The covariance and its eigenvectors are
    float64 and exact; each rank sums its own rows.

    Args:
        points: ``[n, D]`` floating on the CPU, those of this rank.
        dimensions: d, components kept, at most D.
        sample: mean and components are those of as many rows of all ranks, evenly spaced; 0: of all.
        rows: ``[m]`` int64, the points that take part; None: all.
        target: ``[m, d]`` fp32 for the result; None: a new one.

    Returns:
        ``[m, d]`` fp32.
    """
    columns, own = points.shape[1], len(points) if rows is None else len(rows)
    counts = gather_objects(own)
    before, total_rows = sum(counts[: rank()]), sum(counts)
    count = min(sample, total_rows) if sample else total_rows

    def block(start: int, end: int) -> Tensor:
        return points[start:end] if rows is None else points[rows[start:end]]

    def fitted() -> Iterator[Tensor]:
        # Of the i-th fitted row, i n // count, from this rank's first to its last one.
        first, last = (-(-place * count // total_rows) for place in (before, before + own))
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            if count == total_rows:
                yield block(start - before, end - before)
            else:
                places = torch.arange(start, end) * total_rows // count - before
                yield points[places if rows is None else rows[places]]

    total, products = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, columns, dtype=torch.float64)
    for part in fitted():
        total += part.double().sum(0)
        products += part.double().T @ part.double()
    mean = sum_over_ranks(total) / count
    covariance = sum_over_ranks(products) / count - mean.outer(mean)
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    kept = variances.flip(0)[:dimensions]
    scales = torch.where(kept > 1e-6 * kept[0].clamp_min(1e-30), kept.clamp_min(1e-30).rsqrt(), 0.0)
    transform = broadcast_object((directions.flip(1)[:, :dimensions] * scales).float())
    shifted = mean.float() @ transform
    target = torch.empty(own, dimensions) if target is None else target
    for start in range(0, own, _BLOCK):
        end = min(start + _BLOCK, own)
        target[start:end] = normalize(block(start, end).float() @ transform - shifted, dim=1)
    return target


def kmeans(points: Tensor, clusters: int, *, iterations: int, seed: int, epoch: int) -> Tensor:
    """``[n]`` int64 labels of Lloyd's algorithm for the points of this rank; no cluster is empty.

    The first centroids are distinct rows drawn by (seed, epoch). An empty cluster takes half of the largest one
    (:func:`fill_empty`), in every iteration and at the end. A rank needs memory for ``2 K d`` float64 and a block of
    searched rows beside its points.

    Args:
        points: ``[n, d]`` floating on the CPU, those of this rank; may be a mapped file.
        clusters: K, at most the points of all ranks.
        iterations: updates of the centroids.
        seed: ``0 <= seed < 2**63``.
        epoch: of the run.

    Raises:
        ValueError: fewer points than clusters.
        ImportError: faiss is missing.
    """
    counts = gather_objects(len(points))
    if not 1 <= clusters <= sum(counts):
        raise ValueError(f"clusters must be in [1, {sum(counts)}], the number of points, got {clusters}")
    faiss = import_faiss()
    centroids = _drawn_rows(points, clusters, first=sum(counts[: rank()]), seed=seed, epoch=epoch)
    for iteration in range(iterations + 1):
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(np.ascontiguousarray(centroids.numpy()))
        nearest = [np.empty(0, dtype=np.int64)]
        for queries in points.split(_QUERIES) if len(points) else ():
            nearest.append(index.search(np.ascontiguousarray(queries.float().numpy()), 1)[1][:, 0])
        labels = fill_empty(points, torch.from_numpy(np.concatenate(nearest)), clusters)
        if iteration < iterations:
            centroids = means(points, labels, clusters)
    return labels


def _drawn_rows(points: Tensor, count: int, *, first: int, seed: int, epoch: int) -> Tensor:
    """``[count, d]`` fp32: the rows of all ranks with the smallest of their random numbers, in the order of these.

    Args:
        points: ``[n, d]`` of this rank.
        count: at most the rows of all ranks.
        first: number of the first of ``points`` among those of all ranks.
        seed, epoch: of the random numbers.
    """
    found = torch.empty(0, 2, dtype=torch.int64)
    for start in range(0, len(points), 1 << 20):
        numbers = torch.arange(first + start, first + min(start + (1 << 20), len(points)))
        bits = random_uint32(numbers, 2, seed=seed, stream=Stream.CLUSTERS, step=epoch)
        keys = (bits[:, 0] << 31) | (bits[:, 1] >> 1)
        found = _smallest(torch.cat((found, torch.stack((keys, numbers), dim=1))), count)
    drawn = _smallest(gather_uneven(found), count)[:, 1] - first
    own = (drawn >= 0) & (drawn < len(points))
    rows = torch.zeros(count, points.shape[1])
    rows[own] = points[drawn[own]].float()
    return sum_over_ranks(rows)


def _smallest(pairs: Tensor, count: int) -> Tensor:
    """The ``count`` pairs (key, number) of smallest keys, of equal ones those that come first."""
    return pairs[pairs[:, 0].argsort(stable=True)[:count]]


def means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """``[K, d]`` fp32 centroids of the ``points`` ``[n, d]`` of all ranks by ``labels`` ``[n]``; sums are float64."""
    sums = torch.zeros(clusters, points.shape[1], dtype=torch.float64)
    for block, label in zip(points.split(_BLOCK), labels.split(_BLOCK), strict=True):
        sums.index_add_(0, label, block.double())
    counts = sum_over_ranks(labels.bincount(minlength=clusters)).double()
    return (sum_over_ranks(sums) / counts[:, None]).float()


def fill_empty(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """``labels`` of this rank's ``points`` with no cluster empty on all ranks: an empty one takes half of the largest.

    The largest cluster (the first of equals) is cut at the median along the direction from its mean to its farthest
    row, by one number of each of its rows, which every rank gets. The papers' code instead perturbs a copy of another
    cluster's centroid, which may leave it empty.
    """
    counts = sum_over_ranks(labels.bincount(minlength=clusters)).numpy().copy()
    labels = labels.clone()
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        members = (labels == largest).nonzero()[:, 0]
        rows = points[members].float()
        centred = rows - (sum_over_ranks(rows.sum(0, dtype=torch.float64)) / counts[largest]).float()
        lengths = centred.square().sum(1)
        farthest = int(lengths.numpy().argmax()) if len(members) else None
        found = gather_objects(None if farthest is None else (float(lengths[farthest]), centred[farthest]))
        _, direction = max((pair for pair in found if pair is not None), key=lambda pair: pair[0])
        places = gather_objects(len(members))
        order = gather_uneven(centred @ direction).argsort(stable=True)
        moved = order[(int(counts[largest]) + 1) // 2 :]
        own = moved - sum(places[: rank()])
        labels[members[own[(own >= 0) & (own < len(members))]]] = int(empty)
        counts[empty] = len(moved)
        counts[largest] -= len(moved)
    return labels
