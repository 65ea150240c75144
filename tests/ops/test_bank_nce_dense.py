import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.ops import (
    bank_nce,
    bank_nce_dense,
    bank_nce_dense_reference,
    bank_nce_reference,
    estimate_z,
    negative_rows,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = ["full", "list", "list without own"]


def make(
    device: torch.device,
    *,
    batch: int = 5,
    columns: int = 128,
    num_rows: int = 300,
    views: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + columns)
    query = normalize(torch.randn(views, batch, columns, generator=generator, dtype=torch.float64), dim=-1)
    bank = normalize(torch.randn(num_rows, columns, generator=generator, dtype=torch.float64), dim=1)
    index = torch.randint(num_rows, (batch,), generator=generator)
    query = query if dtype == torch.float64 else query.float()
    return query.to(device), bank.to(device, dtype), index.to(device)


def negatives_of(mode: str, index: Tensor, num_rows: int, count: int = 101) -> dict[str, Any]:
    if mode == "full":
        return {}
    generator = torch.Generator().manual_seed(count)
    negatives = torch.randint(num_rows, (count,), generator=generator).to(index.device)
    negatives[: min(count, 2)] = index[0]  # the first sample's own row, twice
    return {"negatives": negatives, "exclude_self": mode == "list without own"}


def run(function: Any, query: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp, and the gradient of the losses' weighted mean."""
    query = query.detach().requires_grad_()
    loss, lse = function(query, *args, **options)
    assert not lse.requires_grad
    weights = torch.linspace(0.5, 1.0, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), query)
    return loss.detach(), lse, gradient


def assert_agrees(query: Tensor, bank: Tensor, index: Tensor, **options: Any) -> None:
    """Against the float64 reference on the same stored numbers.

    CUDA rounds queries and weights to a half-precision bank's type: 2^-9 (bf16) or 2^-12 (fp16) of a score.
    """
    results = run(bank_nce_dense, query, bank, index, **options)
    expected = run(bank_nce_dense_reference, query.double(), bank.double(), index, **options)
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(bank.dtype, 4e-6)
    if query.device.type == "cpu" and bank.dtype != torch.float64:
        tolerance = 4e-6
    for value, wanted in zip(results, expected, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=scale * tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("columns", [1, 8, 64, 123, 128, 200, 512])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_float64_reference(device: torch.device, dtype: torch.dtype, columns: int, loss: str, mode: str) -> None:
    query, bank, index = make(device, columns=columns, dtype=dtype)
    assert_agrees(query, bank, index, loss=loss, z=900.0, **negatives_of(mode, index, 300))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("views", "batch"), [(1, 1), (3, 7), (2, 64), (1, 193), (4, 97)])
@pytest.mark.parametrize("num_rows", [2, 63, 64, 65, 1000])
def test_sizes(device: torch.device, num_rows: int, views: int, batch: int, mode: str) -> None:
    query, bank, index = make(device, views=views, batch=batch, num_rows=num_rows, columns=16)
    for count in (1, 64, 130) if mode != "full" else (1,):
        assert_agrees(query, bank, index, **negatives_of(mode, index, num_rows, count))


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_banks_cut_into_parts(device: torch.device, loss: str) -> None:
    query, bank, index = make(device, batch=3, num_rows=40_000, columns=24)
    assert_agrees(query, bank, index, loss=loss, z=9e4)
    assert_agrees(query, bank, index, loss=loss, z=9e4, **negatives_of("list without own", index, 40_000, 9001))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_extreme_temperatures(device: torch.device, temperature: float, loss: str, mode: str) -> None:
    query, bank, index = make(device)
    query[0, 0] = bank[index[0]]  # score 1 / temperature, exp(100) at 0.01
    query[1, 1] = -bank[index[1]]
    z = 300 * math.exp(1 / (256 * temperature**2))
    assert_agrees(query, bank, index, temperature=temperature, loss=loss, z=z, **negatives_of(mode, index, 300))


def test_large_scores_do_not_overflow(device: torch.device) -> None:
    query, bank, index = make(device)
    for loss in ("infonce", "nce"):
        for value in run(bank_nce_dense, query * 100, bank, index, loss=loss, z=1e4):
            assert value.isfinite().all()


def test_late_maximum(device: torch.device) -> None:
    """The largest score comes last: everything summed before is rescaled."""
    query, bank, index = make(device, num_rows=1000)
    bank = bank.clone()
    bank[-1] = 3 * query[0, 0]
    assert_agrees(query, bank, index)
    assert_agrees(query, bank.flip(0), index)


def test_identical_rows_give_log_of_count(device: torch.device) -> None:
    bank = normalize(torch.ones(40, 16, device=device), dim=1)
    index = torch.arange(3, device=device)
    loss = bank_nce(bank[:3], bank, index, negatives="full")
    torch.testing.assert_close(loss, torch.full((3,), math.log(40), device=device))
    loss = bank_nce(bank[:3], bank, index + 30, negatives=torch.zeros(33, dtype=torch.int64, device=device))
    torch.testing.assert_close(loss, torch.full((3,), math.log(34), device=device))


def test_orthogonal_rows_closed_form(device: torch.device) -> None:
    bank = torch.eye(8, device=device)
    index = torch.arange(8, device=device)
    loss = bank_nce(bank, bank, index, negatives="full", temperature=0.5)
    torch.testing.assert_close(loss, torch.full((8,), math.log(math.exp(2) + 7) - 2, device=device))
    # NCE: logits 2 - log(Z K / N) for the positive and -log(Z K / N) for the 7 others.
    z, offset = 16.0, math.log(16 * 7 / 8)
    expected = math.log1p(math.exp(offset - 2)) + 7 * math.log1p(math.exp(-offset))
    loss = bank_nce(bank, bank, index, negatives="full", temperature=0.5, loss="nce", z=z)
    torch.testing.assert_close(loss, torch.full((8,), expected, device=device))


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_full_equals_every_other_row_as_given_rows(device: torch.device, loss: str) -> None:
    query, bank, index = make(device, num_rows=50)
    others = torch.stack([torch.arange(50, device=device)[torch.arange(50, device=device) != i] for i in index])
    full = bank_nce(query, bank, index, negatives="full", loss=loss)
    torch.testing.assert_close(full, bank_nce(query, bank, index, negatives=others, loss=loss))


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_shared_equals_its_rows(device: torch.device, loss: str, exclude_self: bool) -> None:
    query, bank, index = make(device, num_rows=20)
    draw = {"num_negatives": 90, "seed": 4, "step": torch.tensor(7, device=device)}
    rows = negative_rows(index, **draw, num_rows=20, shared=True)
    assert (rows[None] == index[:, None]).any(), "the draw holds own rows, or this test shows nothing"
    shared = bank_nce(query, bank, index, negatives="shared", loss=loss, z=50.0, exclude_self=exclude_self, **draw)
    expected = [
        bank_nce(query[:, b : b + 1], bank, i[None], negatives=rows[rows != i] if exclude_self else rows, z=50.0)
        for b, i in enumerate(index)
    ]
    if loss == "infonce":
        torch.testing.assert_close(shared, torch.cat(expected, dim=1))
    reference = bank_nce_reference(
        query.double(), bank.double(), index, negatives="shared", loss=loss, z=50.0, exclude_self=exclude_self, **draw
    )
    torch.testing.assert_close(shared.double(), reference, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("negatives", ["shared", "full"])
def test_z_of_the_batch(device: torch.device, negatives: Any) -> None:
    query, bank, index = make(device)
    options: dict[str, Any] = {"negatives": negatives, "num_negatives": 40, "exclude_self": False}
    own, lse = bank_nce(query, bank, index, loss="nce", return_lse=True, **options)
    z = estimate_z(lse, num_negatives=299 if negatives == "full" else 40, num_rows=300)
    assert torch.equal(own, bank_nce(query, bank, index, loss="nce", z=z, **options))
    if negatives == "full":  # exact: the mean over queries of the sum over all rows
        exact = (query.double() @ bank.double().T / 0.07).exp().sum(-1).mean()
        torch.testing.assert_close(z, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_shards_merge(device: torch.device, loss: str) -> None:
    """Index -1 is "no positive here": partial results of two shards give the whole."""
    query, bank, index = make(device, num_rows=300)
    whole, lse, gradient = run(bank_nce_dense, query, bank, index, loss=loss, z=700.0)
    no_positive = torch.full_like(index, -1)
    positive = (query * bank[index]).sum(-1) / 0.07
    if loss == "infonce":
        parts = [run(bank_nce_dense, query, bank[shard], no_positive) for shard in (slice(0, 110), slice(110, 300))]
        merged = torch.stack([part[1] for part in parts]).logsumexp(0)
        torch.testing.assert_close(merged, lse)
        torch.testing.assert_close(merged - positive, whole)
        weights = torch.linspace(0.5, 1.0, merged.numel(), device=device).reshape(merged.shape)[..., None]
        rows = sum((part[1] - merged).exp()[..., None] * part[2] for part in parts)
        torch.testing.assert_close(rows - weights * bank[index] / 0.07, gradient, rtol=1e-4, atol=1e-5)
    else:
        # N and K enter through log(Z K / N) alone: shards of 110 and 190 rows get the Z that keeps it.
        offset = 700.0 * 299 / 300
        parts = [
            bank_nce_dense(query, bank[:110], no_positive, loss=loss, z=offset * 110 / 109)[0],
            bank_nce_dense(query, bank[110:], no_positive, loss=loss, z=offset * 190 / 189)[0],
        ]
        torch.testing.assert_close(sum(parts) - (positive - math.log(offset)), whole)


def test_own_row_alone_in_the_list(device: torch.device) -> None:
    query, bank, index = make(device, batch=1)
    loss, lse, gradient = run(bank_nce_dense, query, bank, index, negatives=index.expand(70), exclude_self=True)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(lse, (query * bank[index]).sum(-1) / 0.07)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=2e-6)


def test_empty_non_contiguous_and_repeated(device: torch.device) -> None:
    query, bank, index = make(device, batch=6)
    assert bank_nce_dense(query[:, :0], bank, index[:0])[0].shape == (2, 0)
    assert bank_nce_dense(query[:0], bank, index)[0].shape == (0, 6)
    assert bank_nce(query[:, :0], bank, index[:0], negatives="full").shape == (2, 0)
    wide = torch.stack((bank, -bank), dim=2)[..., 0]
    assert not wide.is_contiguous()
    flipped = query.transpose(0, 1).contiguous().transpose(0, 1)
    plain = bank_nce_dense(query, bank, index)
    strided = bank_nce_dense(flipped, wide, torch.stack((index, index), dim=1)[:, 0])
    assert torch.equal(plain[0], strided[0])
    index[3], query[:, 3] = index[1], query[:, 1]
    loss = bank_nce_dense(query, bank, index)[0]
    assert torch.equal(loss[:, 3], loss[:, 1])


def test_gradcheck(device: torch.device) -> None:
    query, bank, index = make(device, batch=3, columns=6, num_rows=20, dtype=torch.float64)
    query.requires_grad_()
    for options in ({}, {"loss": "nce", "z": 30.0}, negatives_of("list without own", index, 20, 9)):
        for temperature in (0.2, 1.0):

            def loss(q: Tensor, options: Any = options, temperature: float = temperature) -> Tensor:
                return bank_nce_dense(q, bank, index, temperature=temperature, **options)[0]

            assert torch.autograd.gradcheck(loss, query)


def test_opcheck_and_compile(device: torch.device) -> None:
    query, bank, index = make(device)
    query.requires_grad_()
    z = torch.tensor(900.0, device=device, dtype=torch.float64)
    for arguments in ((None, None, 1.0, 0.07, False, False), (index, z, 1.0, 0.2, True, True)):
        torch.library.opcheck(torch.ops.sslfast.bank_nce_dense.default, (query, bank, index, *arguments))

    def step(query: Tensor, step: Tensor) -> Tensor:
        full = bank_nce(query, bank, index, negatives="full")
        shared = bank_nce(query, bank, index, negatives="shared", num_negatives=33, loss="nce", step=step)
        assert isinstance(full, Tensor)
        assert isinstance(shared, Tensor)
        return full.mean() + shared.mean()

    number = torch.tensor(3, device=device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, number), step(query, number))
    (gradient,) = torch.autograd.grad(compiled(query, number), query)
    torch.testing.assert_close(gradient, torch.autograd.grad(step(query, number), query)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be in \[1e-30, 1e\+30\], got temperature=0.0"),
        ({"loss": "softmax"}, 'loss must be "infonce" or "nce", got \'softmax\''),
        ({"loss": "nce", "z": -1.0}, "z must be positive, got z=-1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    query, bank, index = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        bank_nce_dense(query, bank, index, **options)


def test_bad_tensors() -> None:
    query, bank, index = make(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"index must be in \[-1, 300\), got 300 at flat position 0"):
        bank_nce_dense(query, bank, index * 0 + 300)
    with pytest.raises(RuntimeError, match="bank_nce_dense: query must be fp32"):
        bank_nce_dense(query.double(), bank, index)
    with pytest.raises(RuntimeError, match=r"query must have shape \[V, B, D\], got \[5, 128\]"):
        bank_nce_dense(query[0], bank, index)
    with pytest.raises(RuntimeError, match="negatives must name at least one row"):
        bank_nce_dense(query, bank, index, negatives=index[:0])
    with pytest.raises(RuntimeError, match=r"negatives must have shape \[K\], got \[5, 1\]"):
        bank_nce_dense(query, bank, index, negatives=index[:, None])
    with pytest.raises(RuntimeError, match=r"negatives must be in \[0, 300\), got -1 at flat position 0"):
        bank_nce_dense(query, bank, index, negatives=torch.tensor([-1]))
    with pytest.raises(RuntimeError, match="exclude_self is for given negatives"):
        bank_nce_dense(query, bank, index, exclude_self=True)
    with pytest.raises(RuntimeError, match="NCE against the whole bank needs at least 2 rows, got 1"):
        bank_nce_dense(query, bank[:1], index * 0, loss="nce")
    with pytest.raises(ValueError, match="nce against the full bank needs at least 2 rows, got 1"):
        bank_nce(query, bank[:1], index * 0, negatives="full", loss="nce")
    with pytest.raises(ValueError, match="bank is on meta and query on cpu"):
        bank_nce_dense(query, bank.to("meta"), index)


def test_threads_do_not_change_the_result() -> None:
    query, bank, index = make(torch.device("cpu"), batch=200, num_rows=20_000, columns=16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(bank_nce_dense, query, bank, index))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
