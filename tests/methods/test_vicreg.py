from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.methods.vicreg import EPSILON, VICReg, spread
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import vicreg, vicreg_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.methods import harness
from tests.tiny import context


def config(**changes: Any) -> TrainConfig:
    return harness.tiny(vicreg_small(), **{"hidden_features": 32, "dimensions": 16, **changes})


def build(whole: TrainConfig) -> VICReg:
    method = harness.build(whole)
    assert isinstance(method, VICReg)
    return method


def test_step_is_the_formula_in_float64() -> None:
    whole = config(invariance_weight=3.0, variance_weight=5.0, covariance_weight=0.7)
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}
    a, b = (method.projection(method.trunk(views[name].pixels)) for name in ("first", "second"))
    invariance = (a - b).square().mean()
    variance, covariance = torch.zeros(2, dtype=torch.float64)
    eye = torch.eye(16, dtype=torch.bool)
    for z in (a, b):
        variance = variance + (1 - (z.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean() / 2
        covariance = covariance + torch.cov(z.T)[~eye].square().sum() / 16
    expected = 3.0 * invariance + 5.0 * variance + 0.7 * covariance
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-10, atol=0)
    for name, value in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-10, atol=0)
    for own, wanted in zip(
        torch.autograd.grad(out["loss"], weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-10)


def test_spread_in_closed_form() -> None:
    """Collapsed: variance 1 - 0.01, covariance 0. Spread and uncorrelated: both 0. Equal columns: covariance D - 1."""
    collapsed = torch.ones(6, 4)
    assert [x.item() for x in spread(collapsed)] == [pytest.approx(1 - EPSILON**0.5), 0.0]
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** 0.5
    assert [x.item() for x in spread(signs + 7)] == pytest.approx([0.0, 0.0], abs=1e-6)
    column = torch.tensor([1.0, -1, 1, -1])[:, None] * (3 / 4) ** 0.5
    assert spread(column.expand(4, 3))[1].item() == pytest.approx(2.0, rel=1e-5)


def test_a_collapsed_batch_has_a_finite_gradient() -> None:
    x = torch.ones(6, 4, requires_grad=True)
    sum(spread(x)).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    harness.assert_overfits(config(), steps=30, share=0.7)


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    """With SGD, which shows a gradient of another size where LARS would hide it."""
    whole = config()
    whole = replace(whole, optim=replace(whole.optim, name="sgd"), sync_batchnorm=True)
    harness.assert_two_processes_train_as_one(whole, tmp_path, normalised=True, lr=0.05)


def test_recipe_is_the_published_numbers() -> None:
    whole = vicreg()
    method, optim = whole.method, whole.optim
    assert isinstance(method, VICReg.Config)
    assert (method.hidden_features, method.dimensions, method.layers) == (8192, 8192, 3)
    assert (method.invariance_weight, method.variance_weight, method.covariance_weight) == (25.0, 25.0, 1.0)
    assert (whole.batch_size, whole.epochs, whole.sync_batchnorm) == (2048, 1000, True)
    assert whole.model == ResNetConfig(zero_init_residual=True)
    rate = optim.learning_rate(batch_size=2048, steps_per_epoch=10, epochs=1000)
    assert (optim.name, rate(99), rate(10**4)) == ("lars", pytest.approx(1.6), pytest.approx(1.6e-3))
    assert (optim.weight_decay, optim.warmup_epochs, optim.bias_norm_lr_factor) == (1e-6, 10, 1.0)
    first, second = (view.augment for view in method.views().values())
    assert (first.blur_probability, first.solarize_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invariance_weight": 0.0}, "method.invariance_weight must be positive and finite, got 0"),
        ({"covariance_weight": -1.0}, "method.covariance_weight must be at least 0, got -1"),
        ({"dimensions": 1}, "method.dimensions must be at least 2, got 1"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set: vicreg"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VICReg.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
