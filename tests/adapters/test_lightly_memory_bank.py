"""Against MoCo's loss and a first-in, first-out queue, written out in torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslfast.adapters.lightly_memory_bank import MemoryBankModule, NTXentLoss


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
    module = MemoryBankModule(size=(8, 16), dim_first=False)
    assert module(keys)[1].shape == (8, 16)
    assert MemoryBankModule(size=0)(keys, update=True) == (keys, None)
    assert MemoryBankModule(size=(0, 16))(keys, labels=None) == (keys, None)


def test_newest_keys_stay_where_the_batch_does_not_divide_the_queue() -> None:
    module = MemoryBankModule(size=(7, 16))
    keys = torch.cat([outputs(seed).detach() for seed in range(5)])
    for part in keys.split(4):
        module(part, update=True)
    assert {tuple(row) for row in module.bank.tolist()} == {tuple(row) for row in keys[-7:].tolist()}
    assert module.bank_ptr == 20 % 7


def test_rows_only_take_the_columns_of_the_first_batch_or_of_a_checkpoint() -> None:
    module = MemoryBankModule(size=8)
    module(outputs(1), update=True)
    assert module.bank.shape == (8, 16)
    resumed = MemoryBankModule(size=8)
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
    module = NTXentLoss(memory_bank_size=8)
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


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"MemoryBankModule: size must be rows or \(rows, columns\), none negative"):
        MemoryBankModule(size=(-1, 4))
    with pytest.raises(ValueError, match="NTXentLoss: temperature must be at least 1e-8, got temperature=0"):
        NTXentLoss(0, memory_bank_size=(8, 16))
    with pytest.raises(ValueError, match="memory_bank_size must be at least 1 row, got 0"):
        NTXentLoss(memory_bank_size=0)
