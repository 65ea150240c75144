"""bank_nce against the papers' formulas, written out here in float64 sample by sample, and against closed forms.

InfoNCE: van den Oord et al. 2018, equation 4. NCE: Wu et al. 2018, equations 2 and 5 to 8, PIRL (Misra & van der Maaten
2020) equations 2 and 3 with h = P / (P + K P_n), P = exp(q . m / τ) / Z, P_n = 1 / N. Z: Wu et al., section 3.2.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from sslfast.methods.pirl import PIRL
from sslfast.models.resnet import ResNetConfig
from sslfast.ops import bank_nce, estimate_z, negative_rows
from tests.tiny import context


@dataclass
class Draw:
    """Queries ``[V, B, D]`` and a bank ``[N, D]`` as stored, positives ``[B]``, negatives ``[B, K]``."""

    query: Tensor
    bank: Tensor
    index: Tensor
    rows: Tensor


def draw(
    device: torch.device | None = None,
    *,
    views: int = 2,
    batch: int = 4,
    columns: int = 24,
    num_rows: int = 50,
    negatives: int = 30,
    dtype: torch.dtype = torch.float32,
) -> Draw:
    generator = torch.Generator().manual_seed(97 * views + batch)
    query = normalize(torch.randn(views, batch, columns, generator=generator, dtype=torch.float64), dim=-1)
    bank = normalize(torch.randn(num_rows, columns, generator=generator, dtype=torch.float64), dim=1)
    index = torch.randint(num_rows, (batch,), generator=generator)
    rows = torch.randint(num_rows, (batch, negatives), generator=generator)
    query = query if dtype == torch.float64 else query.float()
    return Draw(query.to(device), bank.to(device, dtype), index.to(device), rows.to(device))


def probabilities(d: Draw, v: int, b: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(exp of the positive's score, exp of the negatives' ``[K]``, rows ``[K + 1, D]``), as exp needs float64."""
    chosen = d.bank.double().cpu()[torch.cat((d.index[b : b + 1], d.rows[b])).cpu()]
    exponentials = (chosen @ d.query[v, b].double().cpu() / temperature).exp()
    return exponentials[0], exponentials[1:], chosen


def infonce_formula(d: Draw, temperature: float) -> tuple[Tensor, Tensor]:
    """``-log(f_0 / sum_k f_k)`` and its derivative by the query, ``sum_k (f_k / sum f - [k = 0]) m_k / τ``."""
    losses, gradients = torch.zeros(d.query.shape[:2]).double(), torch.zeros(d.query.shape).double()
    for v, b in torch.cartesian_prod(*(torch.arange(n) for n in losses.shape)).reshape(-1, 2).tolist():
        positive, negatives, chosen = probabilities(d, v, b, temperature)
        total = positive + negatives.sum()
        losses[v, b] = -(positive / total).log()
        weights = torch.cat((positive[None], negatives)) / total
        weights[0] -= 1
        gradients[v, b] = weights @ chosen / temperature
    return losses, gradients


def nce_formula(d: Draw, temperature: float, z: float) -> tuple[Tensor, Tensor]:
    """``-log h(m_0) - sum_k log(1 - h(m_k))`` and ``(-(1 - h(m_0)) m_0 + sum_k h(m_k) m_k) / τ``."""
    losses, gradients = torch.zeros(d.query.shape[:2]).double(), torch.zeros(d.query.shape).double()
    noise = d.rows.shape[1] / len(d.bank)  # K P_n
    for v, b in torch.cartesian_prod(*(torch.arange(n) for n in losses.shape)).reshape(-1, 2).tolist():
        positive, negatives, chosen = probabilities(d, v, b, temperature)
        h_positive, h_negatives = positive / z / (positive / z + noise), negatives / z / (negatives / z + noise)
        # 1 - h = K P_n / (P + K P_n), which keeps its digits where h is near 1.
        losses[v, b] = -h_positive.log() - (noise / (negatives / z + noise)).log().sum()
        gradients[v, b] = (torch.cat(((h_positive - 1)[None], h_negatives)) @ chosen) / temperature
    return losses, gradients


