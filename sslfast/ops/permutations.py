"""Sets of permutations with large pairwise Hamming distances: the classes of jigsaw puzzles."""

import ctypes
import itertools
import math

import torch
from torch import Tensor

from sslfast.ops import _core, _library
from sslfast.ops.philox import Stream, integers_below, random_uint32

MAX_CELLS = 9
_CHOSEN = -(2**40)  # below every sum of distances


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
    _check(count, cells, seed)
    if _core.core is None:
        return max_hamming_permutations_reference(count, cells, seed)
    rows = torch.empty(count, cells, dtype=torch.uint8, device="cpu")  # whatever the default device
    arguments = (ctypes.c_int64(count), ctypes.c_int64(cells), ctypes.c_int64(seed), ctypes.c_void_p(rows.data_ptr()))
    if _core.core.sslfast_max_hamming_permutations(*arguments) != 0:
        raise MemoryError(f"max_hamming_permutations: no memory for {count} permutations of {cells} cells")
    return rows.long()


def max_hamming_permutations_reference(count: int, cells: int = 9, seed: int = 0) -> Tensor:
    """The same in torch: the specification of :func:`max_hamming_permutations`, equal to the last number."""
    _check(count, cells, seed)
    with torch.device("cpu"):  # whatever the default device
        return _reference(count, cells, seed)


def _reference(count: int, cells: int, seed: int) -> Tensor:
    candidates = torch.tensor(list(itertools.permutations(range(cells))), dtype=torch.uint8)
    total = len(candidates)
    ids = torch.arange(1, total)
    words = random_uint32(ids, 2, seed=seed, stream=Stream.PERMUTATIONS, step=0)
    order = list(range(total))
    for i, other in zip(range(total - 1, 0, -1), integers_below(words, ids + 1).flip(0).tolist(), strict=True):
        order[i], order[other] = order[other], order[i]
    candidates = torch.empty_like(candidates).index_copy_(0, torch.tensor(order), candidates)
    sums, nearest = torch.zeros(total, dtype=torch.int64), torch.full((total,), cells)
    chosen = [0]
    while len(chosen) < count:
        distances = (candidates != candidates[chosen[-1]]).sum(dim=1)
        sums[chosen[-1]] = _CHOSEN
        sums += distances
        nearest = torch.minimum(nearest, distances)
        key = sums * 16 + nearest
        chosen.append(int((key == key.max()).nonzero()[0]))
    return candidates[chosen].long()


def _check(count: int, cells: int, seed: int) -> None:
    _library.check_integers("max_hamming_permutations", count=count, cells=cells, seed=seed)
    if not 1 <= cells <= MAX_CELLS:
        raise ValueError(f"cells must be in [1, {MAX_CELLS}], since all cells! permutations are tried, got {cells=}")
    if not 1 <= count <= math.factorial(cells):
        raise ValueError(f"count must be in [1, {math.factorial(cells)}], the permutations of {cells=}, got {count=}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed=}")
