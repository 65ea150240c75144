"""Against the formulas of lemniscate, VISSL and PyContrast, written out in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sslfast.adapters.nce_average import NCEAverage
from sslfast.ops import negative_rows

N, D, B, K = 60, 16, 5, 24


def features(seed: int, *, unit: bool = True) -> Tensor:
    drawn = torch.randn(B, D, generator=torch.Generator().manual_seed(seed))
    return (normalize(drawn, dim=1) if unit else drawn).requires_grad_()


def build(**options: Any) -> NCEAverage:
    return NCEAverage(D, N, K, **options)


def scores(module: NCEAverage, x: Tensor, y: Tensor, *, step: int = 0, draw: int = 0) -> Tensor:
    """``[B, K + 1]`` float64, column 0 the positive: the tensor that the other projects form."""
    rows = negative_rows(
        y, num_negatives=K, num_rows=N, seed=module.seed + draw, step=step, exclude_self=module.exclude_self
    )
    chosen = module.memory.double()[torch.cat((y[:, None], rows), dim=1)]
    return torch.einsum("bd,bkd->bk", x.double(), chosen) / module.T


def criterion(s: Tensor, z: float) -> Tensor:
    """NCECriterion: P = exp(s) / Z, uniform noise 1 / N, sums over the batch divided by B."""
    p, noise = s.exp() / z, K / N
    positive = (p[:, 0] / (p[:, 0] + noise)).log().sum()
    return -(positive + (noise / (p[:, 1:] + noise)).log().sum()) / len(s)


def test_nce_of_one_view(device: torch.device) -> None:
    module, x, y = build(T=0.2).to(device), features(1).detach().to(device).requires_grad_(), torch.arange(5) * 7
    y = y.to(device)
    s = scores(module, x, y)
    z = s.exp().mean().item() * N
    expected = criterion(s, z)
    (gradient,) = torch.autograd.grad(expected, x)
    loss = module(x, y)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
    assert math.isclose(module.z.item(), z, rel_tol=1e-5)


@pytest.mark.parametrize("separate_draws", [False, True])
def test_pirl_infonce_of_two_views(separate_draws: bool) -> None:
    module = build(loss="infonce", weight=0.3, separate_draws=separate_draws)
    x, x_jig, y = features(1), features(2), torch.tensor([3, 1, 4, 15, 9])
    label = torch.zeros(B, dtype=torch.long)
    expected = 0.3 * cross_entropy(scores(module, x_jig, y), label)
    expected = expected + 0.7 * cross_entropy(scores(module, x, y, draw=int(separate_draws)), label)
    gradients = torch.autograd.grad(expected, (x, x_jig))
    loss = module(x, y, x_jig)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, x_jig)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_memory_is_updated_with_x_only_and_their_momentum() -> None:
    module = build(momentum=0.25)
    x, x_jig, y = features(1), features(2), torch.tensor([3, 1, 4, 15, 9])
    before = module.memory.clone()
    module(x, y, x_jig)
    expected = before.clone()
    expected[y] = normalize(0.25 * before[y] + 0.75 * x.detach(), dim=1)
    torch.testing.assert_close(module.memory, expected)
    everyone, rows = features(3).detach(), torch.tensor([50, 51, 52, 53, 54])
    module(x, y, all_x=everyone, all_y=rows)
    expected[rows] = normalize(0.25 * before[rows] + 0.75 * everyone, dim=1)
    torch.testing.assert_close(module.memory, expected)


def test_eval_mode_changes_no_state() -> None:
    module = build(Z=90.0).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = module(features(1), torch.arange(B)), module(features(1), torch.arange(B))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_z_is_frozen_by_the_first_batch_and_every_step_draws() -> None:
    module, y = build(momentum=1.0, z_from="x_jig"), torch.arange(B)
    z = scores(module, features(2), y).exp().mean().item() * N
    first = module(features(1), y, features(2))
    assert math.isclose(module.z.item(), z, rel_tol=1e-5)
    second = module(features(1), y, features(2))
    assert math.isclose(module.z.item(), z, rel_tol=1e-5)
    assert not torch.equal(first, second)
    assert module.step == 2


def test_rows_given_and_norm_embedding() -> None:
    module = build(Z=100.0, norm_embedding=True, exclude_self=True)
    x, x_jig, y = features(1, unit=False), features(2, unit=False), torch.arange(B)
    draw = {"num_negatives": K, "num_rows": N, "step": 0, "exclude_self": True}
    idx = [torch.cat((y[:, None], negative_rows(y, seed=seed, **draw)), dim=1) for seed in (0, 1)]
    unit = [normalize(view.detach(), dim=1) for view in (x_jig, x)]
    parts = [criterion(scores(module, view, y, draw=draw), 100.0) for draw, view in enumerate(unit)]
    loss = module.eval()(x, y, x_jig, idx=torch.stack(idx))
    torch.testing.assert_close(loss.double(), (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-5)
    shared = module(x, y, x_jig, idx=idx[0])
    torch.testing.assert_close(shared, module(x, y, x_jig))


def test_own_state_resumes_and_their_checkpoints_load() -> None:
    module, y = build(), torch.arange(B)
    module(features(1), y)
    resumed = build(seed=0)
    resumed.load_state_dict(module.state_dict())
    assert torch.equal(resumed(features(1), y), module(features(1), y))

    memory = normalize(torch.randn(N, D), dim=1)
    theirs = {
        "memory": memory,
        "params": torch.tensor([K, 0.07, 321.5, 0.5]),
        "multinomial.prob": torch.ones(N),
        "multinomial.alias": torch.zeros(N, dtype=torch.long),
    }
    for extra, z in (
        (theirs, 321.5),
        ({"memory": memory}, math.nan),
        (theirs | {"params": torch.tensor([K, 0.07, -1, 0.5])}, math.nan),
    ):
        module = build()
        nested = torch.nn.ModuleDict({"nce_average": module})
        nested.load_state_dict({f"nce_average.{name}": value for name, value in extra.items()})
        assert torch.equal(module.memory, memory)
        assert module.z.item() == z or (math.isnan(z) and module.z.isnan())
        assert module(features(1), y).isfinite()


def test_bf16_memory_and_compile() -> None:
    module, y = build(dtype=torch.bfloat16, loss="infonce"), torch.arange(B)
    expected = cross_entropy(scores(module, features(1), y), torch.zeros(B, dtype=torch.long))
    torch.testing.assert_close(module(features(1), y).double(), expected, rtol=1e-5, atol=1e-5)
    eager, compiled = build(Z=90.0), build(Z=90.0)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        torch.testing.assert_close(run(features(seed), y), eager(features(seed), y))
    torch.testing.assert_close(compiled.memory, eager.memory)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"NCEAverage: weight must be in \[0, 1\], got weight=2"):
        build(weight=2)
    with pytest.raises(ValueError, match='NCEAverage: z_from must be "all" or "x_jig", got \'jig\''):
        build(z_from="jig")
    assert "memory=[60, 16], K=24, T=0.07" in repr(build())
