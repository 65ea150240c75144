"""bank_nce_dense's CUDA kernels (without tensor cores, mma, wgmma), run on the CPU, against float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sslfast.ops  # noqa: F401  (loads the CPU ops)
from tests.cuda_emulation import emulate, fence

HALVES = [torch.bfloat16, torch.float16]
LOSSES = {"infonce": False, "nce": True}


def draw(*shape: int, seed: int) -> Tensor:
    unit = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(unit, dim=-1)


def arguments(
    *, views: int = 2, batch: int = 3, columns: int = 128, num_rows: int = 300, num_listed: int | None = None,
    dtype: torch.dtype = torch.bfloat16, binary: bool = False, exclude_self: bool = False, temperature: float = 0.07,
    z: Tensor | None = None,
) -> list[Any]:  # fmt: skip
    query, bank = draw(views, batch, columns, seed=columns), draw(num_rows, columns, seed=1)
    generator = torch.Generator().manual_seed(batch)
    index = torch.randint(num_rows, (batch,), generator=generator)
    index[0] = -1  # a query without a positive
    negatives = None
    if num_listed is not None:
        negatives = torch.randint(num_rows, (num_listed,), generator=generator)
        negatives[::7] = index[-1]
    query = query if dtype == torch.float64 else query.float()
    return [query, bank.to(dtype), index, negatives, z, 900.0, temperature, binary, exclude_self]


def assert_agrees(args: list[Any], *, tensor_cores: bool, **device: int) -> None:
    """Tensor cores take queries in the bank's type, and weights of rows rounded to it: that shows in the gradient."""
    query, bank = args[:2]
    exact = (query.to(bank.dtype) if tensor_cores else query).double()
    expected = torch.ops.sslfast.bank_nce_dense(exact, bank.double(), *args[2:])
    fenced = [fence(arg) if isinstance(arg, Tensor) else arg for arg in args]
    tolerance = 1e-13 if bank.dtype == torch.float64 else 3e-6
    rounding = torch.finfo(bank.dtype).eps / 2 if tensor_cores else tolerance
    for value, wanted, atol in zip(
        emulate("bank_nce_dense", *fenced, **device), expected, (tolerance, tolerance, rounding), strict=True
    ):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("columns", [8, 100, 128, 200, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_tensor_cores(dtype: torch.dtype, columns: int, loss: str) -> None:
    args = arguments(dtype=dtype, columns=columns, binary=LOSSES[loss], num_rows=77)
    assert_agrees(args, tensor_cores=False, order=columns % 3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("columns", [100, 512])
def test_half_types_without_tensor_cores(dtype: torch.dtype, columns: int) -> None:
    assert_agrees(arguments(dtype=dtype, columns=columns, num_rows=77), tensor_cores=False, order=2)


def test_bank_at_an_odd_address_or_strided() -> None:
    args = arguments(columns=64, num_rows=77)
    bank = args[1]
    args[1] = torch.empty(bank.numel() + 1, dtype=bank.dtype)[1:].view(bank.shape).copy_(bank)
    expected = torch.ops.sslfast.bank_nce_dense(args[0].double(), bank.double(), *args[2:])
    for value, wanted in zip(emulate("bank_nce_dense", *args), expected, strict=True):  # without tensor cores
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-4)
    for capability in (80, 90):
        straight = emulate("bank_nce_dense", args[0], bank, *args[2:], compute_capability=capability)
        strided = [args[0].transpose(0, 2).contiguous().transpose(0, 2), bank.t().contiguous().t(), *args[2:]]
        for a, b in zip(emulate("bank_nce_dense", *strided, compute_capability=capability), straight, strict=True):
            assert torch.equal(a, b)


def test_empty() -> None:
    for views, batch in ((0, 3), (2, 0)):
        args = arguments(columns=64)
        args[0], args[2] = torch.empty(views, batch, 64), torch.empty(batch, dtype=torch.int64)
        loss, lse, grad = emulate("bank_nce_dense", *args)
        assert (loss.shape, lse.shape, grad.shape) == ((views, batch), (views, batch), (views, batch, 64))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("columns", [8, 64, 72, 128, 200, 256])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma(dtype: torch.dtype, columns: int, loss: str) -> None:
    args = arguments(dtype=dtype, columns=columns, binary=LOSSES[loss])
    assert_agrees(args, tensor_cores=True, order=columns // 8 % 4)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_many_queries_and_parts(dtype: torch.dtype, order: int) -> None:
    args = arguments(dtype=dtype, batch=70, columns=64, num_rows=515, binary=order % 2 == 0)
    assert_agrees(args, tensor_cores=True, order=order, multiprocessors=4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wgmma(dtype: torch.dtype, columns: int, loss: str) -> None:
    for order, num_rows in ((0, 130), (1, 300), (2, 700), (3, 1)):
        if num_rows == 1 and LOSSES[loss]:
            continue  # NCE needs a negative
        args = arguments(dtype=dtype, columns=columns, binary=LOSSES[loss], batch=35, num_rows=num_rows)
        assert_agrees(args, tensor_cores=True, order=order, compute_capability=90)


@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize("z", [1e-30, 1.0, 50.0, 900.0, 1e5, 1e9, 1e28])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nce_of_every_size(dtype: torch.dtype, z: float, compute_capability: int) -> None:
    """Logits near 0, all below -6 ln 2 (three terms of the series), some of either, and far from the offset."""
    args = arguments(dtype=dtype, binary=True, columns=64, num_rows=300, batch=10)
    args[5] = z
    args[0][1, 3] = args[1][200].float()  # one row is close to one query
    assert_agrees(args, tensor_cores=True, order=2, compute_capability=compute_capability)


@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize("logit", [-4.16, -4.2, -5.0, -8.0, -20.0, -3.0, 0.0, 5.0])
def test_error_of_one_logit(logit: float, compute_capability: int) -> None:
    """Of every 128 rows one has this logit, the others none to speak of: below -6 ln 2 = -4.159 the series is off by at
    most 2^-20 in the loss and 2^-18 in the weight, above it the polynomial by 3.3e-7; then comes fp32."""
    tiles, temperature = 3, 0.1
    bank = torch.zeros(128 * tiles, 64, dtype=torch.bfloat16)
    bank[:, 0] = -4.0
    bank[::128, 0] = 1.0
    query = torch.zeros(1, 1, 64)
    query[0, 0, 0] = 1.0
    z = math.exp(1 / temperature - logit) * len(bank) / (len(bank) - 1)
    args = [query, bank, torch.tensor([-1]), None, None, z, temperature, True, False]
    loss, _, grad = emulate("bank_nce_dense", *args, compute_capability=compute_capability)
    fp32 = 2**-23 * (1 / temperature + abs(1 / temperature - logit))  # of the exponent, which E multiplies
    assert loss.item() == pytest.approx(tiles * math.log1p(math.exp(logit)), rel=2**-20 + fp32 + 4e-7)
    weight = tiles / (1 + math.exp(-logit))
    assert grad[0, 0, 0].item() * temperature == pytest.approx(weight, rel=2**-8 + 2**-18 + fp32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wgmma_ring_goes_round(dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype, views=1, batch=5, num_rows=128 * 14 + 3)  # 15 tiles through 6 stages
    for order in (1, 4, 5, 6):
        assert_agrees(args, tensor_cores=True, order=order, multiprocessors=1, compute_capability=90)


@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_temperatures(dtype: torch.dtype, temperature: float, compute_capability: int) -> None:
    args = arguments(dtype=dtype, temperature=temperature, num_rows=200)
    args[0][0, 0] = args[1][150].float()  # the highest score comes late: everything is rescaled
    tensor_cores = dtype != torch.float32
    assert_agrees(args, tensor_cores=tensor_cores, order=3, compute_capability=compute_capability)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_listed_negatives(dtype: torch.dtype, exclude_self: bool, loss: str) -> None:
    for num_listed in (1, 130):
        args = arguments(dtype=dtype, num_listed=num_listed, binary=LOSSES[loss], exclude_self=exclude_self, columns=64)
        args[4] = torch.tensor(123.0, dtype=torch.float64)
        if exclude_self and num_listed == 1:
            args[2][-1] = (args[3][0] + 1) % 300
        assert_agrees(args, tensor_cores=dtype != torch.float32, order=2, compute_capability=90)


@pytest.mark.parametrize(("kernel", "dtype"), [("simt", torch.float32), ("mma", torch.bfloat16)])
def test_rows_out_of_range_trap(kernel: str, dtype: torch.dtype) -> None:
    index, negatives = arguments(dtype=dtype), arguments(dtype=dtype, num_listed=80)
    index[2][1], negatives[3][70] = 300, -1
    for args in (index, negatives):
        with pytest.raises(RuntimeError, match="bank_nce_dense: device trap in"):
            emulate("bank_nce_dense", *args)
