"""InfoNCE in blocks beside the formula, in every derivative and number of blocks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.models import contrast, info_nce


def formula(queries: Tensor, keys: Tensor, positives: Tensor, temperature: float, excluded: Tensor | None) -> Tensor:
    scores = queries @ keys.T / temperature
    if excluded is not None:
        scores = scores.scatter(1, excluded[:, None], -torch.inf)
    return scores.logsumexp(1) - (queries * keys[positives]).sum(1) / temperature


def vectors(*, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (6, 7))
    return tuple(each.to(dtype).requires_grad_() for each in drawn)  # type: ignore[return-value]


POSITIVES = torch.tensor([1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("block", [1, 15, 1 << 21])
@pytest.mark.parametrize("excluded", [None, torch.arange(6)])
def test_every_derivative(block: int, excluded: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "_BLOCK", block)
    given = vectors()

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        return info_nce(queries, keys, POSITIVES, temperature=0.3, excluded=excluded)

    torch.testing.assert_close(loss(*given), formula(*given, POSITIVES, 0.3, excluded))
    assert torch.autograd.gradcheck(loss, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, given)
    assert torch.autograd.gradgradcheck(lambda queries: loss(queries, given[1].detach()), given[:1])
    hessian = torch.func.hessian(lambda queries, keys: loss(queries, keys).sum())(*given)
    wanted = torch.func.hessian(lambda *x: formula(*x, POSITIVES, 0.3, excluded).sum())(*given)
    torch.testing.assert_close(hessian, wanted)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_for_changing_sizes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(info_nce, backend=backend, fullgraph=True)
    for size in (6, 5, 3, 2):
        queries, keys = (x.detach()[:size].requires_grad_() for x in vectors())
        positives, own = torch.arange(size).roll(1), torch.arange(size)
        excluded = own if size > 2 else None
        got = compiled(queries, keys, positives, temperature=0.3, excluded=excluded).sum()
        wanted = formula(queries, keys, positives, 0.3, excluded).sum()
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(got, (queries, keys)), torch.autograd.grad(wanted, (queries, keys))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_and_half_types_round_no_sum(dtype: torch.dtype, backward_inside: bool) -> None:
    given = vectors(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(*given, POSITIVES, temperature=0.3).sum()
        if backward_inside:
            got.backward()
    if not backward_inside:
        got.backward()
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = formula(*exact, POSITIVES, 0.3, None).sum()  # type: ignore[call-arg]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for x, gradient in zip(given, torch.autograd.grad(wanted, exact), strict=True):
        torch.testing.assert_close(x.grad, gradient.to(dtype), rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *(({"temperature": t}, r"temperature must be in \[1e-30, 1e\+30\], got") for t in (0, -1, math.nan, math.inf)),
        ({"queries": torch.ones(6, 4)}, r"queries and keys must be \[N, D\] and \[M, D\].*\[6, 4\] and \[7, 5\]"),
        ({"queries": torch.ones(0, 5)}, r"none of them 0, got \[0, 5\] and \[7, 5\]"),
        ({"keys": torch.ones(5)}, r"got \[6, 5\] and \[5\]"),
        ({"keys": torch.ones(7, 5).long()}, "must be floating, got torch.float64 and torch.int64"),
        ({"positives": POSITIVES[1:]}, r"positives must be int64 \[6\], one a query, got torch.int64 \[5\]"),
        ({"positives": POSITIVES.int()}, r"positives must be int64 \[6\], one a query, got torch.int32 \[6\]"),
        ({"excluded": POSITIVES[None]}, r"excluded must be int64 \[6\], one a query, got torch.int64 \[1, 6\]"),
        ({"keys": torch.ones(7, 5, device="meta")}, r"keys is on meta and queries on cpu; move one with .to\(device\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], text: str) -> None:
    queries, keys = vectors()
    options: dict[str, Any] = {"queries": queries, "keys": keys, "positives": POSITIVES, "temperature": 0.1} | change
    with pytest.raises(ValueError, match="info_nce: .*" + text):
        info_nce(**options)


def test_a_single_key_has_no_gradient() -> None:
    queries, keys = vectors()
    zero = torch.zeros(1, dtype=torch.int64)
    for count, excluded in ((1, None), (2, zero + 1)):
        call = {"positives": zero, "temperature": 0.1, "excluded": excluded}
        with pytest.raises(ValueError, match=r"compared with 1 key, so the loss is 0 .* give at least 2 samples"):
            info_nce(queries[:1], keys[:count], **call)
        torch.testing.assert_close(
            info_nce(queries[:1].detach(), keys[:count].detach(), **call), torch.zeros(1).double()
        )
