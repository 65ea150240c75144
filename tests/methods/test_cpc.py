import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.methods import cpc
from sslfast.methods.cpc import CPC
from sslfast.models.build import build_trunk
from sslfast.models.context import RowContext
from sslfast.models.contrast import info_nce
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes import RECIPES
from sslfast.recipes.contrastive import cpc_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, JigsawConfig, View, ViewConfig
from tests.methods import harness
from tests.tiny import context, same

GRID = 7


def config(**changes: Any) -> TrainConfig:
    sizes = {"patch_size": 8, "patch_stride": 4, "context_features": 12, "dimensions": 6}
    return harness.tiny(cpc_small(), **{**sizes, **changes})


def build(whole: TrainConfig) -> CPC:
    method = harness.build(whole)
    assert isinstance(method, CPC)
    return method


class Corner(nn.Module):
    """The first pixel of each patch: in an image of its own coordinates, those of the patch."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches[:, :, 0, 0]


def coordinates(size: int) -> Tensor:
    """``[2, 3, size, size]``: image number, y and x of every pixel."""
    line = torch.arange(float(size))
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.stack((torch.full_like(y, image), y, x)) for image in range(2)])


def test_patches_are_cut_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(config(patch_size=8, patch_stride=4))
    method.trunk = Corner()
    monkeypatch.setattr(cpc, "layer_norm", lambda features, _shape: features)
    features = method.embed(coordinates(32))
    place = 4.0 * torch.arange(GRID)
    assert features.shape == (2, GRID, GRID, 3)
    assert torch.equal(features[1, :, :, 1], place[:, None].expand(GRID, GRID))
    assert torch.equal(features[1, :, :, 2], place.expand(GRID, GRID))
    assert torch.equal(features[:, 0, 0, 0], torch.tensor([0.0, 1.0]))


def test_vectors_depend_on_their_own_patch_only() -> None:
    method = build(config())
    (views, _), changed = harness.first_batch(config()), 5
    pixels = views["image"].pixels
    before = method.embed(pixels)
    torch.testing.assert_close(before.mean(-1), torch.zeros(before.shape[:-1]), rtol=0, atol=1e-5)  # normalised
    torch.testing.assert_close(before.std(-1, correction=0), torch.ones(before.shape[:-1]), rtol=0, atol=0.05)
    pixels[:, :, 4 * changed + 4 :, :] += 1.0  # below what rows 0 .. 4 show, which ends at 4 * 4 + 8
    after = method.embed(pixels)
    assert torch.equal(after[:, :changed], before[:, :changed])
    assert not torch.equal(after[:, changed], before[:, changed])


def test_predictions_from_above_do_not_change_with_what_is_below() -> None:
    """Trunk, context network and predictions together, in training mode, checked by gradients."""
    method = build(config(directions="down", first_step=1, last_step=3))
    pixels = harness.first_batch(config())[0]["image"].pixels.requires_grad_()
    features = method.embed(pixels)
    predicted, positives = method.predict(features)
    numbers = positives.view(-1)
    for row in range(1, GRID):
        # Contexts of rows above `row`: a prediction for row r made k rows ahead comes from r - k.
        start = 0
        for k in (1, 2, 3):
            count = harness.BATCH * (GRID - k) * GRID
            own = numbers[start : start + count] // GRID % GRID - k
            above = predicted[start : start + count][own < row]
            (gradient,) = torch.autograd.grad(above.sum(), pixels, retain_graph=True)
            end = 4 * (row - 1) + 8  # last line of the patches of row - 1
            assert gradient[:, :, end:].abs().max() == 0 if end < 32 else True
            assert gradient[:, :, :end].abs().max() > 0
            start += count


def test_context_network_sees_rows_down_to_its_own() -> None:
    context = RowContext(5, 8, blocks=3)
    grid = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = context(grid)
    assert out.shape == grid.shape
    for row in range(6):
        (gradient,) = torch.autograd.grad(out[:, :, row].sum(), grid, retain_graph=True)
        seen = gradient.abs().sum(dim=(0, 1, 3)) > 0
        assert seen.tolist() == [row - 3 <= r <= row for r in range(6)]


def test_every_context_is_paired_with_the_patch_k_rows_ahead_in_each_direction() -> None:
    method = build(config(directions="all", dimensions=3, first_step=2, last_step=4))

    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.repeat(1, 3, 1, 1)

    method.contexts = nn.ModuleList(nn.Identity() for _ in range(4))
    method.predictions = nn.ModuleList(Copies() for _ in range(4))
    places = coordinates(GRID).permute(0, 2, 3, 1)  # [2, G, G, 3]: image, row, column
    predicted, positives = method.predict(places)
    moves = places.reshape(-1, 3)[positives] - predicted
    assert moves[:, 0].abs().max() == 0  # of the same image
    expected = 2 * sum(GRID * (GRID - k) for k in (2, 3, 4))
    counts = {}
    for part in moves.split(expected):
        kinds = {tuple(move[1:].tolist()) for move in part}
        direction = {tuple((torch.tensor(kind) / max(map(abs, kind))).tolist()) for kind in kinds}
        assert len(direction) == 1
        assert sorted(max(map(abs, kind)) for kind in kinds) == [2.0, 3.0, 4.0]
        counts[direction.pop()] = len(part)
    assert counts == {(1, 0): expected, (-1, 0): expected, (0, 1): expected, (0, -1): expected}
    _, down = build(config(directions="down")).predict(torch.zeros(2, GRID, GRID, 24))
    assert down.min() == 2 * GRID  # rows 0 and 1 are never predicted


def test_loss_of_equal_scores_is_the_log_of_all_patches() -> None:
    method = build(config())
    with torch.no_grad():
        method.target.weight.zero_()
        method.target.bias.zero_()
    views, rows = harness.first_batch(config())
    loss = method(views, rows, step=0)["loss"]
    torch.testing.assert_close(loss, torch.tensor(math.log(harness.BATCH * GRID**2)))


def test_loss_is_the_formula() -> None:
    whole = config()
    method = build(whole)
    views, rows = harness.first_batch(whole)
    features = method.embed(views["image"].pixels)
    predicted, positives = method.predict(features)
    scores = predicted @ method.target(features).flatten(0, 2).T / math.sqrt(6)
    torch.testing.assert_close(method(views, rows, step=0)["loss"], cross_entropy(scores, positives))


def test_perfect_predictions_have_no_loss() -> None:
    keys, positives = torch.eye(9), torch.arange(9).flip(0)
    loss = info_nce(20 * keys[positives], keys, positives, temperature=1.0)
    torch.testing.assert_close(loss, torch.full((9,), math.log(1 + 8 * math.exp(-20))), atol=1e-6, rtol=0)


def test_weights_are_drawn_from_the_seed() -> None:
    whole = replace(config(directions="all", first_step=2, last_step=4, context_blocks=2), seed=5)
    method = build(whole)
    with harness.tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        target = nn.Linear(24, 6)
        contexts = nn.ModuleList(RowContext(24, 12, 2) for _ in range(4))
        predictions = nn.ModuleList(nn.Conv2d(24, 3 * 6, 1) for _ in range(4))
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.target.state_dict(), target.state_dict())
    assert same(method.contexts.state_dict(), contexts.state_dict())
    assert same(method.predictions.state_dict(), predictions.state_dict())


def test_gradients_reach_the_trunk() -> None:
    harness.assert_gradients_reach_the_trunk(config())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    harness.assert_two_processes_train_as_one(config(), tmp_path, normalised=True)


def test_resumes(tmp_path: Path) -> None:
    harness.assert_resumes(config(), tmp_path)


def test_overfits() -> None:
    """The lowest of the losses: steps of this size sometimes overshoot, since scores are unbounded."""
    sizes = {"patch_size": 16, "patch_stride": 8, "first_step": 1, "last_step": 2, "directions": "down"}
    losses = harness.overfit(config(dimensions=64, context_features=32, **sizes), steps=50, lr=0.03)
    assert min(losses) < 0.5 * losses[0]


def test_preview_shows_context_and_what_is_predicted() -> None:
    whole = config()
    method = whole.method
    assert isinstance(method, CPC.Config)
    pixels = torch.full((2, 3, 32, 32), 10.0)  # white
    panels = method.preview_panels({"image": View(pixels=pixels)}, torch.arange(2), seed=0)
    shown = {name: (picture == 1).all(dim=(0, 1, 3)).nonzero().flatten() for name, picture in panels.items()}
    assert method.grid == GRID
    assert shown["context"].tolist() == list(range(4 + 8))  # rows 0 and 1; last_step = 5 rows further is the last
    assert shown["to predict"].tolist() == list(range(4 * 3, 32))


def test_layer_norm_uses_one_image_only() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18", norm="layer"), seed=0)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trunk(images)[:1], trunk(images[:1]), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())
    assert not list(trunk.buffers())


def test_recipe_is_the_published_numbers() -> None:
    whole = RECIPES["cpc"]()
    method = whole.method
    assert isinstance(method, CPC.Config)
    assert (method.patch_size, method.patch_stride, method.grid, method.image_view.crop.size) == (64, 32, 7, 256)
    assert (whole.batch_size, whole.model.name, whole.model.norm) == (512, "resnet50", "layer")
    small = cpc_small().method
    assert isinstance(small, CPC.Config)
    assert (small.grid, small.directions) == (7, "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 0}, "method.patch_size must be at least 1, got 0"),
        ({"first_step": 0}, r"method.first_step must be in \[1, last_step=5\], got 0"),
        ({"first_step": 6}, r"method.first_step must be in \[1, last_step=5\], got 6"),
        ({"last_step": 7}, "method.last_step must be below 7, the rows of patches in a crop of 256 pixels"),
        ({"image_view": ViewConfig(crop=CropConfig(size=32))}, "method.last_step must be below 0"),
        ({"image_view": ViewConfig(jigsaw=JigsawConfig())}, "method.image_view.jigsaw must not be set"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPC.Config(**changes).build(context(ResNetConfig(name="resnet18", norm="layer"), 10, seed=0))


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.norm must be layer for CPC, got batch"):
        CPC.Config().build(context(ResNetConfig(name="resnet18"), 10, seed=0))
