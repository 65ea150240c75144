"""Against MoCo's loss and a first-in, first-out queue, written out in torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from sslfast.adapters import MemoryBankModule, NCEAverage, NTXentLoss
from sslfast.distributed import (
    check_replicas,
    destroy_process_group,
    init_process_group,
    mean_over_ranks,
    process_group,
)
from tests.adapters.stateful import simclr
from tests.distributed.test_training import enter, run


def outputs(seed: int, *, batch: int = 4, columns: int = 16) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def moco_loss(out0: Tensor, out1: Tensor, bank: Tensor, temperature: float) -> Tensor:
    query, key = normalize(out0, dim=1), normalize(out1, dim=1)
    logits = torch.cat(((query * key).sum(1, keepdim=True), query @ bank.T), dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def test_returns_the_queue_as_it_was_before_the_update() -> None:
    module = MemoryBankModule(size=(8, 16))
    first = module.bank.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(8))
    keys = outputs(1)
    same, bank = module(keys, update=True)
    assert same is keys
    assert bank is not None
    assert torch.equal(bank, first.T)
    assert torch.equal(module.bank[:4], keys)
    assert torch.equal(module.bank[4:], first[4:])
    assert not module.bank.requires_grad
    _, after = module(outputs(2))
    assert after is not None
    assert torch.equal(after, module.bank.T)
    assert module.bank_ptr == 4


def test_dim_first_and_no_bank() -> None:
    keys = outputs(1)
    module = MemoryBankModule(size=(8, 16), feature_dim_first=False)
    assert module(keys)[1].shape == (8, 16)
    assert MemoryBankModule(size=0)(keys, update=True) == (keys, None)
    assert MemoryBankModule(size=(0, 16))(keys, labels=None) == (keys, None)


@pytest.mark.parametrize(("rows", "batch"), [(7, 4), (8, 4), (3, 4), (1, 4), (4, 4)])
def test_a_batch_that_reaches_the_end_fills_the_queue_and_the_next_starts_at_row_0(rows: int, batch: int) -> None:
    module = MemoryBankModule(size=(rows, 16))
    queue, pointer = module.bank.clone(), 0
    for seed in range(6):
        keys = outputs(seed, batch=batch).detach()
        module(keys, update=True)
        for key in keys:
            if pointer < rows:
                queue[pointer] = key
            pointer += 1
        pointer = 0 if pointer >= rows else pointer
        assert torch.equal(module.bank, queue)
        assert module.bank_ptr == pointer


def test_features_of_more_dimensions() -> None:
    module = MemoryBankModule(size=(5, 3, 2))
    torch.testing.assert_close(module.bank.norm(dim=-1), torch.ones(5, 3))
    maps = torch.randn(2, 3, 2)
    assert module(maps, update=True)[1].shape == (2, 3, 5)
    assert torch.equal(module.bank[:2], maps)


def test_rows_only_take_the_columns_of_the_first_batch_or_of_a_checkpoint() -> None:
    with pytest.warns(UserWarning, match=r"size=8 leaves the number of columns to the first batch"):
        module, resumed, half = (MemoryBankModule(size=8) for _ in range(3))
    module(outputs(1), update=True)
    assert module.bank.shape == (8, 16)
    half.half()(outputs(1))
    assert half.bank.dtype == torch.float16
    resumed.load_state_dict(module.state_dict())
    assert torch.equal(resumed.bank, module.bank)
    assert resumed.bank_ptr == 4


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_gradients_and_queue_over_steps(temperature: float) -> None:
    module = NTXentLoss(temperature, memory_bank_size=(8, 16))
    for seed in range(3):
        out0, out1 = outputs(10 + seed), outputs(20 + seed)
        bank = module.bank.clone()
        expected = moco_loss(out0.double(), out1.double(), bank.double(), temperature)
        gradients = torch.autograd.grad(expected, (out0, out1))
        loss = module(out0, out1)  # updates the queue before backward
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(loss, (out0, out1)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        bank[(4 * seed + torch.arange(4)) % 8] = normalize(out1.detach(), dim=1)
        torch.testing.assert_close(module.bank, bank)


def test_without_gradient_the_queue_is_not_updated() -> None:
    module = NTXentLoss(memory_bank_size=(8, 16))
    with torch.no_grad():
        loss = module(outputs(1).detach(), outputs(2).detach())
    assert loss.isfinite()
    assert module.bank_ptr == 0
    half = module(outputs(1).bfloat16(), outputs(2).bfloat16())
    assert half.dtype == torch.float32
    assert module.bank_ptr == 4


def test_keys_of_all_ranks(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        module = MemoryBankModule(size=(8, 16), gather_distributed=True)
        module(outputs(1), update=True)
        assert torch.equal(module.bank[:4], outputs(1))
    finally:
        torch.distributed.destroy_process_group()


def test_states_of_lightly_and_of_older_versions_load_strictly() -> None:
    module = NTXentLoss(memory_bank_size=(8, 16))
    module(outputs(1), outputs(2))
    assert set(module.state_dict()) == {"memory_bank.bank", "memory_bank.bank_ptr"}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict({}, strict=True)  # lightly saves neither
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    older = NTXentLoss(memory_bank_size=(8, 16))
    older.load_state_dict({"bank": module.bank, "bank_ptr": torch.tensor(4)}, strict=True)
    assert torch.equal(older.bank, module.bank)
    assert older.bank_ptr.tolist() == [4]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({"memory_bank.bank": module.bank}, strict=True)


def test_lightly_calls(device: torch.device) -> None:
    """The calls of lightly's examples: in-batch, and with a loss that is never moved to the device of the model."""
    out0, out1 = outputs(1).to(device), outputs(2).to(device)
    torch.testing.assert_close(NTXentLoss()(out0, out1), simclr(out0, out1, 0.5))
    torch.testing.assert_close(NTXentLoss(0.1, 0, True)(out0, out1), simclr(out0, out1, 0.1))
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(8, 16), gather_distributed=True)
    expected = moco_loss(out0, out1, criterion.bank.to(device), 0.2)
    torch.testing.assert_close(criterion(out0, out1), expected)
    assert criterion.bank.device == criterion.bank_ptr.device == out0.device