def z_formula(d: Draw, temperature: float) -> float:
    """``N * mean(exp(s))`` over all views, samples and K + 1 scores."""
    parts = [
        torch.cat((p[None], n))
        for v in range(d.query.shape[0])
        for b in range(d.query.shape[1])
        for p, n, _ in [probabilities(d, v, b, temperature)]
    ]
    return len(d.bank) * torch.cat(parts).mean().item()


def assert_formula(d: Draw, loss: str, *, temperature: float = 0.07, z: float | None = None, **options: Any) -> None:
    query = d.query.clone().requires_grad_()
    chosen = options or {"negatives": d.rows}
    value = bank_nce(query, d.bank, d.index, temperature=temperature, loss=loss, z=z, **chosen)  # type: ignore[arg-type]
    assert isinstance(value, Tensor)
    (gradient,) = torch.autograd.grad(value.sum(), query)
    known = z_formula(d, temperature) if z is None else z
    expected, slope = infonce_formula(d, temperature) if loss == "infonce" else nce_formula(d, temperature, known)
    # A score of up to 1/τ is itself rounded: one unit in the last place of 100 is 7.6e-6 in fp32.
    tolerance = 1e-12 if d.bank.dtype == torch.float64 else max(4e-6, 2**-23 / temperature)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(value.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    scale = max(1.0, slope.abs().max().item())
    torch.testing.assert_close(gradient.double().cpu(), slope, rtol=0, atol=scale * tolerance)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("loss", "z"), [("infonce", None), ("nce", 120.0), ("nce", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fixed_draws(device: torch.device, views: int, loss: str, z: float | None, dtype: torch.dtype) -> None:
    assert_formula(draw(device, views=views, dtype=dtype), loss, z=z)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(("loss", "z"), [("infonce", None), ("nce", 120.0), ("nce", None)])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_whole_bank_and_shared_draw(
    device: torch.device, temperature: float, loss: str, z: float | None, views: int
) -> None:
    """Full: all other rows are the negatives, K = N - 1, and Z estimated from the batch is the exact one."""
    d = draw(device, views=views)
    everyone = torch.arange(50, device=device).expand(4, -1)
    others = everyone[everyone != d.index[:, None]].reshape(4, 49)
    assert_formula(replace(d, rows=others), loss, temperature=temperature, z=z, negatives="full")
    rows = negative_rows(d.index, num_negatives=30, num_rows=50, seed=4, step=5, shared=True)
    options = {"negatives": "shared", "num_negatives": 30, "seed": 4, "step": 5, "exclude_self": False}
    assert_formula(replace(d, rows=rows.expand(4, -1)), loss, temperature=temperature, z=z, **options)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_temperatures(device: torch.device, dtype: torch.dtype, loss: str, temperature: float) -> None:
    """At 0.01 a score reaches ±100: exp(100) overflows fp32. A positive and a negative are perfect, one opposite."""
    d = draw(device, dtype=dtype)
    d.bank[d.index[0]] = d.query[0, 0].to(dtype)
    d.bank[d.rows[1, 3]] = d.query[0, 1].to(dtype)
    d.bank[d.rows[2, 5]] = -d.query[0, 2].to(dtype)
    assert_formula(d, loss, temperature=temperature)  # nce: Z from the batch, up to exp(100)
    if loss == "nce":
        for z in (1e-6, 50.0, 1e12):
            assert_formula(d, loss, temperature=temperature, z=z)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_more_negatives_than_rows(device: torch.device, loss: str) -> None:
    d = draw(device, num_rows=7, negatives=100)
    assert_formula(d, loss)
    for exclude_self in (True, False):
        rows = negative_rows(d.index, num_negatives=100, num_rows=7, seed=2, step=3, exclude_self=exclude_self)
        options = {"num_negatives": 100, "seed": 2, "step": 3, "exclude_self": exclude_self}
        assert_formula(replace(d, rows=rows), loss, **options)


def test_bank_of_one_row(device: torch.device) -> None:
    """Every negative is the positive: InfoNCE is ln(K + 1) and flat, so it is refused unless rows are given."""
    d = draw(device, num_rows=1, negatives=9)
    assert_formula(d, "nce", z=2.0, num_negatives=9, exclude_self=False)
    query = d.query.clone().requires_grad_()
    value = bank_nce(query, d.bank, d.index, negatives=d.index.new_zeros(9))
    assert isinstance(value, Tensor)
    torch.testing.assert_close(value.detach(), torch.full_like(value, math.log(10)))
    value.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"infonce needs at least 2 bank rows, got 1"):
        bank_nce(d.query, d.bank, d.index, num_negatives=9, exclude_self=False)
    with pytest.raises(ValueError, match="drawing negatives needs at least 2 bank rows when exclude_self is True"):
        bank_nce(d.query, d.bank, d.index, num_negatives=9)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
def test_duplicate_indices(device: torch.device, loss: str) -> None:
    d = draw(device, batch=6)
    d.index[:] = torch.tensor([5, 5, 7, 5, 7, 7], device=device)
    assert_formula(d, loss)
    rows = negative_rows(d.index, num_negatives=30, num_rows=50, seed=0, step=0)
    assert torch.equal(rows[0], rows[3])
    assert_formula(replace(d, rows=rows), loss, num_negatives=30)


@pytest.mark.parametrize("loss", ["infonce", "nce"])
@pytest.mark.parametrize("repeated", ["positive", "other"])
def test_one_row_for_all_negatives(device: torch.device, loss: str, repeated: str) -> None:
    d = draw(device, negatives=33)
    d.rows[:] = d.index[:, None] if repeated == "positive" else (d.index[:, None] + 1) % 50
    assert_formula(d, loss)
    one = replace(d, index=d.index[:1].expand(4), rows=d.rows[:1].expand(4, -1))
    assert_formula(one, loss, negatives=one.rows[0])
    query = d.query.double()
    positive, other = ((query * d.bank.double()[r]).sum(-1) / 0.07 for r in (d.index, d.rows[:, 0]))
    closed = torch.log1p(33 * (other - positive).exp())  # ln(1 + K exp(s_1 - s_0))
    value = bank_nce(d.query, d.bank, d.index, negatives=d.rows)
    assert isinstance(value, Tensor)
    torch.testing.assert_close(value.double(), closed, rtol=1e-5, atol=1e-6)


def test_gradient_closed_forms(device: torch.device) -> None:
    """An orthonormal bank and the query on its positive: softmax and sigmoids have known values."""
    temperature, count, z = 0.5, 6, 20.0
    bank = torch.eye(8, device=device)
    index, rows = torch.tensor([2], device=device), torch.tensor([[0, 1, 3, 4, 5, 7]], device=device)

    def slope(**options: Any) -> Tensor:
        query = bank[None, 2:3].clone().requires_grad_()
        loss = bank_nce(query, bank, index, negatives=rows, temperature=temperature, **options)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss.sum(), query)[0][0, 0]

    total = math.exp(2) + count
    expected = torch.full((8,), 1 / total / temperature, device=device)
    expected[2], expected[6] = (math.exp(2) / total - 1) / temperature, 0
    torch.testing.assert_close(slope(), expected)
    noise = z * count / 8
    expected = torch.full((8,), 1 / (1 + noise) / temperature, device=device)
    expected[2], expected[6] = -noise / (math.exp(2) + noise) / temperature, 0
    torch.testing.assert_close(slope(loss="nce", z=z), expected)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_step_zero(device: torch.device, temperature: float) -> None:
    """Isotropic unit rows: s has variance 1 / (D τ²), so Z = N exp(e) with e = 1 / (2 D τ²), 0.797 at D 128, τ 0.07.

    Then InfoNCE is ln(K + 1) + e, and NCE ln(K) + e + 1: the positive's -log h is near log(Z K / N), and each of the K
    negatives gives h near 1 / K.
    """
    d = draw(device, batch=256, columns=128, num_rows=20_000, negatives=1)
    count, e = 4096, 1 / (2 * 128 * temperature**2)
    options = {"num_negatives": count, "temperature": temperature}
    infonce, lse = bank_nce(d.query, d.bank, d.index, return_lse=True, **options)  # type: ignore[call-overload]
    assert abs(infonce.mean().item() - (math.log(count + 1) + e)) < 0.1
    z = estimate_z(lse, num_negatives=count, num_rows=20_000)
    assert abs(z.item() / (20_000 * math.exp(e)) - 1) < 0.05
    nce = bank_nce(d.query, d.bank, d.index, loss="nce", z=z, **options)  # type: ignore[call-overload]
    assert abs(nce.mean().item() - (math.log(count) + e + 1)) < 0.1


@pytest.mark.parametrize("z_from", ["all", "pretext"])
@pytest.mark.parametrize("kind", ["frozen", "running", "exact"])
def test_z_of_the_method(kind: str, z_from: str) -> None:
    """Frozen: the estimate of batch 0 in every step. Running: z_momentum of the old value, each estimate after use.

    Exact: of every batch, the mean over its queries of the sum of exp(s) over all rows (Wu et al. 2018, equation 2).
    """
    config = PIRL.Config(num_negatives=20, z=kind, z_from=z_from, z_momentum=0.75, bank_momentum=1.0)  # type: ignore[arg-type]
    method = config.build(context(ResNetConfig(name="resnet18"), 40, seed=5))
    batches = [draw(views=2, batch=3, columns=128, num_rows=40, negatives=20 + step) for step in range(4)]
    expected = math.nan
    for step, d in enumerate(batches):
        d = replace(
            d,
            query=d.query.roll(step, dims=-1),
            bank=method.bank.vectors,
            rows=negative_rows(d.index, num_negatives=20, num_rows=40, seed=5, step=step),
        )
        used = d.query[:1] if z_from == "pretext" else d.query
        if kind == "exact":
            estimate = (used.double() @ method.bank.vectors.double().T / 0.07).exp().sum(dim=-1).mean().item()
        else:
            estimate = z_formula(replace(d, query=used), 0.07)
        expected = estimate if step == 0 or kind == "exact" else expected
        method.embed = lambda _, query=d.query: query  # type: ignore[method-assign]
        out = method({}, d.index, step=step)
        losses = nce_formula(d, 0.07, expected)[0].mean(dim=1)
        torch.testing.assert_close(out["loss"].double(), losses.mean(), rtol=1e-5, atol=1e-5)
        if kind == "running" and step > 0:
            expected = 0.75 * expected + 0.25 * estimate
        assert math.isclose(out["z"].item(), expected, rel_tol=1e-5)


def test_z_and_step_are_read_where_they_live(device: torch.device) -> None:
    """0-d tensors are never read on the host: tracing with tensors that have no values succeeds for every form of Z."""
    d = draw(device)
    z, step = torch.tensor(90.0, device=device), torch.tensor(4, device=device)
    options: dict[str, Any] = {"num_negatives": 30, "loss": "nce"}
    first = bank_nce(d.query, d.bank, d.index, z=z, step=step, **options)
    z.mul_(2)
    assert torch.equal(
        bank_nce(d.query, d.bank, d.index, z=z, step=step, **options),
        bank_nce(d.query, d.bank, d.index, z=180.0, step=4, **options),
    )
    assert isinstance(first, Tensor)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (d.query, d.bank, d.index, z, step)]
        for normaliser in (fake[3], fake[3].half(), None):
            value = bank_nce(*fake[:3], z=normaliser, step=fake[4], **options)
            assert isinstance(value, Tensor)
            assert value.shape == first.shape
            assert value.device == first.device
