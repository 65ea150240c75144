from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.methods.super_resolution import RandomFeatures, SuperResolution, reduced
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.generative import super_resolution, super_resolution_small
from sslfast.views.types import View
from tests.methods import harness
from tests.tiny import context


def tiny(**changes: Any) -> Any:
    return harness.tiny(super_resolution_small(), **changes)


def details(shape: torch.Size, factor: int) -> Tensor:
    """Random pixels whose mean over every block is 0, which downsampling removes."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    blocks = noise.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # [B, 3, h, f, w, f]
    return (blocks - blocks.mean(dim=(3, 5), keepdim=True)).flatten(4).flatten(2, 3)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_perfect_and_empty_reconstruction(loss: str, factor: int) -> None:
    config = tiny(loss=loss, factor=factor, perceptual_weight=0.3)
    method = harness.build(config)
    views, rows = harness.first_batch(config)
    clean = views["image"].pixels
    seen = reduced(clean, factor)
    method.predict = lambda _seen: clean - seen  # type: ignore[attr-defined]
    assert method(views, rows, step=0)["loss"] < 1e-6
    method.predict = torch.zeros_like  # type: ignore[attr-defined]
    out = method(views, rows, step=0)
    missing = (clean - seen).abs().mean() if loss == "l1" else (clean - seen).square().mean()
    torch.testing.assert_close(out["loss_pixels"], missing)
    torch.testing.assert_close(out["loss"], missing + 0.3 * out["loss_perceptual"])
    assert out["loss_perceptual"] > 0


def test_reduction_keeps_the_mean_of_every_block() -> None:
    flat = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(reduced(flat, 4), flat)
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0
    torch.testing.assert_close(reduced(step, 4)[0, 0, 0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))
    torch.testing.assert_close(reduced(step, 2)[0, 0, 0], torch.tensor([0, 0, 0, 0.25, 0.75, 1, 1, 1]))
    torch.testing.assert_close(reduced(step.mT, 4), reduced(step, 4).mT)


def test_details_do_not_reach_the_network() -> None:
    config = tiny()
    method = harness.build(config)
    views, rows = harness.first_batch(config)
    clean = views["image"].pixels
    other = clean + details(clean.shape, 4)
    torch.testing.assert_close(reduced(clean, 4), reduced(other, 4), rtol=0, atol=1e-5)
    seen: list[Tensor] = []
    method.trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    losses = [method({"image": View(pixels=x)}, rows, step=0)["loss"] for x in (clean, other)]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)
    assert (losses[0] - losses[1]).abs() > 0.1  # they are reconstructed


def test_perceptual_distance_of_identity_kernels() -> None:
    """Three of the 32, 64 and 128 features are the colours, after ReLU."""
    network = RandomFeatures(seed=0)
    for layer in network.layers:
        nn.init.dirac_(layer.weight)  # type: ignore[arg-type]
    x, y = torch.full((2, 3, 16, 16), 5.0), torch.full((2, 3, 16, 16), -1.0)
    expected = 5**2 * (3 / 32 + 3 / 64 + 3 / 128) / 3
    torch.testing.assert_close(network.distance(x, y), torch.tensor(expected))
    torch.testing.assert_close(network.distance(y, x), torch.tensor(expected))


def test_both_terms_have_gradients_and_their_logs_do_not() -> None:
    config = tiny(loss="l2", perceptual_weight=0.3)
    method = harness.build(config)
    assert isinstance(method, SuperResolution)
    assert method.perceptual is not None
    views, rows = harness.first_batch(config)
    clean = views["image"].pixels
    seen = reduced(clean, 4)
    added = torch.zeros_like(clean, requires_grad=True)
    method.predict = lambda _seen: added  # type: ignore[method-assign]
    out = method(views, rows, step=0)
    out["loss"].backward()
    prediction = seen.clone().requires_grad_()
    (perceptual,) = torch.autograd.grad(method.perceptual.distance(prediction, clean), prediction)
    assert perceptual.abs().sum() > 0
    torch.testing.assert_close(added.grad, 2 * (seen - clean) / clean.numel() + 0.3 * perceptual)
    assert not out["loss_pixels"].requires_grad
    assert not out["loss_perceptual"].requires_grad


def test_the_perceptual_network_is_drawn_from_the_seed() -> None:
    first, second = RandomFeatures(seed=3), RandomFeatures(seed=3)
    x, y = torch.randn(2, 2, 3, 16, 16)
    assert first.distance(x, x) == 0
    assert torch.equal(first.distance(x, y), second.distance(x, y))
    assert not any(p.requires_grad for p in first.parameters())
    x.requires_grad_()
    first.distance(x, y).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_the_perceptual_network_is_not_trained() -> None:
    config = replace(tiny(perceptual_weight=1.0), seed=5)
    harness.assert_gradients_reach_the_trunk(config)
    method = harness.build(config)
    assert isinstance(method, SuperResolution)
    assert method.perceptual is not None
    fresh = RandomFeatures(seed=config.seed + 2)
    for a, b in zip(method.perceptual.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trains_and_resumes(tmp_path: Path) -> None:
    harness.assert_gradients_reach_the_trunk(tiny())
    harness.assert_overfits(tiny(), lr=0.1, share=0.6)
    harness.assert_resumes(tiny(perceptual_weight=0.1), tmp_path, stops=(2,))


def test_panels() -> None:
    config = tiny()
    views, rows = harness.first_batch(config)
    panels = config.method.preview_panels(views, rows, seed=0)
    assert list(panels) == ["input", "target"]
    inside = panels["input"].mean(dim=(2, 3)), panels["target"].mean(dim=(2, 3))
    torch.testing.assert_close(*inside, rtol=0, atol=0.02)  # the same image
    assert (panels["input"] - panels["target"]).abs().max() > 0.05
    seen = PixelSpace(config.method.image_view.augment).to_rgb(reduced(views["image"].pixels, 2))
    assert torch.equal(tiny(factor=2).method.preview_panels(views, rows, seed=0)["input"], seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 1}, "method.factor must be at least 2 and divide method.image_view.crop.size=224, got 1"),
        ({"factor": 3}, "must be at least 2 and divide method.image_view.crop.size=224, got 3"),
        ({"perceptual_weight": -1.0}, "method.perceptual_weight must be at least 0, got -1.0"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperResolution.Config(**changes).build(context(ResNetConfig(), 4, seed=0))


def test_recipes() -> None:
    assert super_resolution().model.name == "resnet50"
    assert super_resolution().method == SuperResolution.Config()
    assert super_resolution_small().method.image_view.crop.size == 64
