import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from sslfast.methods.dino import DINO, DINOHead
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import dino, dino_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, JigsawConfig, View, ViewConfig
from sslfast.weights import read_weights
from tests.methods import harness
from tests.tiny import context, same

LOCAL = ViewConfig(crop=CropConfig(size=16))


def config(**changes: Any) -> TrainConfig:
    sizes = {"hidden_features": 32, "bottleneck_features": 16, "dimensions": 20, "local_view": LOCAL, "local_crops": 2}
    return harness.tiny(dino_small(), **{**sizes, **changes})


def build(whole: TrainConfig) -> DINO:
    method = harness.build(whole)
    assert isinstance(method, DINO)
    return method


def outputs(trunk: Any, head: Any, views: dict[str, View], *batches: tuple[str, ...]) -> Tensor:
    features = [trunk(torch.cat([views[name].pixels for name in batch])) for batch in batches]
    result: Tensor = head(torch.cat(features)).unflatten(0, (sum(map(len, batches)), -1))
    return result


def test_step_is_the_formula_in_float64() -> None:
    """Of step 4 of 2 epochs of 3 steps: temperature of the second epoch of three of warm-up."""
    changes = {"warmup_teacher_temperature": 0.3, "teacher_temperature": 0.5, "teacher_warmup_epochs": 3}
    whole = config(**changes)
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}
    method.centre.copy_(torch.randn(20, generator=torch.Generator().manual_seed(0)) / 10)
    with torch.no_grad():  # the two networks differ
        for parameter in method.head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    large = ("first", "second")
    student = outputs(method.trunk, method.head, views, large, ("local0", "local1"))
    teacher = outputs(method.teacher_trunk, method.teacher_head, views, large).detach()
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        target = ((teacher[i] - method.centre) / 0.4).softmax(dim=1)
        for v in range(4):
            if v != i:
                expected = expected - (target * log_softmax(student[v] / 0.1, dim=1)).sum(dim=1).mean() / 6
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    out = method(views, rows, step=torch.tensor(4))
    torch.testing.assert_close(out["loss"], expected, rtol=1e-7, atol=0)  # the temperature is fp32
    for own, wanted in zip(
        torch.autograd.grad(out["loss"], weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-8)
    assert 0 < out["teacher_entropy"].item() < math.log(20)


def test_head_is_products_of_unit_vectors() -> None:
    head = DINOHead(6, 8, 4, 10, norm=False)
    x = torch.randn(5, 6)
    hidden = normalize(head.mlp(x), dim=1)
    torch.testing.assert_close(head(x), hidden @ normalize(head.last_layer.weight, dim=1).T)
    assert head(x).abs().max() <= 1 + 1e-6
    for module in head.mlp:
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5)
            assert not module.bias.any()


def test_teacher_temperature_is_linear_over_its_warm_up() -> None:
    method = build(config(warmup_teacher_temperature=0.04, teacher_temperature=0.07, teacher_warmup_epochs=4))
    found = [method._teacher_temperature(torch.tensor(step)).item() for step in (0, 2, 3, 6, 9, 12, 99)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert build(config())._teacher_temperature(0).item() == pytest.approx(0.04)


def test_teacher_and_centre_follow() -> None:
    method = build(config(momentum=0.8, center_momentum=0.75))  # of 2 epochs of 3 steps
    views, rows = harness.first_batch(config())
    pairs = list(zip(method.teacher_trunk.parameters(), method.trunk.parameters(), strict=True))
    pairs += zip(method.teacher_head.parameters(), method.head.parameters(), strict=True)
    assert all(torch.equal(t, s) and t.data_ptr() != s.data_ptr() for t, s in pairs)
    with torch.no_grad():
        mean = outputs(method.teacher_trunk, method.teacher_head, views, ("first", "second")).mean(dim=(0, 1))
    method(views, rows, step=3)["loss"].backward()
    before = [t.clone() for t, _ in pairs]
    with torch.no_grad():
        for _, s in pairs:
            s += 0.1
    method.after_step()
    for (t, s), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s)  # 1 - 0.2 (cos(π / 2) + 1) / 2
    torch.testing.assert_close(method.centre, 0.25 * mean, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="after_step was called before a forward pass"):
        method.after_step()


