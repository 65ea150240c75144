"""Sets of permutations with large pairwise Hamming distances, and published ones from files."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_CELLS = 9


def max_hamming_permutations(count: int, cells: int = 9, seed: int = 0) -> Tensor:
    """``count`` distinct permutations of ``0 .. cells-1`` with large Hamming distances.

    Greedy over all ``cells!`` permutations: the first is drawn by the seed, each next one has the largest sum of
    distances to those chosen, ``argmax_p sum_{q chosen} #{i : p_i != q_i}`` (Noroozi and Favaro, ECCV 2016, Algorithm
    1). Ties go to the one whose nearest chosen permutation is farthest, then to the first in an order drawn by the
    seed. Up to ``cells`` permutations differ pairwise in every position. A function of its arguments; a set begins with
    the smaller sets of the same seed. 10,000 of 9 cells take four seconds of one CPU core.

    Args:
        count: 1 .. ``cells!``.
        cells: 1 .. 9.
        seed: ``0 <= seed < 2**63``.

    Returns:
        ``[count, cells]`` int64.

    Raises:
        ValueError: an argument out of range.
    """
    if not 1 <= cells <= MAX_CELLS:
        raise ValueError(f"cells must be in [1, {MAX_CELLS}], since all cells! permutations are tried, got {cells=}")
    if not 1 <= count <= math.factorial(cells):
        raise ValueError(f"count must be in [1, {math.factorial(cells)}], the permutations of {cells=}, got {count=}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed=}")
    from sslfast._C import max_hamming_permutations as rows

    # A bytearray, since torch warns about read-only memory.
    flat = torch.frombuffer(bytearray(rows(count, cells, seed)), dtype=torch.uint8)
    return flat.view(count, cells).long()


def read_permutations(path: Path | str, cells: int) -> Tensor:
    """The set in a ``.npy`` file, as fair_self_supervision_benchmark and VISSL publish theirs.

    Args:
        path: an integer array ``[K, cells]``; rows are permutations of ``0 .. cells-1``, or of ``1 .. cells``.
        cells: of the jigsaw.

    Returns:
        ``[K, cells]`` int64, from 0.

    Raises:
        ValueError: the file cannot be read, or is no such set; names it.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"method.permutation_file={str(path)!r} cannot be read as .npy: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] != cells or found.dtype.kind not in "iu":
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(
            f"method.permutation_file={str(path)!r} must hold integers [K, {cells}], one permutation of the {cells} "
            f"patches a row, got {kind}"
        )
    rows = torch.from_numpy(found.astype(np.int64))
    rows = rows - rows.min() if len(rows) else rows
    wrong = (rows.sort(dim=1).values != torch.arange(cells)).any(dim=1).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"method.permutation_file={str(path)!r}: row {int(wrong[0])} is no permutation of the {cells} patches: "
            f"{found[int(wrong[0])].tolist()}"
        )
    if len(torch.unique(rows, dim=0)) != len(rows):
        raise ValueError(f"method.permutation_file={str(path)!r} holds a permutation twice: two classes would be one")
    return rows
