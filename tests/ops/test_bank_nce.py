import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast.ops import bank_nce, bank_nce_reference, estimate_z, negative_rows

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def make(
    device: torch.device,
    *,
    batch: int = 5,
    columns: int = 128,
    num_rows: int = 300,
    views: int | None = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * batch + columns)
    shape = (batch, columns) if views is None else (views, batch, columns)
    query = normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)
    bank = normalize(torch.randn(num_rows, columns, generator=generator, dtype=torch.float64), dim=1)
    index = torch.randint(num_rows, (batch,), generator=generator)
    query = query if dtype == torch.float64 else query.float()
    return query.to(device), bank.to(device, dtype), index.to(device)


def loss_and_gradient(function: Any, query: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    query = query.detach().requires_grad_()
    loss = function(query, *args, **options)
    weights = torch.arange(1, loss.numel() + 1, device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), query)
    return loss.detach(), gradient


def assert_agrees(query: Tensor, bank: Tensor, index: Tensor, **options: Any) -> None:
    """Loss and gradient against the float64 reference on the same stored numbers."""
    loss, gradient = loss_and_gradient(bank_nce, query, bank, index, **options)
    expected, expected_gradient = loss_and_gradient(bank_nce_reference, query.double(), bank.double(), index, **options)
    tolerance = 1e-12 if bank.dtype == torch.float64 else 3e-6  # fp32 sums of K terms
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    scale = max(loss.numel(), expected_gradient.abs().max().item())  # losses are weighted by 1 .. numel
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=scale * tolerance)


