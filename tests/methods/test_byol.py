import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from sslfast.methods.byol import BYOL
from sslfast.models.build import build_trunk
from sslfast.models.heads import MLPHead
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import byol, byol_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.methods import harness
from tests.tiny import context, same


def config(**changes: Any) -> TrainConfig:
    return harness.tiny(byol_small(), **{"hidden_features": 32, "dimensions": 16, **changes})


def build(whole: TrainConfig) -> BYOL:
    method = harness.build(whole)
    assert isinstance(method, BYOL)
    return method


def test_step_is_the_formula_and_targets_take_no_gradient() -> None:
    whole = config()
    fresh, (views, rows) = build(whole), harness.first_batch(whole)
    first, second = views["first"].pixels, views["second"].pixels
    assert not torch.equal(first, second)
    expected = torch.zeros(())
    for online, other in ((first, second), (second, first)):
        prediction = normalize(fresh.predictor(fresh.projection(fresh.trunk(online))), dim=1)
        target = normalize(fresh.target_projection(fresh.target_trunk(other)), dim=1)
        expected = expected + (prediction - target).square().sum(1).mean()
    method = build(whole)
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["similarity"], 1 - expected.detach() / 4)
    assert not out["similarity"].requires_grad
    out["loss"].backward()
    for name, parameter in method.named_parameters():
        assert name.startswith("target_") == (parameter.grad is None), name


def test_float64_stays_float64() -> None:
    whole = config()
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}
    assert method(views, rows, step=0)["loss"].dtype == torch.float64


def test_loss_of_equal_and_opposite_predictions() -> None:
    method = build(config())
    views, rows = harness.first_batch(config())
    method.target_projection = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 16))
    torch.nn.init.zeros_(method.target_projection[1].weight)
    torch.nn.init.ones_(method.target_projection[1].bias)
    for sign, loss in ((1.0, 0.0), (-1.0, 8.0)):
        torch.nn.init.zeros_(method.predictor[3].weight)
        torch.nn.init.constant_(method.predictor[3].bias, sign)
        assert method(views, rows, step=0)["loss"].item() == pytest.approx(loss, abs=1e-5)


def test_the_target_starts_equal_and_follows_by_the_scheduled_momentum() -> None:
    method = build(config(momentum=0.8))  # of 2 epochs of 3 steps
    views, rows = harness.first_batch(config())
    pairs = list(zip(method.target_trunk.parameters(), method.trunk.parameters(), strict=True))
    pairs += zip(method.target_projection.parameters(), method.projection.parameters(), strict=True)
    assert all(torch.equal(t, o) and t.data_ptr() != o.data_ptr() for t, o in pairs)
    for step, momentum in ((0, 0.8), (torch.tensor(3), 0.9), (2, 1 - 0.2 * (math.cos(math.pi / 3) + 1) / 2), (6, 1.0)):
        before = [t.clone() for t, _ in pairs]
        method(views, rows, step=step)["loss"].backward()
        with torch.no_grad():
            for _, o in pairs:
                o += 0.1
        assert all(torch.equal(t, old) for (t, _), old in zip(pairs, before, strict=True))  # not before the step
        method.after_step()
        for (t, o), old in zip(pairs, before, strict=True):
            torch.testing.assert_close(t, momentum * old + (1 - momentum) * o)
    with pytest.raises(RuntimeError, match="after_step was called before a forward pass"):
        method.after_step()


def test_weights_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = build(whole)
    with harness.tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        projection, predictor = MLPHead(24, 32, 16, hidden_norm=True), MLPHead(16, 32, 16, hidden_norm=True)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.target_trunk.state_dict(), trunk.state_dict())
    assert same(method.projection.state_dict(), projection.state_dict())
    assert same(method.predictor.state_dict(), predictor.state_dict())


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    harness.assert_overfits(config(), steps=60, share=0.3)


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    harness.assert_two_processes_train_as_one(replace(config(), sync_batchnorm=True), tmp_path, normalised=True)


def test_recipe_is_the_published_numbers() -> None:
    whole = byol()
    method, optim = whole.method, whole.optim
    assert isinstance(method, BYOL.Config)
    assert (method.hidden_features, method.dimensions, method.momentum) == (4096, 256, 0.996)
    assert (whole.batch_size, whole.epochs, whole.model, whole.sync_batchnorm) == (4096, 1000, ResNetConfig(), True)
    assert (optim.name, optim.weight_decay, optim.warmup_epochs) == ("lars", 1.5e-6, 10)
    assert optim.lr_per_256_images * whole.batch_size / 256 == pytest.approx(3.2)
    views = list(method.views().values())
    assert [view.augment.blur_probability for view in views] == [1.0, 0.1]
    for augment in (view.augment for view in views):
        assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)
        assert (augment.jitter_probability, augment.grayscale_probability) == (0.8, 0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.5}, r"method\.momentum must be in \[0, 1\], got 1.5"),
        ({"hidden_features": 0}, "method.hidden_features must be at least 1, got 0"),
        ({"dimensions": 0}, "method.dimensions must be at least 2, got 0"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
        ({"second_view": ViewConfig(jigsaw=JigsawConfig())}, "method.second_view.jigsaw must not be set"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BYOL.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
