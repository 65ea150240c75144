from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.methods.barlow_twins import BarlowTwins
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import barlow_twins, barlow_twins_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.methods import harness
from tests.tiny import context


def config(**changes: Any) -> TrainConfig:
    return harness.tiny(barlow_twins_small(), **{"hidden_features": 32, "dimensions": 16, **changes})


def build(whole: TrainConfig) -> BarlowTwins:
    method = harness.build(whole)
    assert isinstance(method, BarlowTwins)
    return method


def test_step_is_the_formula_in_float64() -> None:
    whole = config(off_diagonal_weight=0.02)
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}
    head = torch.nn.Sequential(*list(method.projection)[:-1])
    z = [head(method.trunk(views[name].pixels)) for name in ("first", "second")]
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in z)
    matrix = a.T @ b / len(a)
    eye = torch.eye(16, dtype=torch.bool)
    expected = (matrix[eye] - 1).square().sum() + 0.02 * matrix[~eye].square().sum()
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(out["invariance"], (matrix[eye] - 1).square().sum().detach(), rtol=1e-10, atol=0)
    for own, wanted in zip(
        torch.autograd.grad(out["loss"], weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-10)


def test_equal_and_opposite_embeddings() -> None:
    """Of orthogonal dimensions: c is the identity, or its negative with a cost of 2² each."""
    method = build(config(dimensions=4, off_diagonal_weight=1.0))
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).repeat(2, 1)
    signs[4:, :] *= -1
    views, rows = harness.first_batch(config())
    for factor, expected in ((1.0, 0.0), (-1.0, 16.0)):
        shown = iter((signs, factor * signs))
        method.trunk.forward = lambda _x, shown=shown: next(shown)  # type: ignore[method-assign, misc]
        method.projection = torch.nn.Identity()  # type: ignore[assignment]
        out = method(views, rows, step=0)
        assert out["loss"].item() == pytest.approx(expected, abs=1e-5)
        assert out["invariance"].item() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    harness.assert_overfits(config(), steps=30, share=0.5)


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    """Also at a rate of SGD that shows a gradient of another size, which LARS would hide."""
    whole = config()
    whole = replace(whole, optim=replace(whole.optim, name="sgd"), sync_batchnorm=True)
    harness.assert_two_processes_train_as_one(whole, tmp_path, normalised=True, lr=0.002)


def test_recipe_is_the_published_numbers() -> None:
    whole = barlow_twins()
    method, optim = whole.method, whole.optim
    assert isinstance(method, BarlowTwins.Config)
    assert (method.hidden_features, method.dimensions, method.layers) == (8192, 8192, 3)
    assert method.off_diagonal_weight == 0.0051
    assert (whole.batch_size, whole.epochs, whole.sync_batchnorm) == (2048, 1000, True)
    assert whole.model == ResNetConfig(zero_init_residual=True)
    rate = optim.learning_rate(batch_size=2048, steps_per_epoch=10, epochs=1000)
    assert (rate(99), rate(10**4)) == (pytest.approx(1.6), pytest.approx(1.6e-3))
    # The authors' gradient is a 16th: the same steps of biases, the same balance of gradient and decay.
    assert rate.peak * optim.bias_norm_lr_factor * 16 == pytest.approx(0.0048 * 2048 / 256)
    assert optim.weight_decay / 16 == pytest.approx(1e-6)
    first, second = (view.augment for view in method.views().values())
    assert (first.blur_probability, first.solarize_probability) == (1.0, 0.0)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    for augment in (first, second):
        assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (augment.jitter_probability, augment.grayscale_probability) == (0.8, 0.2)
        assert (augment.solarize_threshold, augment.blur_sigma) == (128.0, (0.1, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"off_diagonal_weight": 0.0}, "method.off_diagonal_weight must be positive and finite, got 0"),
        ({"layers": 0}, "method.layers must be at least 1, got 0"),
        ({"dimensions": 1}, "method.dimensions must be at least 2, got 1"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set: barlow-twins"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BarlowTwins.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
