"""The peers of bank_nce compute the same loss and gradient."""

import functools

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.peers import PEERS, Peer, dense, gather
from benchmarks.peers.dense import chunked, split_attention
from sslfast.ops import bank_nce_reference, negative_rows


def reference(query: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, **options: object) -> tuple:
    query = query.double().requires_grad_()
    loss = bank_nce_reference(query, bank.double(), index, **options)  # type: ignore[arg-type]
    assert isinstance(loss, torch.Tensor)
    return loss.detach(), torch.autograd.grad(loss.sum(), query)[0]


def make(dtype: torch.dtype, device: torch.device, *, num_rows: int = 203) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = normalize(torch.randn(2, 6, 32, generator=generator), dim=-1)
    bank = normalize(torch.randn(num_rows, 32, generator=generator), dim=1)
    index = torch.randint(num_rows, (6,), generator=generator)
    if dtype == torch.float64:
        query = query.double()
    return query.to(device), bank.to(device, dtype), index.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.mode}-{peer.name}")
def test_equals_float64_reference(
    device: torch.device, peer: Peer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled peers are traced as in the benchmark, without generating machine code.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for module in (dense, gather):
        module._compiled.cache_clear()
    if dtype == torch.float64 and peer.name == "split attention" and device.type == "cuda":
        dtype = torch.float16  # the CUDA kernels have no float64
    query, bank, index = make(dtype, device)
    draw = {"num_negatives": 50, "num_rows": len(bank), "seed": 1, "step": 2}
    rows = None if peer.mode == "full" else negative_rows(index, **draw, shared=peer.mode == "shared")
    loss, gradient = peer.function(query, bank, index, rows, temperature=0.1)
    options = {"negatives": peer.mode, "num_negatives": 50, "seed": 1, "step": 2, "temperature": 0.1}
    expected, slope = reference(query, bank, index, **options)
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    tolerance = 5e-2 if half else tolerance  # products in bf16: 8 bits, scores up to 10
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * slope.abs().max().item())


@pytest.mark.parametrize("num_rows", [3, 8, 16, 17])
def test_chunks_and_heads_of_every_size(device: torch.device, num_rows: int) -> None:
    query, bank, index = make(torch.float32, device, num_rows=num_rows)
    expected = reference(query, bank, index, negatives="full", temperature=0.1)
    for loss, gradient in (
        chunked(query, bank, index, None, temperature=0.1, chunk=5),
        split_attention(query, bank, index, None, temperature=0.1, heads=4),
    ):
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-4)


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    query, bank, index = make(torch.float32, device)
    expected = reference(query, bank, index, negatives="full", temperature=0.01)
    for function in (chunked, split_attention):
        loss, _ = function(query, bank, index, None, temperature=0.01)
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-4, atol=1e-4)