def losses_of_ranks(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    whole = [outputs(seed, batch=6).detach().double().requires_grad_() for seed in (1, 2)]
    loss = simclr(*whole, 0.3)
    gradients = torch.autograd.grad(loss, whole)
    init_process_group(process_group(), torch.device("cpu"))
    own = slice(6 // ranks * rank, 6 // ranks * (rank + 1))
    parts = [x.detach()[own].clone().requires_grad_() for x in whole]
    got = NTXentLoss(0.3, gather_distributed=True)(*parts)
    torch.testing.assert_close(mean_over_ranks(got.detach()), loss.detach())
    for ours, theirs in zip(torch.autograd.grad(got, parts), gradients, strict=True):
        torch.testing.assert_close(ours / ranks, theirs[own])  # averaged over ranks by data parallelism
    queue = NTXentLoss(0.3, (12, 16), gather_distributed=True)
    queue(*(x.float() for x in parts))
    torch.testing.assert_close(queue.bank[:6], normalize(whole[1].detach(), dim=1).float())
    local = NTXentLoss(0.3)(*parts)
    torch.testing.assert_close(local, simclr(*parts, 0.3))
    average = NCEAverage(16, 12, K=8, T=0.3, gather_distributed=True)
    average(normalize(parts[0].float(), dim=1), torch.arange(6)[own])
    check_replicas([average.memory, average.z])
    destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gathered_over_ranks(ranks: int) -> None:
    run(losses_of_ranks, ranks)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (-1, r"rows of size=-1 must be an integer, at least 0, got -1"),
        ((-1, 4), r"rows of size=\(-1, 4\) must be an integer, at least 0, got -1"),
        ((4, 0), r"columns of size=\(4, 0\) must be an integer, at least 1, got 0"),
        ((4, 2, -1), r"columns of size=\(4, 2, -1\) must be an integer, at least 1, got -1"),
        ((4.5, 2), r"must be an integer, at least 0, got 4.5"),
        (True, r"must be an integer, at least 0, got True"),
        ((), r"size must be rows or \(rows, columns\), got size=\(\)"),
    ],
)
def test_bad_sizes(size: Any, text: str) -> None:
    for build in (MemoryBankModule, lambda size: NTXentLoss(memory_bank_size=size)):
        with pytest.raises(ValueError, match=text):
            build(size)


@pytest.mark.parametrize("temperature", [0, float("nan"), float("inf"), 1e-9])
@pytest.mark.parametrize("size", [0, (8, 16)])
def test_bad_temperatures(temperature: float, size: Any) -> None:
    with pytest.raises(ValueError, match=r"NTXentLoss: temperature must be in \[1e-8, 1e30\], got"):
        NTXentLoss(temperature, size)


@pytest.mark.parametrize("size", [0, (8, 16)])
def test_a_negative_temperature_warns_and_has_lightlys_value(size: Any) -> None:
    with pytest.warns(UserWarning, match=r"NTXentLoss: temperature=-0\.5 makes the loss least for opposite positive"):
        loss = NTXentLoss(-0.5, size)
    views = outputs(1), outputs(2)
    expected = moco_loss(*views, loss.bank, -0.5) if size else simclr(*views, -0.5)
    gradients = torch.autograd.grad(expected, views)
    found = loss(*views)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, views), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_sample_without_a_bank_has_a_gradient_of_0_and_warns() -> None:
    for sample in (
        (outputs(1, batch=1), outputs(2, batch=1).detach()),
        (outputs(1, batch=1).detach(), outputs(2, batch=1)),
    ):
        with pytest.warns(UserWarning, match=r"one sample has no negatives.*give at least 2 samples, or a memory bank"):
            loss = NTXentLoss()(*sample)
        loss.backward()
        assert loss == 0
        assert all(view.grad is None or not view.grad.any() for view in sample)
        with torch.no_grad():
            assert NTXentLoss()(*sample) == 0
    assert NTXentLoss(memory_bank_size=(8, 16))(outputs(1, batch=1), outputs(2, batch=1)) > 0


