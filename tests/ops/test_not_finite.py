"""NaN and infinite numbers in queries and bank rows: every op gives what the reference gives, on CPU and CUDA."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.ops import bank_nce, bank_nce_reference, bank_update_, bank_update_reference, ema_update_, rgb_to_lab
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
