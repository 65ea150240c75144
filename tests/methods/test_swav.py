import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from sslfast.methods.base import BatchSplit
from sslfast.methods.swav import SwAV
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.joint_embedding import swav, swav_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, JigsawConfig, View, ViewConfig
from tests.methods import harness
from tests.methods.shared.test_codes import by_the_paper
from tests.tiny import context, same

LOCAL = ViewConfig(crop=CropConfig(size=16))


def config(**changes: Any) -> TrainConfig:
    sizes = {"hidden_features": 32, "dimensions": 16, "prototypes": 6, "local_view": LOCAL, "local_crops": 2}
    return harness.tiny(swav_small(), **{**sizes, "frozen_steps": 2, **changes})


def build(whole: TrainConfig) -> SwAV:
    method = harness.build(whole)
    assert isinstance(method, SwAV)
    return method


def doubled(views: dict[str, View]) -> dict[str, View]:
    return {name: replace(view, pixels=view.pixels.double()) for name, view in views.items()}


def embeddings_of(method: SwAV, views: dict[str, View]) -> Tensor:
    """``[V, B, D]``, as the paper's code computes them: large and small crops as a batch each."""
    batches = (("first", "second"), ("local0", "local1"))
    features = [method.trunk(torch.cat([views[name].pixels for name in batch])) for batch in batches]
    return normalize(method.projection(torch.cat(features)), dim=1).unflatten(0, (4, -1))


@pytest.mark.parametrize("queue", ["none", "filling", "full"])
def test_step_is_the_formula_in_float64(queue: str) -> None:
    whole = config(queue_size=0 if queue == "none" else 11, epsilon=0.1)
    method, (views, rows) = build(whole).double(), harness.first_batch(whole)
    views = doubled(views)
    if queue != "none":
        method.queue.copy_(torch.randn(11, 2, 16, dtype=torch.float64).div_(4).flatten(1))
        method.queued.fill_(11 if queue == "full" else 10)
    prototypes = method.prototypes.weight
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(6, dtype=torch.float64))
    scores = embeddings_of(method, views) @ prototypes.T
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        own = scores[i].detach()
        earlier = method.queue.view(11, 2, 16)[:, i] @ prototypes.detach().T if queue == "full" else own[:0]
        codes = by_the_paper(torch.cat((own, earlier)), 0.1, 3)[:8]
        for v in range(4):
            if v != i:
                expected = expected - (codes * log_softmax(scores[v] / 0.1, dim=1)).sum(dim=1).mean() / 6
    weights = [parameter for parameter in method.parameters() if parameter.requires_grad]
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-10, atol=0)
    for own, wanted in zip(
        torch.autograd.grad(out["loss"], weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-10)
    assert 0 < out["code_entropy"].item() < math.log(6)


def test_equal_embeddings_cost_log_k() -> None:
    """Uniform predictions and codes where every prototype is as near."""
    whole = config()
    method, (views, rows) = build(whole), harness.first_batch(whole)
    torch.nn.init.ones_(method.prototypes.weight)
    out = method(views, rows, step=0)
    assert out["loss"].item() == pytest.approx(math.log(6), rel=1e-5)
    assert out["code_entropy"].item() == pytest.approx(math.log(6), rel=1e-5)


def test_the_queue_takes_the_newest_embeddings_and_begins_with_its_epoch() -> None:
    whole = config(queue_size=12, queue_start_epoch=1)  # of 3 steps an epoch
    method, (views, rows) = build(whole), harness.first_batch(whole)
    seen = []
    for step in range(6):
        with torch.no_grad():
            seen.append(embeddings_of(method, views)[:2].transpose(0, 1).flatten(1))
        method(views, rows, step=torch.tensor(step))
        method.after_step()
        assert int(method.queued) == max(0, 8 * (step - 2))  # full, and so used, from the third step on
    newest = torch.cat(seen)[-12:]
    in_order = method.queue.roll(-int(method.head), 0)
    torch.testing.assert_close(in_order, newest, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="after_step was called before a forward pass"):
        method.after_step()


def test_prototypes_are_frozen_and_stay_unit_vectors(tmp_path: Path) -> None:
    whole = config(frozen_steps=4)
    start = build(whole).prototypes.weight
    harness.train(whole, tmp_path / "run", stop_after=3)
    torch.testing.assert_close(harness.final(tmp_path / "run")["method"]["prototypes.weight"], start, rtol=0, atol=1e-6)
    harness.train(whole, tmp_path / "run")
    moved = harness.final(tmp_path / "run")["method"]["prototypes.weight"]
    assert not torch.allclose(moved, start, rtol=0, atol=1e-4)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(6))


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_resumes_with_a_queue(tmp_path: Path) -> None:
    harness.assert_resumes(config(queue_size=12, queue_start_epoch=0), tmp_path)


