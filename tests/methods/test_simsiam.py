from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from sslfast.methods.simsiam import SimSiam
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import simsiam, simsiam_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.methods import harness
from tests.tiny import context


def config(**changes: Any) -> TrainConfig:
    sizes = {"hidden_features": 32, "dimensions": 16, "predictor_features": 8}
    return harness.tiny(simsiam_small(), **{**sizes, **changes})


def build(whole: TrainConfig) -> SimSiam:
    method = harness.build(whole)
    assert isinstance(method, SimSiam)
    return method


def test_step_is_the_formula_in_float64() -> None:
    whole = config()
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}
    z = [method.projection(method.trunk(views[name].pixels)) for name in ("first", "second")]
    p = [method.predictor(x) for x in z]
    pairs = ((p[0], z[1].detach()), (p[1], z[0].detach()))
    expected = sum(-(normalize(a, dim=1) * normalize(b, dim=1)).sum(dim=1).mean() / 2 for a, b in pairs)
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-10, atol=1e-12)
    own, wanted = torch.autograd.grad(out["loss"], weights), torch.autograd.grad(expected, weights)  # type: ignore[arg-type]
    for a, b in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    assert not out["output_std"].requires_grad


def test_output_std_tells_spread_from_collapse() -> None:
    method, (views, rows) = build(config()), harness.first_batch(config())
    method.predictor = torch.nn.Identity()  # type: ignore[assignment]
    spread = method(views, rows, step=0)["output_std"].item()
    assert 0.3 / 16**0.5 < spread <= 1 / 16**0.5 + 1e-6
    method.projection = torch.nn.Sequential(torch.nn.Linear(24, 16))  # type: ignore[assignment]
    torch.nn.init.zeros_(method.projection[0].weight)
    torch.nn.init.ones_(method.projection[0].bias)
    out = method(views, rows, step=0)
    assert out["output_std"].item() == pytest.approx(0.0, abs=1e-6)
    assert out["loss"].item() == pytest.approx(-1.0, abs=1e-6)


def test_the_rate_of_the_predictor_is_constant(tmp_path: Path) -> None:
    for constant in (True, False):
        trainer = harness.train(config(constant_predictor_lr=constant), tmp_path / str(constant))
        peak = trainer.config.optim.peak_lr(trainer.config.batch_size)
        rates = {
            name: group["lr"]
            for group in trainer.optimizer.param_groups
            for name, p in trainer.method.named_parameters()
            if any(p is other for other in group["params"])
        }
        assert rates["trunk.conv1.weight"] == rates["projection.0.weight"] < peak
        assert rates["predictor.0.weight"] == rates["predictor.1.bias"]
        assert (rates["predictor.0.weight"] == peak) is constant


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    losses = harness.overfit(config(), steps=30)
    assert max(losses[-3:]) < losses[0] - 0.2


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    harness.assert_two_processes_train_as_one(replace(config(), sync_batchnorm=True), tmp_path, normalised=True)


def test_recipe_is_the_published_numbers() -> None:
    whole = simsiam()
    method, optim = whole.method, whole.optim
    assert isinstance(method, SimSiam.Config)
    assert (method.hidden_features, method.dimensions, method.predictor_features) == (2048, 2048, 512)
    assert (whole.batch_size, whole.epochs, whole.sync_batchnorm) == (512, 100, True)
    assert whole.model == ResNetConfig(zero_init_residual=True)
    assert (optim.name, optim.momentum, optim.weight_decay, optim.warmup_epochs) == ("sgd", 0.9, 1e-4, 0)
    assert (optim.decay_norm, optim.decay_bias, method.constant_predictor_lr) == (True, True, True)
    rate = optim.learning_rate(batch_size=512, steps_per_epoch=10, epochs=100)
    assert [rate(0), rate(500), rate(509)] == [pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.05)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor_features": 0}, "method.predictor_features must be at least 1, got 0"),
        ({"dimensions": 1}, "method.dimensions must be at least 2, got 1"),
        ({"second_view": ViewConfig(jigsaw=JigsawConfig())}, "method.second_view.jigsaw must not be set: simsiam"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimSiam.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