@pytest.mark.parametrize("size", [0, (8, 16)])
@pytest.mark.parametrize(
    ("out0", "out1", "error", "text"),
    [
        (torch.ones(4, 16), torch.ones(3, 16), ValueError, r"out1 must be \[4, 16\] like out0, got \[3, 16\]"),
        (torch.ones(4, 16), torch.ones(4, 8), ValueError, r"out1 must be \[4, 16\] like out0, got \[4, 8\]"),
        (torch.ones(0, 16), torch.ones(0, 16), ValueError, r"out0 must be \[B, columns\], none of them 0"),
        (torch.ones(4, 0), torch.ones(4, 0), ValueError, r"out0 must be \[B, columns\], none of them 0"),
        (torch.ones(16), torch.ones(16), ValueError, r"out0 must be \[B, columns\].*got \[16\]"),
        (torch.ones(4, 16).long(), torch.ones(4, 16), TypeError, r"out0 must be features, floating"),
        (torch.ones(4, 16), [[1.0]], TypeError, r"out1 must be a tensor, got list"),
        (torch.ones(4, 16), torch.ones(4, 16, device="meta"), ValueError, r"out1 is on meta and not on cpu"),
    ],
)
def test_bad_outputs(size: Any, out0: Tensor, out1: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="NTXentLoss: " + text):
        NTXentLoss(memory_bank_size=size)(out0, out1)


def test_outputs_of_another_shape_than_the_bank() -> None:
    with pytest.raises(ValueError, match=r"MemoryBankModule: output must be \[B, 16\], none of them 0, got \[4, 8\]"):
        NTXentLoss(memory_bank_size=(8, 16))(torch.ones(4, 8), torch.ones(4, 8))
    with pytest.raises(TypeError, match=r"output must be a floating tensor \[B, columns\], got torch.int64"):
        MemoryBankModule((8, 16))(torch.ones(4, 16).long())
    with pytest.raises(
        TypeError, match=r"NTXentLoss: features are float64 and the state is torch.float32; call .double"
    ):
        NTXentLoss(memory_bank_size=(8, 16))(torch.ones(4, 16).double(), torch.ones(4, 16).double())
    with pytest.raises(ValueError, match=r"memory_bank_size must be rows or \(rows, columns\), got \(8, 4, 4\)"):
        NTXentLoss(memory_bank_size=(8, 4, 4))


@pytest.mark.parametrize("size", [0, (8, 16)])
def test_a_learned_temperature_has_its_gradient(size: Any) -> None:
    """As in lightly, where the temperature divides the scores: against the formula in float64."""
    loss = NTXentLoss(nn.Parameter(torch.tensor(0.3)), size)
    expected = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    q, k = (normalize(x.double(), dim=1) for x in (a, b))
    if size:
        scores = torch.cat(((q * k).sum(1, keepdim=True), q @ loss.bank.double().T), 1) / expected
        value = cross_entropy(scores, torch.zeros(5, dtype=torch.int64))
    else:
        z = torch.cat((q, k))
        scores = (z @ z.T / expected).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
        value = cross_entropy(scores, torch.arange(10).roll(5))
    value.backward()
    found = loss(a, b)
    found.backward()
    assert isinstance(loss.temperature, Tensor)
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.temperature.grad, expected.grad.float(), rtol=1e-5, atol=1e-5)
    loss.temperature.data.neg_()
    with pytest.raises(RuntimeError, match=r"NTXentLoss: temperature must be in \[1e-8"):
        loss(a, b)


@pytest.mark.parametrize("size", [None, 16.0, torch.tensor(16)], ids=str)
def test_sizes_of_another_type(size: Any) -> None:
    with pytest.raises(ValueError, match=r"MemoryBankModule: size must be rows or \(rows, columns\), got"):
        NTXentLoss(0.1, size)


@pytest.mark.parametrize("temperature", [None, "0.1"])
def test_temperatures_of_another_type(temperature: Any) -> None:
    with pytest.raises(TypeError, match=f"NTXentLoss: temperature must be a number, got {temperature!r}"):
        NTXentLoss(temperature)


@pytest.mark.parametrize("make", [lambda: NTXentLoss(0.1, (8, 4)), lambda: MemoryBankModule((8, 4))])
def test_a_bank_without_values_is_an_error(make: Any) -> None:
    with torch.device("meta"):
        module = make()
    views = [torch.zeros(2, 4, device="cpu")] * (2 if isinstance(module, NTXentLoss) else 1)
    with pytest.raises(RuntimeError, match="MemoryBankModule: its bank is on the meta device and has no values"):
        module(*views)