def test_overfits() -> None:
    harness.assert_overfits(config(), steps=30, share=0.5)


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    """With a queue of a size that ranks do not share evenly, in use from the second epoch on."""
    whole = replace(config(queue_size=11, queue_start_epoch=0), sync_batchnorm=True)
    harness.assert_two_processes_train_as_one(whole, tmp_path, normalised=True, lr=0.02)


def test_weights_of_any_number_of_small_crops_are_the_same() -> None:
    assert same(build(config()).state_dict(), build(config(local_crops=0)).state_dict())


def test_recipe_is_the_published_numbers() -> None:
    whole = swav()
    method, optim = whole.method, whole.optim
    assert isinstance(method, SwAV.Config)
    assert (method.hidden_features, method.dimensions, method.prototypes, method.local_crops) == (2048, 128, 3000, 6)
    assert (method.temperature, method.epsilon, method.iterations) == (0.1, 0.05, 3)
    assert (method.queue_size, method.queue_start_epoch, method.frozen_steps) == (0, 15, 313)
    assert (whole.batch_size, whole.epochs, whole.model, whole.sync_batchnorm) == (4096, 800, ResNetConfig(), True)
    assert (optim.name, optim.weight_decay, optim.decay_norm, optim.decay_bias) == ("lars", 1e-6, True, True)
    rate = optim.learning_rate(batch_size=4096, steps_per_epoch=10, epochs=800)
    assert (rate(0), rate(100), rate(8000)) == (pytest.approx(0.3), pytest.approx(4.8), pytest.approx(0.0048))
    views = method.views()
    assert list(views) == ["first", "second", *(f"local{i}" for i in range(6))]
    assert [view.crop.size for view in views.values()] == [224, 224, *[96] * 6]
    assert [view.crop.scale for view in views.values()] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    for augment in (view.augment for view in views.values()):
        assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.8, 0.8, 0.8, 0.2)
        assert (augment.jitter_probability, augment.grayscale_probability, augment.blur_probability) == (0.8, 0.2, 0.5)
        assert augment.std == (0.228, 0.224, 0.225)


def test_a_queue_below_the_batch_is_refused() -> None:
    SwAV.Config(queue_size=8).check_batch(BatchSplit(batch_size=8))
    with pytest.raises(
        ValueError, match=r"queue_size must be 0 or at least batch_size=8, .* got 7; change it or lower"
    ):
        SwAV.Config(queue_size=7).check_batch(BatchSplit(batch_size=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": 1}, "method.prototypes must be at least 2, got 1"),
        ({"epsilon": 0.0}, "method.epsilon must be positive and finite, got 0"),
        ({"iterations": 0}, "method.iterations must be at least 1, got 0"),
        ({"queue_size": -1}, "method.queue_size must be at least 0, got -1"),
        ({"local_crops": 14}, r"method.local_crops must be in \[0, 13\], got 14"),
        ({"local_view": ViewConfig(jigsaw=JigsawConfig())}, "method.local_view.jigsaw must not be set: swav"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwAV.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10))
