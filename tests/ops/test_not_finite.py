"""NaN and infinite numbers in queries and bank rows: every op gives what the reference gives, on CPU and CUDA."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.ops import (
    bank_nce,
    bank_nce_reference,
    bank_update_,
    bank_update_reference,
    ema_update_,
    rgb_to_lab,
    rgb_to_lab_reference,
)
from tests.cuda_emulation import emulate

VALUES = [float("nan"), float("inf"), float("-inf")]
ROWS = 70  # of the bank; queries have the positives 0 .. 3
LIST = torch.tensor([1, 9, 20, 40, 41, 3])
PLACES: dict[str, tuple[str, Any]] = {
    "one number of a query": ("query", (1, 5)),
    "a whole query": ("query", (1, slice(None))),
    "one number of a positive": ("bank", (2, 5)),
    "one number of a negative": ("bank", (20, 5)),
    "a whole negative": ("bank", (9, slice(None))),
    "the last row": ("bank", (ROWS - 1, 5)),
    "every row": ("bank", (slice(None), 3)),
    "every row of the first tile": ("bank", (slice(0, 64), 3)),
}


def make(dtype: torch.dtype, place: str, value: float, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    query = normalize(torch.randn(4, columns, generator=generator), dim=1)
    bank = normalize(torch.randn(ROWS, columns, generator=generator), dim=1)
    name, where = PLACES[place]
    {"query": query, "bank": bank}[name][where] = value
    return query.to(torch.float64 if dtype == torch.float64 else torch.float32), bank.to(dtype), torch.arange(4)


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return t.isnan() * 1 + (t == torch.inf) * 2 + (t == -torch.inf) * 3


def assert_same(value: Tensor, expected: Tensor, *, tolerance: float, gradient: bool = False) -> None:
    """The same numbers; in a gradient, whose sums of infinite terms end in inf or NaN, the same finite ones."""
    found, wanted = kinds(value), kinds(expected)
    if gradient:
        found, wanted = found != 0, wanted != 0
    assert torch.equal(found, wanted), f"{value}\n{expected}"
    finite = expected.isfinite()
    size = max(1.0, expected[finite].abs().max().item() if finite.any() else 1.0)
    torch.testing.assert_close(value[finite].double(), expected[finite].double(), rtol=0, atol=tolerance * size)


def run(function: Any, query: Tensor, bank: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    query = query.clone().requires_grad_()
    loss, lse = function(query, bank, index, return_lse=True, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    return loss.detach(), lse, gradient


@pytest.mark.parametrize("negatives", ["sampled", "shared", "full", LIST, LIST.expand(4, -1)], ids=str)
@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_bank_nce_equals_the_reference(
    device: torch.device, place: str, value: float, loss: str, negatives: str | Tensor
) -> None:
    options = {"loss": loss, "z": 50.0, "num_negatives": 10, "seed": 1}
    options["negatives"] = negatives.to(device) if isinstance(negatives, Tensor) else negatives
    for dtype, columns in ((torch.float32, 16), (torch.float64, 21), (torch.bfloat16, 64)):
        arguments = [t.to(device) for t in make(dtype, place, value, columns)]
        expected = run(bank_nce_reference, *(t.double() if t.is_floating_point() else t for t in arguments), **options)
        found = run(bank_nce, *arguments, **options)
        tolerance = 2e-2 if device.type == "cuda" and dtype == torch.bfloat16 else 1e-5
        for name, a, b in zip(("loss", "lse", "gradient"), found, expected, strict=True):
            assert_same(a, b, tolerance=tolerance, gradient=name == "gradient")


def assert_kernels_agree(op: str, arguments: list[Any], tolerance: float, **device: int) -> None:
    """A kernel run on the CPU beside the CPU's own in float64."""
    expected = getattr(torch.ops.sslfast, op)(arguments[0].double(), arguments[1].double(), *arguments[2:])
    found = emulate(op, *arguments, **device)
    for name, a, b in zip(("loss", "lse", "gradient"), found, expected, strict=True):
        assert_same(a, b, tolerance=tolerance, gradient=name == "gradient")


