"""Average precision of a ranking."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def precision_recall(
    targets: NDArray[np.bool_], scores: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of ``scores >= t`` for every distinct score t, in decreasing order.

    Equal scores are counted together, so the order of the entries does not matter.

    Args:
        targets: ``[N]``; at least one is true.
        scores: ``[N]``, no NaN.
    """
    if targets.shape != scores.shape or targets.ndim != 1:
        raise ValueError(f"targets and scores must be [N], got {list(targets.shape)} and {list(scores.shape)}")
    if not targets.any():
        raise ValueError("average precision is not defined without a positive; give at least one")
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN; the classifier or its features are broken")
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(targets[order])
    last = np.append(np.diff(scores[order]) != 0, True)
    return right[last] / (np.flatnonzero(last) + 1), right[last] / right[-1]


def average_precision(
    targets: NDArray[np.bool_], scores: NDArray[np.floating], *, kind: Literal["area", "11-point"] = "area"
) -> float:
    """Area under the interpolated precision-recall curve: at each recall the best precision at this or a higher recall.

    ``area``: the exact area (VOC from 2010 on; VISSL's SVM benchmarks). ``11-point``: the mean of its height at recall
    0, 0.1 ... 1 (VOC 2007). Arguments: see :func:`precision_recall`.
    """
    precision, recall = precision_recall(targets, scores)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if kind == "11-point":
        levels = np.arange(11) / 10
        # The first point whose recall reaches the level; 1e-12: shares such as 3 / 10 are not exact in binary.
        first = np.searchsorted(recall, levels - 1e-12)
        return float(best[first].mean())
    return float((np.diff(recall, prepend=0.0) * best).sum())
