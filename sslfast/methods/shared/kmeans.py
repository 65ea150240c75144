"""k-means over all rows, the assignment by faiss and split over ranks; a function of points, seed and epoch.

faiss finds the nearest centroids, which is nearly all of the work; centroids and empty clusters are handled here, in a
fixed order of float64 sums, so that every rank, and a resumed run, gets the same labels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.distributed import broadcast_object, gather_uneven, mean_over_ranks, own_rows, world_size
from sslfast.ops.philox import Stream, random_uint32

_BLOCK = 1 << 14  # rows that are float64 at a time


def import_faiss() -> Any:
    """The module; ImportError with the remedy where it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"k-means needs faiss, which does not import ({error}): pip install faiss-cpu") from error
    return faiss


def whiten(points: Tensor, dimensions: int, *, sample: int = 0) -> Tensor:
    """Project rows to their first principal components of unit variance, then L2-normalise (Caron et al. 2018, section
    3.3).

    Directions with less than a millionth of the largest variance are left out. The covariance and its eigenvectors are
    float64 and exact; each rank sums its share of the rows.

    Args:
        points: ``[n, D]`` floating on the CPU, the same on every rank.
        dimensions: d, components kept, at most D.
        sample: mean and components are those of as many rows, evenly spaced; 0: of all.

    Returns:
        ``[n, d]`` fp32.
    """
    count = min(sample, len(points)) if sample else len(points)
    fitted = points if count == len(points) else points[torch.arange(count) * len(points) // count]
    part = own_rows(count)
    own = fitted[part.start : part.stop]
    columns = points.shape[1]
    total, products = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, columns, dtype=torch.float64)
    for block in own.split(_BLOCK):
        total += block.double().sum(0)
        products += block.double().T @ block.double()
    scale = world_size() / count
    mean = mean_over_ranks(total) * scale
    covariance = mean_over_ranks(products) * scale - mean.outer(mean)
    variances, directions = torch.linalg.eigh(covariance)  # ascending
    kept = variances.flip(0)[:dimensions]
    scales = torch.where(kept > 1e-6 * kept[0].clamp_min(1e-30), kept.clamp_min(1e-30).rsqrt(), 0.0)
    transform = broadcast_object((directions.flip(1)[:, :dimensions] * scales).float())
    shifted = mean.float() @ transform
    return torch.cat([normalize(block.float() @ transform - shifted, dim=1) for block in points.split(_BLOCK)])


def kmeans(points: Tensor, clusters: int, *, iterations: int, seed: int, epoch: int) -> Tensor:
    """``[n]`` int64 labels of Lloyd's algorithm; no cluster is empty.

    The first centroids are distinct rows drawn by (seed, epoch). An empty cluster takes half of the largest one
    (:func:`fill_empty`), in every iteration and at the end.

    Args:
        points: ``[n, d]`` fp32 on the CPU, the same on every rank; each assigns its share.
        clusters: K, at most n.
        iterations: updates of the centroids.
        seed: ``0 <= seed < 2**63``.
        epoch: of the run.

    Raises:
        ValueError: fewer points than clusters.
        ImportError: faiss is missing.
    """
    if not 1 <= clusters <= len(points):
        raise ValueError(f"clusters must be in [1, {len(points)}], the number of points, got {clusters}")
    faiss = import_faiss()
    bits = random_uint32(torch.arange(len(points)), 2, seed=seed, stream=Stream.CLUSTERS, step=epoch)
    first = ((bits[:, 0] << 31) | (bits[:, 1] >> 1)).argsort(stable=True)[:clusters]
    centroids = points[first]
    own = own_rows(len(points))
    for iteration in range(iterations + 1):
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(np.ascontiguousarray(centroids.numpy()))
        nearest = torch.zeros(0, dtype=torch.int64)
        if own:
            queries = np.ascontiguousarray(points[own.start : own.stop].numpy())
            nearest = torch.from_numpy(index.search(queries, 1)[1][:, 0])
        labels = fill_empty(points, gather_uneven(nearest), clusters)
        if iteration < iterations:
            centroids = means(points, labels, clusters)
    return labels


def means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """``[K, d]`` fp32 centroids of ``points`` ``[n, d]`` by ``labels`` ``[n]``; each rank sums its share in float64."""
    part = own_rows(len(points))
    own = slice(part.start, part.stop)
    sums = torch.zeros(clusters, points.shape[1], dtype=torch.float64)
    for block, label in zip(points[own].split(_BLOCK), labels[own].split(_BLOCK), strict=True):
        sums.index_add_(0, label, block.double())
    counts = labels.bincount(minlength=clusters).double()
    return (mean_over_ranks(sums) * world_size() / counts[:, None]).float()


def fill_empty(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """``labels`` with no empty cluster: an empty one takes half of the largest.

    The largest cluster (the first of equals) is cut at the median along the direction from its mean to its farthest
    row. The papers' code instead perturbs a copy of another cluster's centroid, which may leave it empty.
    """
    counts = labels.bincount(minlength=clusters).numpy()
    labels = labels.clone()
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        members = (labels == largest).nonzero()[:, 0]
        centred = points[members] - points[members].mean(0)
        direction = centred[int(centred.square().sum(1).numpy().argmax())]
        order = (centred @ direction).argsort(stable=True)
        moved = members[order[(len(members) + 1) // 2 :]]
        labels[moved] = int(empty)
        counts[empty] = len(moved)
        counts[largest] -= len(moved)
    return labels