@pytest.mark.parametrize(
    "options", [{"loss": "infonce", "z": None}, {"loss": "nce", "z": 900.0}], ids=["infonce", "nce"]
)
@pytest.mark.parametrize("columns", [1, 8, 123, 128, 200, 512])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_float64_reference(
    device: torch.device, dtype: torch.dtype, columns: int, options: dict[str, Any]
) -> None:
    query, bank, index = make(device, columns=columns, dtype=dtype)
    assert_agrees(query, bank, index, num_negatives=101, seed=3, step=2, **options)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("views", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("num_negatives", [1, 15, 16, 17, 1000])
def test_views_and_counts(device: torch.device, views: int | None, num_negatives: int, loss: str) -> None:
    query, bank, index = make(device, views=views)
    assert_agrees(query, bank, index, num_negatives=num_negatives, loss=loss, seed=1, step=9)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_extreme_temperatures(device: torch.device, temperature: float, loss: str) -> None:
    query, bank, index = make(device)
    query[0, 0] = bank[index[0]]  # score 1 / temperature, exp(100) at 0.01
    assert_agrees(query, bank, index, num_negatives=64, temperature=temperature, loss=loss)


def test_large_queries_do_not_overflow(device: torch.device) -> None:
    query, bank, index = make(device)
    for loss in ("infonce", "nce"):
        value, gradient = loss_and_gradient(bank_nce, query * 100, bank, index, num_negatives=50, loss=loss, z=1e4)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_identical_rows_give_log_of_count(device: torch.device) -> None:
    bank = normalize(torch.ones(40, 16, device=device), dim=1)
    loss = bank_nce(bank[:3], bank, torch.arange(3, device=device), num_negatives=33)
    torch.testing.assert_close(loss, torch.full((3,), math.log(34), device=device))


def test_orthogonal_negatives_closed_form(device: torch.device) -> None:
    bank = torch.eye(8, device=device)
    index = torch.arange(8, device=device)
    loss = bank_nce(bank, bank, index, num_negatives=20, temperature=0.5)
    torch.testing.assert_close(loss, torch.full((8,), math.log(math.exp(2) + 20) - 2, device=device))
    # NCE: logits 2 - log(Z K / N) for the positive and -log(Z K / N) for each negative.
    z, offset = 16.0, math.log(16 * 20 / 8)
    expected = math.log1p(math.exp(offset - 2)) + 20 * math.log1p(math.exp(-offset))
    loss = bank_nce(bank, bank, index, num_negatives=20, temperature=0.5, loss="nce", z=z)
    torch.testing.assert_close(loss, torch.full((8,), expected, device=device))


def test_step_zero_values(device: torch.device) -> None:
    """Random unit embeddings: InfoNCE near ln(K+1), NCE near ln(K+1)+1, Z near N exp(1 / (2 D T^2))."""
    query, bank, index = make(device, batch=256, num_rows=20_000)
    negatives = 4096
    infonce, lse = bank_nce(query, bank, index, num_negatives=negatives, return_lse=True)
    isotropic = 1 / (2 * 128 * 0.07**2)  # log E exp(s) for an isotropic unit vector
    assert abs(infonce.mean().item() - (math.log(negatives + 1) + isotropic)) < 0.1
    z = estimate_z(lse, num_negatives=negatives, num_rows=20_000)
    assert abs(z.item() / (20_000 * math.exp(isotropic)) - 1) < 0.05
    nce = bank_nce(query, bank, index, num_negatives=negatives, loss="nce", z=z)
    # E softplus(-u_0) = log(Z K / N) - E s_0 with E s_0 = 0, E sum_k softplus(u_k) just under 1.
    assert abs(nce.mean().item() - (math.log(negatives + 1) + isotropic + 1)) < 0.1


def test_sampled_equals_explicit_rows(device: torch.device) -> None:
    query, bank, index = make(device)
    for exclude_self in (True, False):
        draw = {"seed": 11, "step": 5, "exclude_self": exclude_self}
        rows = negative_rows(index, num_negatives=77, num_rows=300, **draw)
        sampled = bank_nce(query, bank, index, num_negatives=77, **draw)
        torch.testing.assert_close(sampled, bank_nce(query, bank, index, negatives=rows), rtol=1e-6, atol=1e-6)


def test_explicit_rows_shared_repeated_and_many(device: torch.device) -> None:
    query, bank, index = make(device, num_rows=20)
    shared = torch.randint(20, (500,), device=device)  # K > N: rows repeat
    assert_agrees(query, bank, index, negatives=shared)
    assert_agrees(query, bank, index, negatives=shared.expand(5, -1))
    assert_agrees(query, bank, index, negatives=index[:, None].expand(-1, 9), loss="nce", z=3.0)
    assert_agrees(query, bank[:1], index * 0, negatives=torch.zeros(3, dtype=torch.long, device=device))
    assert_agrees(query, bank[:1], index * 0, num_negatives=4, exclude_self=False, loss="nce", z=3.0)


def test_repeated_index_gets_the_same_negatives(device: torch.device) -> None:
    query, bank, index = make(device)
    index[3] = index[1]
    query[:, 3] = query[:, 1]
    loss = bank_nce(query, bank, index, num_negatives=40)
    assert torch.equal(loss[:, 3], loss[:, 1])


def test_z_forms_agree(device: torch.device) -> None:
    query, bank, index = make(device)
    number = bank_nce(query, bank, index, num_negatives=40, loss="nce", z=777.0)
    tensor = bank_nce(query, bank, index, num_negatives=40, loss="nce", z=torch.tensor(777.0, device=device))
    assert torch.equal(number, tensor)
    _, lse = bank_nce(query, bank, index, num_negatives=40, return_lse=True)
    z = estimate_z(lse, num_negatives=40, num_rows=300)
    estimated = bank_nce(query, bank, index, num_negatives=40, loss="nce")
    assert torch.equal(estimated, bank_nce(query, bank, index, num_negatives=40, loss="nce", z=z))


def test_step_tensor_equals_number_and_lse(device: torch.device) -> None:
    query, bank, index = make(device)
    loss, lse = bank_nce(query, bank, index, num_negatives=40, step=7, return_lse=True)
    again = bank_nce(query, bank, index, num_negatives=40, step=torch.tensor(7, device=device))
    assert torch.equal(loss, again)
    _, expected = bank_nce_reference(query.double(), bank.double(), index, num_negatives=40, step=7, return_lse=True)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    assert not lse.requires_grad


def test_thread_count_does_not_change_a_bit() -> None:
    query, bank, index = make(torch.device("cpu"), batch=7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradient(bank_nce, query, bank, index, num_negatives=100))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_gradcheck(device: torch.device, loss: str) -> None:
    query, bank, index = make(device, batch=3, columns=6, num_rows=12, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda q: bank_nce(q, bank, index, num_negatives=5, loss=loss, z=20.0, temperature=0.5),
        (query.requires_grad_(),),
    )


LIST = torch.randint(90, (3,), generator=torch.Generator().manual_seed(5))  # some shards hold none of it
LISTS = torch.randint(90, (5, 40), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("negatives", ["sampled", "shared", "full", LIST, LISTS], ids=str)
def test_shards_equal_the_reference_and_merge(
    device: torch.device, negatives: str | Tensor, exclude_self: bool, loss: str
) -> None:
    """Part by part, then together: sums of a shard add up, log-sum-exps merge."""
    query, bank, index = make(device, num_rows=90, dtype=torch.float64)
    options: dict[str, Any] = {"num_negatives": 60, "loss": loss, "z": 90.0, "temperature": 0.3, "return_lse": True}
    options["exclude_self"] = exclude_self and isinstance(negatives, str)
    options["negatives"] = negatives.to(device) if isinstance(negatives, Tensor) else negatives
    parts = []
    for first, end in ((0, 60), (60, 62), (62, 90)):
        part = []
        for function in (bank_nce, bank_nce_reference):
            leaf = query.clone().requires_grad_()
            losses, lse = function(leaf, bank[first:end], index, shard=(first, 90), **options)
            losses.sum().backward()
            part.append((losses.detach(), lse, leaf.grad))
        for value, wanted in zip(*part, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
        parts.append(part[0])
    losses, lse, gradients = (torch.stack(values) for values in zip(*parts, strict=True))
    whole = query.clone().requires_grad_()
    expected, expected_lse = bank_nce(whole, bank, index, **options)
    expected.sum().backward()
    torch.testing.assert_close(lse.logsumexp(0), expected_lse, rtol=1e-12, atol=1e-12)
    if loss == "nce":
        torch.testing.assert_close(losses.sum(0), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients.sum(0), whole.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shard", [None, (0, 400)])
@pytest.mark.parametrize("wrong", [-1, -2, 400, 2**62, -(2**63)])
@pytest.mark.parametrize("negatives", ["sampled", "shared", "full", LIST, LISTS], ids=str)
def test_rows_outside_of_the_bank(negatives: str | Tensor, wrong: int, shard: tuple[int, int] | None) -> None:
    """-1 too, which bank_nce_dense takes for a query without a positive."""
    query, bank, index = make(torch.device("cpu"), num_rows=400)
    bank = bank if shard is None else bank[:300]
    index[1] = wrong
    with pytest.raises(RuntimeError, match=r"index must be in \[-?[01], \d+\), got"):
        bank_nce(query, bank, index, negatives=negatives, num_negatives=9, shard=shard)
    if isinstance(negatives, Tensor):
        rows = negatives.clone()
        rows.view(-1)[2] = wrong
        with pytest.raises((RuntimeError, ValueError), match=r"negatives must be in \[0, 400\), got"):
            bank_nce(query, bank, index.clamp(0, 299), negatives=rows, shard=shard)


@pytest.mark.parametrize(
    ("held", "options", "message"),
    [
        (90, {"shard": (1, 90)}, r"shard=\(1, 90\) must be \(first row, rows of the whole bank\)"),
        (40, {"shard": (-1, 90)}, r"shard=\(-1, 90\) must be"),
        (1, {"shard": (3, 90)}, "with at least 2 rows here, and bank has 1"),
        (40, {"shard": (0, 90), "loss": "nce"}, "nce on a shard needs z: a single shard cannot estimate it"),
    ],
)
def test_bad_shards(held: int, options: dict[str, Any], message: str) -> None:
    query, bank, index = make(torch.device("cpu"), num_rows=90)
    with pytest.raises(ValueError, match=message):
        bank_nce(query, bank[:held], index, num_negatives=4, **options)


def test_half_queries_and_autocast_types(device: torch.device) -> None:
    query, bank, index = make(device, dtype=torch.bfloat16)
    half = query.bfloat16().requires_grad_()
    loss = bank_nce(half, bank, index, num_negatives=40)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, bank_nce(half.detach().float(), bank, index, num_negatives=40))


def test_non_contiguous_and_empty(device: torch.device) -> None:
    query, bank, index = make(device)
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    wide = torch.cat((bank, bank), dim=1)[:, :128]
    assert not wide.is_contiguous()
    every_second = torch.stack((index, index), dim=1)[:, 0]
    result = loss_and_gradient(bank_nce, strided, wide, every_second, num_negatives=40)
    expected = loss_and_gradient(bank_nce, query, bank, index, num_negatives=40)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
    empty, gradient = loss_and_gradient(bank_nce, query[:, :0], bank, index[:0], num_negatives=40)
    assert empty.shape == (2, 0)
    assert gradient.shape == (2, 0, 128)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_opcheck(device: torch.device, loss: str) -> None:
    query, bank, index = make(device, columns=16)
    step, z = torch.tensor(3, device=device), torch.tensor(50.0, device=device, dtype=torch.float64)
    rows = negative_rows(index, num_negatives=9, num_rows=300, seed=0, step=0)
    binary = loss == "nce"
    op = torch.ops.sslfast.bank_nce.default
    query.requires_grad_()
    for arguments in (
        (query, bank, index, None, None, 3, None, 50.0, 9, 0.07, binary, True, 0),
        (query, bank, index, rows, step, 0, z, 1.0, 9, 0.07, binary, False, 4),
        (query, bank[30:50], index, None, None, 3, None, 50.0, 9, 0.07, binary, True, 0, 30, 300),
    ):
        torch.library.opcheck(op, arguments)


def test_compile_equals_eager(device: torch.device) -> None:
    query, bank, index = make(device)
    step = torch.tensor(3, device=device)

    def run(query: Tensor) -> Tensor:
        return bank_nce(query, bank, index, num_negatives=40, loss="nce", z=500.0, step=step).mean()

    query.requires_grad_()
    compiled = torch.compile(run, fullgraph=True)(query)
    (gradient,) = torch.autograd.grad(compiled, query)
    (expected,) = torch.autograd.grad(run(query), query)
    torch.testing.assert_close(compiled, run(query))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be in \[1e-30, 1e\+30\], got temperature=0.0"),
        ({"loss": "softmax"}, 'loss must be "infonce" or "nce", got \'softmax\''),
        ({"loss": "nce", "z": -1.0}, "z must be positive, got z=-1.0"),
        ({"num_negatives": 0}, "needs at least one negative per sample"),
        ({"negatives": "hard"}, 'negatives must be "sampled", "shared", "full" or int64 rows'),
        ({"negatives": torch.zeros(1, 1, 1, dtype=torch.long)}, r"negatives must have shape \[K\] or \[B, K\]"),
        ({"seed": -3}, "seed must be in"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    query, bank, index = make(torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        bank_nce(query, bank, index, **({"num_negatives": 4} | options))


def test_bad_tensors() -> None:
    query, bank, index = make(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="bank_nce: query must have D=128 columns like bank, got 64"):
        bank_nce(query[..., :64], bank, index, num_negatives=4)
    with pytest.raises(RuntimeError, match="bank_nce: index must have B=5 entries, got 4"):
        bank_nce(query, bank, index[:4], num_negatives=4)
    with pytest.raises(RuntimeError, match="bank_nce: query must be fp64 like bank"):
        bank_nce(query, bank.double(), index, num_negatives=4)
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 300\), got 300 at flat position 0"):
        bank_nce(query, bank, index * 0 + 300, num_negatives=4)
    with pytest.raises(RuntimeError, match=r"bank_nce: negatives must be in \[0, 300\), got -1"):
        bank_nce(query, bank, index, negatives=torch.tensor([-1]))
    with pytest.raises(RuntimeError, match=r"bank_nce: negatives must be in \[0, 300\), got 300"):
        bank_nce(query, bank, index, negatives=torch.full((5, 2), 300))
    with pytest.raises(RuntimeError, match=r"negatives must have shape \[K\] or \[B, K\] with B=5, got \[4, 2\]"):
        bank_nce(query, bank, index, negatives=torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"query must have shape \[..., B, D\], got \[128\]"):
        bank_nce(query[0, 0], bank, index, num_negatives=4)
    with pytest.raises(ValueError, match="drawing negatives needs at least 2 bank rows when exclude_self is True"):
        bank_nce(query, bank[:1], index * 0, num_negatives=4)
    with pytest.raises(ValueError, match="bank_nce: bank is on meta and query on cpu"):
        bank_nce(query, bank.to("meta"), index, num_negatives=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.complex64])
@pytest.mark.parametrize("negatives", ["full", "shared", "sampled", torch.tensor([1, 2])], ids=str)
def test_an_index_of_another_type_is_an_error_in_every_mode(dtype: torch.dtype, negatives: str | torch.Tensor) -> None:
    query, bank = normalize(torch.randn(1, 4, 8), dim=-1), torch.randn(10, 8)
    options = {} if isinstance(negatives, torch.Tensor) or negatives == "full" else {"num_negatives": 3}
    with pytest.raises(RuntimeError, match=r"(bank_nce|negative_rows): index must be int64; convert it with \.long"):
        bank_nce(query, bank, torch.zeros(4, dtype=dtype), negatives=negatives, seed=0, step=0, **options)


def test_no_query_and_no_row() -> None:
    query, bank, index = torch.zeros(1, 0, 8), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(0, 2, dtype=torch.int64)
    for function in (bank_nce, bank_nce_reference):
        assert function(query, bank, index, negatives=rows, loss="nce", seed=0, step=0).shape == (1, 0)
