import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast.distributed.sync_batchnorm import GlobalBatchNorm, globalize_batchnorm
from sslfast.methods.simclr import SimCLR, nt_xent
from sslfast.models import contrast
from sslfast.models.build import build_trunk
from sslfast.models.contrast import info_nce
from sslfast.models.heads import MLPHead
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes import RECIPES
from sslfast.recipes.contrastive import simclr_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import JigsawConfig, ViewConfig
from tests.methods import harness
from tests.tiny import context, same


def config(**changes: Any) -> TrainConfig:
    return harness.tiny(simclr_small(), hidden_features=24, dimensions=16, **changes)


def unit(count: int, dimensions: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dimensions, dtype=torch.float64, generator=generator), dim=1)


def dense(embeddings: Tensor, temperature: float) -> Tensor:
    """NT-Xent from the full score matrix."""
    count = len(embeddings)
    scores = (embeddings @ embeddings.T / temperature).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    return cross_entropy(scores, torch.arange(count).roll(count // 2), reduction="none")


@pytest.mark.parametrize("images", [1, 2, 50])
def test_loss_of_identical_embeddings_is_the_log_of_the_others(images: int) -> None:
    loss = nt_xent(unit(1, 8).expand(2 * images, 8), temperature=0.1)
    torch.testing.assert_close(loss, torch.full((2 * images,), math.log(2 * images - 1), dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_loss_of_orthogonal_images(temperature: float) -> None:
    loss = nt_xent(torch.eye(6).repeat(2, 1), temperature=temperature)
    torch.testing.assert_close(loss, torch.full((12,), math.log(1 + 10 * math.exp(-1 / temperature))))


@pytest.mark.parametrize("block", [1, 40, 1 << 21])
def test_loss_and_gradient_are_those_of_the_dense_form(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "_BLOCK", block)
    z = unit(14, 5).requires_grad_()
    weights = torch.linspace(-1, 2, 14, dtype=torch.float64)
    mine, expected = nt_xent(z, temperature=0.1), dense(z, 0.1)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(*(torch.autograd.grad((loss * weights).sum(), z)[0] for loss in (mine, expected)))
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, temperature=0.3), z)


def test_info_nce_between_queries_and_other_keys() -> None:
    queries, keys = unit(7, 6).requires_grad_(), unit(11, 6, seed=1).requires_grad_()
    positives = torch.tensor([0, 10, 3, 3, 5, 6, 2])

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return info_nce(q, k, positives, temperature=0.2)

    torch.testing.assert_close(loss(queries, keys), cross_entropy(queries @ keys.T / 0.2, positives, reduction="none"))
    assert torch.autograd.gradcheck(loss, (queries, keys))


def test_autocast_leaves_the_scores_alone() -> None:
    z = unit(16, 8).float().requires_grad_()
    plain = nt_xent(z, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(z, temperature=0.1), plain)
    assert nt_xent(z.bfloat16(), temperature=0.1).dtype == torch.float32


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_score_matrix_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast, "_BLOCK", 1 << 14)
    z = unit(512, 8).float().requires_grad_()
    with Largest() as largest:
        nt_xent(z, temperature=0.1).mean().backward()
    assert 512 * 8 <= largest.elements <= 1 << 14
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.autograd.grad(dense(z, 0.1).mean(), z)[0])


def test_step_is_the_formula() -> None:
    whole = config()
    method = harness.build(whole)
    views, rows = harness.first_batch(whole)
    assert not torch.equal(views["first"].pixels, views["second"].pixels)
    pixels = torch.cat((views["first"].pixels, views["second"].pixels))
    z = normalize(method.projection(method.trunk(pixels)), dim=1)  # type: ignore[operator]
    out = harness.build(whole)(views, rows, step=0)
    torch.testing.assert_close(out["loss"], dense(z, 0.2).mean())
    torch.testing.assert_close(out["similarity"], (z[:8] * z[8:]).sum(1).mean().detach())
    assert not out["similarity"].requires_grad


def test_weights_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = harness.build(whole)
    assert isinstance(method, SimCLR)
    with harness.tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        head = MLPHead(24, 24, 16)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.projection.state_dict(), head.state_dict())


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_global_batchnorm_is_batchnorm_in_one_process() -> None:
    plain, together = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    together.load_state_dict(plain.state_dict())
    globalize_batchnorm(together)
    assert type(together[1]) is GlobalBatchNorm
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together(images), plain(images))
    assert torch.equal(together.eval()(images), plain.eval()(images))
    for a, b in zip(together.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_processes_train_as_one_with_batchnorm_over_both(tmp_path: Path) -> None:
    harness.assert_two_processes_train_as_one(replace(config(), sync_batchnorm=True), tmp_path, normalised=True)


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    harness.assert_overfits(config(), steps=40, share=0.2)


def test_head_of_the_authors() -> None:
    """dense - BatchNorm - ReLU - dense - BatchNorm, neither a bias in the layers nor a shift in the last one."""
    head = harness.build(config(head_norm=True)).projection
    names = {name: p.requires_grad for name, p in head.named_parameters()}  # type: ignore[union-attr]
    assert names == {"0.weight": True, "1.weight": True, "1.bias": True, "3.weight": True, "4.weight": True,
                     "4.bias": False}  # fmt: skip
    vissl = RECIPES["simclr-vissl"]()
    assert isinstance(vissl.method, SimCLR.Config)
    assert not vissl.method.head_norm
    assert vissl.optim.warmup_factor == pytest.approx(0.6 / 4.8)


def test_recipe_is_the_published_numbers() -> None:
    whole = RECIPES["simclr"]()
    method, optim = whole.method, whole.optim
    assert isinstance(method, SimCLR.Config)
    assert (method.temperature, method.hidden_features, method.dimensions) == (0.1, 2048, 128)
    assert (whole.batch_size, whole.epochs, method.head_norm) == (4096, 1000, True)
    assert whole.model == ResNetConfig(zero_init_residual=True)
    assert whole.sync_batchnorm
    assert (optim.name, optim.weight_decay, optim.warmup_epochs) == ("lars", 1e-6, 10)
    assert optim.lr_per_256_images * whole.batch_size / 256 == pytest.approx(4.8)
    augment = method.image_view.augment
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (augment.jitter_probability, augment.grayscale_probability, augment.blur_probability) == (0.8, 0.2, 0.5)
    assert list(method.views().values()) == [method.image_view] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "method.temperature must be positive and finite, got -1.0"),
        ({"hidden_features": 0}, "method.hidden_features must be at least 1, got 0"),
        ({"dimensions": 0}, "method.dimensions must be at least 2, got 0"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimCLR.Config(**changes).build(context(ResNetConfig(name="resnet18"), 10, seed=0))