def test_the_last_layer_is_frozen_for_an_epoch(tmp_path: Path) -> None:
    whole = config()
    start = build(whole).head.last_layer.weight
    harness.train(whole, tmp_path / "run", stop_after=3)
    state = harness.final(tmp_path / "run")["method"]
    assert torch.equal(state["head.last_layer.weight"], start)
    assert not torch.equal(state["head.mlp.0.weight"], build(whole).head.mlp[0].weight)
    harness.train(whole, tmp_path / "run")
    assert not torch.equal(harness.final(tmp_path / "run")["method"]["head.last_layer.weight"], start)


def test_evaluations_use_the_teacher(tmp_path: Path) -> None:
    harness.train(config(), tmp_path / "run")
    state = harness.final(tmp_path / "run")["method"]
    teacher = {k.removeprefix("teacher_trunk."): v for k, v in state.items() if k.startswith("teacher_trunk.")}
    assert same(dict(read_weights(tmp_path / "run").state), teacher)
    assert not torch.equal(state["trunk.conv1.weight"], state["teacher_trunk.conv1.weight"])


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config(head_norm=True))


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    """With a teacher that stands still; one that moves has another minimum at every step."""
    whole = config(momentum=1.0, center_momentum=1.0, teacher_temperature=0.1, warmup_teacher_temperature=0.1)
    method, (views, rows) = build(whole), harness.first_batch(whole)
    with torch.no_grad():
        method.teacher_head.last_layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    excess = []
    for step in range(40):
        out = method(views, rows, step=step)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
        excess.append((out["loss"] - out["teacher_entropy"]).item())  # the divergence of the two, at least 0
    assert max(excess[-3:]) < 0.3 * excess[0]


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    whole = replace(config(head_norm=True, frozen_epochs=0), sync_batchnorm=True)
    whole = replace(whole, optim=replace(whole.optim, clip_grad_norm=0.5, warmup_epochs=0, clip_each=False))
    harness.assert_two_processes_train_as_one(whole, tmp_path, normalised=True, lr=0.1)


def test_recipe_is_the_published_numbers() -> None:
    whole = dino()
    method, optim = whole.method, whole.optim
    assert isinstance(method, DINO.Config)
    assert (method.hidden_features, method.bottleneck_features, method.dimensions) == (2048, 256, 65536)
    assert (method.temperature, method.teacher_temperature, method.warmup_teacher_temperature) == (0.1, 0.04, 0.04)
    assert (method.momentum, method.center_momentum, method.frozen_epochs, method.head_norm) == (0.996, 0.9, 1, False)
    assert (whole.batch_size, whole.epochs, whole.model, whole.sync_batchnorm) == (512, 100, ResNetConfig(), True)
    assert (optim.name, optim.momentum, optim.weight_decay, optim.final_weight_decay) == ("sgd", 0.9, 1e-4, None)
    assert (optim.clip_grad_norm, optim.clip_each, optim.decay_norm, optim.decay_bias) == (3.0, True, False, False)
    rate = optim.learning_rate(batch_size=512, steps_per_epoch=10, epochs=100)
    assert (rate(100), rate(1000)) == (pytest.approx(0.06), pytest.approx(1e-6))
    views = list(method.views().values())
    assert [view.crop.size for view in views] == [224, 224, *[96] * 8]
    assert [view.crop.scale for view in views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 8
    assert [view.augment.blur_probability for view in views] == [1.0, 0.1, *[0.5] * 8]
    assert [view.augment.solarize_probability for view in views] == [0.0, 0.2, *[0.0] * 8]
    for augment in (view.augment for view in views):
        assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.5}, r"method\.momentum must be in \[0, 1\], got 1.5"),
        ({"center_momentum": -0.1}, r"method\.center_momentum must be in \[0, 1\], got -0.1"),
        ({"dimensions": 1}, "method.dimensions must be at least 2, got 1"),
        ({"teacher_temperature": 0.0}, "method.teacher_temperature must be positive and finite, got 0"),
        ({"frozen_epochs": -1}, "method.frozen_epochs must be at least 0, got -1"),
        ({"local_crops": -1}, r"method.local_crops must be in \[0, 13\], got -1"),
        ({"second_view": ViewConfig(jigsaw=JigsawConfig())}, "method.second_view.jigsaw must not be set: dino"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DINO.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
