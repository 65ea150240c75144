from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from sslfast.ops import bank_update_, bank_update_reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(device: torch.device, dtype: torch.dtype = torch.float32, columns: int = 128, batch: int = 16) -> tuple:
    generator = torch.Generator().manual_seed(columns)
    bank = normalize(torch.randn(50, columns, generator=generator, dtype=torch.float64), dim=1)
    features = torch.randn(batch, columns, generator=generator, dtype=torch.float64)
    index = torch.randperm(50, generator=generator)[:batch]
    return bank.to(device, dtype), index.to(device), features.to(device)


@pytest.mark.parametrize("columns", [1, 7, 128, 333])
@pytest.mark.parametrize("feature_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
def test_equals_reference(
    device: torch.device, bank_dtype: torch.dtype, feature_dtype: torch.dtype, columns: int
) -> None:
    bank, index, features = make(device, bank_dtype, columns)
    features = features.to(feature_dtype)
    expected = bank.clone()
    bank_update_reference(expected, index, features, momentum=0.3)
    bank_update_(bank, index, features, momentum=0.3)
    # Summation order differs: a few units in the last place of the stored type (2**-8 for bf16, 2**-11 for fp16).
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    if feature_dtype != torch.float64:
        tolerance[torch.float64] = 1e-14
    torch.testing.assert_close(bank, expected, rtol=0, atol=tolerance[bank_dtype])
    untouched = torch.ones(50, dtype=torch.bool, device=device)
    untouched[index] = False
    assert torch.equal(bank[untouched], make(device, bank_dtype, columns)[0][untouched])


def test_known_answer(device: torch.device) -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    bank_update_(bank, torch.tensor([0], device=device), torch.tensor([[0.0, 1.0]], device=device), momentum=0.5)
    torch.testing.assert_close(bank, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]], device=device))


def test_momentum_weighs_the_old_row(device: torch.device) -> None:
    bank, index, features = make(device)
    kept = bank.clone()
    bank_update_(kept, index, features, momentum=1.0)
    torch.testing.assert_close(kept, bank)
    bank_update_(bank, index, features.float(), momentum=0.0)
    torch.testing.assert_close(bank[index], normalize(features.float(), dim=1))


def test_rows_stay_on_the_unit_sphere(device: torch.device) -> None:
    bank, index, features = make(device)
    for _ in range(20):
        bank_update_(bank, index, features.float())
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(50, device=device))


def test_last_occurrence_wins(device: torch.device) -> None:
    bank, _, features = make(device, batch=7)
    index = torch.tensor([3, 9, 3, 9, 9, 4, 3], device=device)
    alone = bank.clone()
    bank_update_(alone, index[[6, 4, 5]], features[[6, 4, 5]].float(), momentum=0.5)
    bank_update_(bank, index, features.float(), momentum=0.5)
    assert torch.equal(bank, alone)


@pytest.mark.parametrize("function", [bank_update_, bank_update_reference])
def test_minus_one_moves_nothing(device: torch.device, function: Callable[..., None]) -> None:
    bank, _, features = make(device, batch=6)
    index = torch.tensor([-1, 7, -1, 0, -1, 49], device=device)
    expected = bank.clone()
    function(expected, index[index >= 0], features[index >= 0].float())
    function(bank, index, features.float())
    assert torch.equal(bank, expected)
    function(bank, index.clamp_max(-1), features.float())
    assert torch.equal(bank, expected)


def test_opposite_vectors_give_zero_not_nan(device: torch.device) -> None:
    bank = torch.tensor([[1.0, 0.0]], device=device)
    bank_update_(bank, torch.tensor([0], device=device), torch.tensor([[-1.0, 0.0]], device=device), momentum=0.5)
    assert torch.equal(bank, torch.zeros(1, 2, device=device))


def test_non_contiguous_features_and_empty_batch(device: torch.device) -> None:
    bank, index, features = make(device)
    expected = bank.clone()
    bank_update_(expected, index, features.float())
    strided = features.float().t().contiguous().t()
    assert not strided.is_contiguous()
    result = bank.clone()
    bank_update_(result, torch.stack([index, index], 1)[:, 0], strided)
    assert torch.equal(result, expected)
    untouched = bank.clone()
    bank_update_(untouched, index[:0], features[:0])
    assert torch.equal(untouched, bank)


def test_no_gradient_flows(device: torch.device) -> None:
    bank, index, features = make(device)
    bank_update_(bank, index, features.float().requires_grad_())
    assert not bank.requires_grad


def test_opcheck_and_compile(device: torch.device) -> None:
    bank, index, features = make(device)
    torch.library.opcheck(torch.ops.sslfast.bank_update_.default, (bank.clone(), index, features.float(), 0.5))
    expected = bank.clone()
    bank_update_(expected, index, features.float())
    torch.compile(bank_update_, fullgraph=True, backend="aot_eager")(bank, index, features.float())
    assert torch.equal(bank, expected)


def test_bad_arguments() -> None:
    bank, index, features = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got momentum=1.5"):
        bank_update_(bank, index, features, momentum=1.5)
    with pytest.raises(RuntimeError, match=r"features must have shape \[B, D\] = \[16, 128\], got \[15, 128\]"):
        bank_update_(bank, index, features[:15])
    with pytest.raises(RuntimeError, match="bank must be contiguous"):
        bank_update_(bank.t(), index, features)
    with pytest.raises(RuntimeError, match="index must be int64"):
        bank_update_(bank, index.int(), features)
    with pytest.raises(RuntimeError, match="bank must be fp32, fp64, bf16 or fp16"):
        bank_update_(bank.to(torch.int32), index, features)
    with pytest.raises(RuntimeError, match=r"index must be in \[-1, 50\), got -2 at flat position 0"):
        bank_update_(bank, index * 0 - 2, features)
    with pytest.raises(RuntimeError, match=r"features must not share memory with bank; pass features.clone\(\)"):
        bank_update_(bank, index, bank[3 : 3 + len(index)])
    bank_update_(bank, index, bank[3 : 3 + len(index)].clone())


def test_wrong_device() -> None:
    bank, index, features = make(torch.device("cpu"))
    with pytest.raises(ValueError, match="bank_update_: index is on meta and bank on cpu"):
        bank_update_(bank, index.to("meta"), features)


def test_autograd_notices_the_update(device: torch.device) -> None:
    """A backward pass that saved the bank raises an error, as with torch's own in-place functions."""
    bank, index, features = make(device)
    query = features.float().requires_grad_()
    scores = query @ bank.t()
    bank_update_(bank, index, features)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()
