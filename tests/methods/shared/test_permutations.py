import itertools
import math

import pytest
import torch
from torch import Tensor

from sslfast.methods.shared.permutations import max_hamming_permutations


def distances(permutations: Tensor) -> Tensor:
    """Of every pair of different rows."""
    all_pairs = (permutations[:, None] != permutations).sum(-1)
    first, second = torch.triu_indices(len(permutations), len(permutations), 1)
    return all_pairs[first, second]


@pytest.mark.parametrize("cells", range(1, 6))
def test_all_permutations_of_small_grids(cells: int) -> None:
    permutations = max_hamming_permutations(math.factorial(cells), cells, seed=3)
    assert sorted(map(tuple, permutations.tolist())) == list(itertools.permutations(range(cells)))


@pytest.mark.parametrize("cells", [2, 4, 9])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_small_sets_differ_everywhere(cells: int, seed: int) -> None:
    permutations = max_hamming_permutations(cells, cells, seed)
    assert permutations.dtype == torch.int64
    assert distances(permutations).unique().tolist() == [cells]
    assert permutations.sort(dim=0).values.T.unique(dim=0).tolist() == [list(range(cells))]  # a Latin square


@pytest.mark.parametrize(("count", "mean"), [(100, 8.08), (1000, 8.0)])
def test_distances_are_those_of_the_paper(count: int, mean: float) -> None:
    """Mean distances of Noroozi and Favaro 2016, their ablation of permutation sets."""
    permutations = max_hamming_permutations(count)
    between = distances(permutations).double()
    assert between.mean().item() == pytest.approx(mean, abs=0.01)
    assert between.min() >= 2  # two permutations cannot differ in one place
    assert (permutations.sort(dim=1).values == torch.arange(9)).all()
    # Every cell is about as often in every place: slots say nothing of cells.
    counts = torch.nn.functional.one_hot(permutations, 9).sum(0)
    assert counts.min() >= count // 9
    assert counts.max() <= count // 9 + 1
    drawn = torch.argsort(torch.rand(count, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    assert between.mean() >= distances(drawn).double().mean()


def test_greedy_choice_is_the_best_of_all_candidates() -> None:
    chosen = max_hamming_permutations(12, 4, seed=7)
    candidates = torch.tensor(list(itertools.permutations(range(4))))
    for step in range(1, 12):
        apart = (candidates[:, None] != chosen[:step]).sum(-1)  # [24, step]
        key = 16 * apart.sum(1) + apart.min(1).values
        taken = apart.min(1).values == 0
        own = (candidates == chosen[step]).all(1)
        assert key[own] == key[~taken].max()


def test_seeds_and_prefixes() -> None:
    large = max_hamming_permutations(60, seed=5)
    assert torch.equal(max_hamming_permutations(20, seed=5), large[:20])
    assert torch.equal(max_hamming_permutations(60, seed=5), large)
    assert not torch.equal(max_hamming_permutations(60, seed=6), large)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 10), r"cells must be in \[1, 9\], since all cells! permutations are tried, got cells=10"),
        ((3, 0), "got cells=0"),
        ((0,), r"count must be in \[1, 362880\], the permutations of cells=9, got count=0"),
        ((25, 4), r"count must be in \[1, 24\], the permutations of cells=4, got count=25"),
        ((2, 4, -1), r"seed must be in \[0, 2\*\*63\), got seed=-1"),
    ],
)
def test_errors(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_hamming_permutations(*arguments)
