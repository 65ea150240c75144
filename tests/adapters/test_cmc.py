"""CMC's and PyContrast's calls, and checkpoints written as theirs are; values are in ``test_stateful.py``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslfast.adapters import CMCAverage, CMCMem, NCEAverage, RGBMem, cmc
from tests.adapters.stateful import ROWS, B, D, K, N, drawn_scores, views


def memory(seed: int) -> Tensor:
    return normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_memories_of_two_modalities_start_apart_and_take_their_own_features() -> None:
    for module in (CMCAverage(D, N, K), CMCMem(D, N, K)):
        first, second = (getattr(module, name) for name in module._memories)
        assert (first - second).norm(dim=1).min() > 0.1
        before = first.clone(), second.clone()
        a, b = views(0)
        module(a, b, ROWS)
        for own, old, x in zip((first, second), before, (a, b), strict=True):
            old[ROWS] = normalize(0.5 * old[ROWS] + 0.5 * x.detach(), dim=1)
            torch.testing.assert_close(own, old)
        assert module.step == 1


def test_cmc_by_position() -> None:
    """As ``train_CMC.py`` builds and calls it, with and without rows."""
    a, b = views(0)
    for softmax in (True, False):
        drawn, given = (cmc.NCEAverage(D, N, K, 0.07, 0.5, softmax) for _ in range(2))
        assert drawn.loss == ("infonce" if softmax else "nce")
        idx = torch.randint(N, (B, K + 1))
        idx[:, 0] = ROWS
        scores = [(x[:, None] * rows[idx]).sum(2) / 0.07 for x, rows in ((a, given.memory_ab), (b, given.memory_l))]
        losses = given(a, b, ROWS, idx)
        if softmax:
            for loss, each in zip(losses, scores, strict=True):
                torch.testing.assert_close(loss, cross_entropy(each, torch.zeros(B, dtype=torch.int64)))
        assert all(loss.isfinite() for loss in (*losses, *drawn(a, b, ROWS)))


def test_both_normalisers_of_cmc_freeze_at_the_first_training_batch() -> None:
    module = CMCAverage(D, N, K, 0.2)
    a, b = views(0)
    expected = [
        N * drawn_scores(module, x, memory).exp().mean() for x, memory in ((a, module.memory_ab), (b, module.memory_l))
    ]
    module.eval()(a, b, ROWS)
    assert module.z_l.isnan()
    module.train()(a, b, ROWS)
    for _ in range(2):
        torch.testing.assert_close(torch.stack((module.z_l, module.z_ab)).float(), torch.stack(expected))
        module(*views(1), ROWS)


def test_checkpoints_of_the_owners_load_strictly() -> None:
    one, two = memory(1), memory(2)
    module: Any = CMCAverage(D, N, K)
    theirs = {"params": torch.tensor([K, 0.07, 11.0, 12.0, 0.5]), "memory_l": one, "memory_ab": two}
    module.load_state_dict(theirs, strict=True)
    assert torch.equal(module.memory_l, one)
    assert torch.equal(module.memory_ab, two)
    assert (module.z_l.item(), module.z_ab.item()) == (11, 12)
    assert module._z_is_set
    module = CMCAverage(D, N, K)
    module.load_state_dict(theirs | {"params": torch.tensor([K, 0.07, -1, -1, 0.5])}, strict=True)
    assert not module._z_is_set
    module = RGBMem(D, N, K)
    module.load_state_dict({"memory": one}, strict=True)
    assert torch.equal(module.memory, one)
    module = CMCMem(D, N, K)
    module.load_state_dict({"memory_1": one, "memory_2": two}, strict=True)
    assert torch.equal(module.memory_2, two)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"memory_1": one}, strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        RGBMem(D, N + 1, K).load_state_dict({"memory": one}, strict=True)


@pytest.mark.parametrize(("place", "option"), [(0, "K"), (1, "T"), (3, "momentum")])
def test_a_checkpoint_with_other_options_is_an_error(place: int, option: str) -> None:
    params = torch.tensor([K, 0.07, 300.0, 0.5])
    NCEAverage(D, N, K).load_state_dict({"memory": memory(1), "params": params})
    params[place] *= 2
    with pytest.raises(RuntimeError, match=rf"NCEAverage: the checkpoint has {option}=.* and the module {option}="):
        NCEAverage(D, N, K).load_state_dict({"memory": memory(1), "params": params})


def test_pycontrast_by_position_and_by_keyword() -> None:
    """As its trainer calls ``RGBMem`` and ``CMCMem``, with the features of all ranks."""
    (f, f_jig), (all_f, _) = views(0), views(1)
    contrast = RGBMem(D, N, K, 0.07, 0.5)
    logits = [drawn_scores(contrast, x, contrast.memory.clone()) for x in (f, f_jig)]
    old = contrast.memory.clone()
    index, all_index = ROWS, ROWS + 1
    *ours, labels = contrast(f, index, f_jig, all_f, all_index)
    assert labels.dtype == torch.int64
    for two, full in zip(ours, logits, strict=True):
        torch.testing.assert_close(two[:, 0], full[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two[:, 1], full[:, 1:].logsumexp(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cross_entropy(two, labels), cross_entropy(full, labels), rtol=1e-4, atol=1e-5)
    old[all_index] = normalize(0.5 * old[all_index] + 0.5 * all_f.detach(), dim=1)
    torch.testing.assert_close(contrast.memory, old)
    assert len(RGBMem(n_dim=D, n_data=N, K=K, T=0.07, m=0.5)(x=f, y=index, x_jig=None, all_x=None, all_y=None)) == 2
    pair = CMCMem(n_dim=D, n_data=N, K=K, T=0.07, m=0.5)
    assert len(pair(f, f_jig, index, None, None, all_f, all_f, all_index)) == 3
    assert len(pair(f, f_jig, index, f_jig, f, all_f, all_f, all_index)) == 5


@pytest.mark.parametrize("distance", [0.0, 60.0, 200.0])
def test_logits_at_the_ends_of_the_range(distance: float) -> None:
    """A loss that rounds to 0, and a large one, have a finite gradient; that of the formula."""
    module = RGBMem(2, 2, K=3, T=1.0, exclude_self=True)
    module.memory.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    for sign in (1, -1):
        x = torch.tensor([[sign * distance, 0.0]], requires_grad=True)
        logits, labels = module.eval()(x, torch.tensor([0]))
        loss = cross_entropy(logits, labels)
        exact = torch.tensor([[sign * distance, 0.0]], dtype=torch.float64, requires_grad=True)
        scores = exact @ module.memory.double()[[0, 1, 1, 1]].T
        expected = cross_entropy(scores, labels)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, x), torch.autograd.grad(expected, exact), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


CLASSES: list[Any] = [NCEAverage, CMCAverage, RGBMem, CMCMem]


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((0, N, K), {}, "columns of the memory must be an integer, at least 1, got 0"),
        ((D, 1, K), {}, "rows of the memory must be an integer, at least 2, got 1"),
        ((D, N, 0), {}, r"K \(negatives\) must be an integer, at least 1, got 0"),
        ((D, N, 2.5), {}, r"K \(negatives\) must be an integer, at least 1, got 2.5"),
        *(((D, N, K, T), {}, r"temperature must be in \[1e-8, 1e30\], got") for T in (0, -1, math.nan, math.inf, 1e31)),
        *(((D, N, K, 0.1, m), {}, r"momentum must be in \[0, 1\], got") for m in (-0.1, 1.1, math.nan)),
        ((D, N, K), {"dtype": torch.int64}, "dtype must be one of torch.float32"),
        ((D, N, K), {"seed": -1}, "seed must be in"),
    ],
)
def test_bad_options(make: Any, arguments: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(*arguments, **options)


@pytest.mark.parametrize(
    ("Z", "text"),
    [
        (True, "got True; for use_softmax=True pass loss='infonce'"),
        (False, "got False; for use_softmax=False pass loss='nce'"),
        *((Z, "Z must be positive and finite, or None") for Z in (0, math.nan, math.inf)),
    ],
)
def test_bad_normalisers(Z: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NCEAverage(D, N, K, 0.07, 0.5, Z)


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, y: (x[:, 1:], y), ValueError, rf"must be \[B, {D}\], none of them 0, got \[6, 15\]"),
        (lambda x, y: (x[:0], y[:0]), ValueError, rf"must be \[B, {D}\], none of them 0, got \[0, 16\]"),
        (lambda x, y: (x[0], y), ValueError, rf"must be \[B, {D}\]"),
        (lambda x, y: (x.long(), y), TypeError, "must be features, floating"),
        (lambda x, y: (x.double(), y), TypeError, r"features are float64.*call .double\(\) on the module"),
        (lambda x, y: (x.to("meta"), y), ValueError, r"is on meta and not on cpu; move one with .to\(device\)"),
        (lambda x, y: (x.tolist(), y), TypeError, "must be a tensor, got list"),
        (lambda x, y: (x, y[1:]), ValueError, r"y must be int64 rows of the memory, \[6\], got torch.int64 \[5\]"),
        (lambda x, y: (x, y.int()), ValueError, r"y must be int64 rows of the memory, \[6\], got torch.int32 \[6\]"),
        (lambda x, y: (x, y.tolist()), ValueError, "y must be int64 rows of the memory.*got list"),
        (lambda x, y: (x, y + N), RuntimeError, "row|index"),
    ],
)
def test_bad_batches_change_no_state(make: Any, change: Any, error: type[Exception], text: str) -> None:
    module = make(D, N, K)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, y = change(views(0)[0], ROWS)
    with pytest.raises(error, match=text):
        module(x, x, y) if len(module._memories) == 2 else module(x, y)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_bad_combinations() -> None:
    a, b = views(0)
    with pytest.raises(TypeError, match="NCEAverage: x_jig must be features, floating"):
        NCEAverage(D, N, K)(a, ROWS, torch.zeros(B, K + 1, dtype=torch.int64))  # CMC's idx
    with pytest.raises(ValueError, match=rf"idx must be int64 rows of the memory, \[6, {K + 1}\], got .*\[6, {K}\]"):
        NCEAverage(D, N, K)(a, ROWS, idx=torch.zeros(B, K, dtype=torch.int64))
    for given in ({"all_x": a}, {"all_y": ROWS}):
        for module in (NCEAverage(D, N, K), RGBMem(D, N, K)):
            with pytest.raises(ValueError, match=r"give the features and the rows \(all_y\) of all ranks together"):
                module(a, ROWS, **given)
    with pytest.raises(ValueError, match="CMCMem: give x1_jig and x2_jig together"):
        CMCMem(D, N, K)(a, b, ROWS, a)