@pytest.mark.parametrize("binary", [False, True], ids=["infonce", "nce"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    "place", ["one number of a query", "one number of a positive", "one number of a negative", "every row"]
)
def test_cuda_kernels_equal_the_reference(place: str, value: float, binary: bool) -> None:
    for dtype, columns in ((torch.float32, 16), (torch.bfloat16, 21)):
        query, bank, index = make(dtype, place, value, columns)
        for rows in (None, LIST.expand(4, -1).contiguous()):
            count = 10 if rows is None else len(LIST)
            arguments = [query[None], bank, index, rows, None, 0, None, 50.0, count, 0.07, binary, rows is None, 1]
            assert_kernels_agree("bank_nce", arguments, 1e-5)
        shard = [query[None], bank[:30], index, None, None, 0, None, 50.0, 60, 0.07, binary, True, 1, 0, ROWS]
        assert_kernels_agree("bank_nce", shard, 1e-5)
    for dtype, columns, capability in ((torch.float32, 16, 80), (torch.bfloat16, 64, 80), (torch.float16, 64, 90)):
        query, bank, index = make(dtype, place, value, columns)
        if columns == 64:  # tensor cores take queries in the bank's type
            query = query.to(dtype).float()
        for rows in (None, LIST):
            arguments = [query[None], bank, index, rows, None, 50.0, 0.07, binary, rows is not None]
            assert_kernels_agree("bank_nce_dense", arguments, 2e-2, compute_capability=capability)


def test_rows_that_are_not_scored_stay_out_of_the_gradient() -> None:
    """Blocks of rows are filled up: a NaN in a row that was not drawn for a sample must not reach it."""
    query, bank, index = make(torch.float32, "one number of a query", 0.0, 16)
    for count in (1, 5, 16, 17, 64, 65):
        rows = torch.zeros(4, count, dtype=torch.int64) + 50
        bank[:50] = torch.nan
        bank[60:] = torch.nan
        arguments = [query[None], bank, torch.full((4,), 50), rows, None, 0, None, 50.0, count, 0.07, False, False, 1]
        drawn = [query[None], bank[50:60], index, None, None, 0, None, 50.0, count, 0.07, False, True, 1]
        for call in (arguments, drawn):
            for outputs in (torch.ops.sslfast.bank_nce(*call), emulate("bank_nce", *call)):
                assert all(t.isfinite().all() for t in outputs)
        part = [query[None], bank[50:60], torch.full((4,), 50), rows, None, 0, None, 50.0, count, 0.07, False, False, 1]
        for outputs in (torch.ops.sslfast.bank_nce(*part, 50, ROWS), emulate("bank_nce", *part, 50, ROWS)):
            assert all(t.isfinite().all() for t in outputs)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_bank_update_equals_the_reference(device: torch.device, momentum: float, value: float) -> None:
    for where in ("bank", "features"):
        bank, features = torch.rand(5, 7), torch.rand(3, 7)
        {"bank": bank, "features": features}[where][1, 2] = value
        index = torch.tensor([1, 1, 4])
        expected, found = bank.clone(), bank.clone().to(device)
        bank_update_reference(expected, index, features, momentum=momentum)
        bank_update_(found, index.to(device), features.to(device), momentum=momentum)
        emulated = bank.clone()
        emulate("bank_update_", emulated, index, features, momentum)
        for result in (found.cpu(), emulated):
            torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_ema_update_keeps_what_is_not_finite(device: torch.device, momentum: float, value: float) -> None:
    target, source = torch.ones(2, 4), torch.full((2, 4), 2.0)
    target[0, 1] = source[1, 2] = value
    expected = torch.lerp(target, source, 1 - momentum)
    moved = target.clone().to(device)
    ema_update_([moved], [source.to(device)], momentum=momentum)
    torch.testing.assert_close(moved.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("value", VALUES)
def test_lab_equals_the_reference(device: torch.device, value: float) -> None:
    pixels = torch.rand(3, 3, 2, 2)
    for channel in range(3):
        pixels[channel, channel, 0, 1] = value
    expected = rgb_to_lab_reference(pixels)
    for result in (rgb_to_lab(pixels.to(device)).cpu(), emulate("rgb_to_lab", pixels, False)):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3, equal_nan=True)
