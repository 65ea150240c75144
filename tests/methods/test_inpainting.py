import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.methods.inpainting import Inpainting, cubic, draw_holes, pixel_weights, punched
from sslfast.methods.shared.reconstruction import clean_view
from sslfast.models.resnet import ResNetConfig
from sslfast.ops.philox import Stream, random_integers
from sslfast.recipes.generative import inpainting, inpainting_small
from sslfast.views.types import View
from tests.methods import harness
from tests.tiny import context

ROWS = torch.arange(2000) * 3


def tiny(**changes: Any) -> Any:
    return harness.tiny(inpainting_small(), **changes)


def config(**changes: Any) -> Inpainting.Config:
    return Inpainting.Config(**{"image_view": clean_view(32), "overlap": 2, **changes})


@pytest.mark.parametrize("holes", ["central", "random", "region"])
def test_perfect_and_constant_reconstruction(holes: str) -> None:
    tiny_config = tiny(holes=holes)
    method = harness.build(tiny_config)
    views, rows = harness.first_batch(tiny_config)
    clean = views["image"].pixels
    method.predict = lambda _seen: clean  # type: ignore[attr-defined]
    assert method(views, rows, step=0)["loss"] == 0
    hole = draw_holes(rows, tiny_config.method, seed=tiny_config.seed, step=4)
    weights = pixel_weights(hole, tiny_config.method).expand_as(clean)
    mean = (weights * clean).sum() / weights.sum()
    variance = (weights * (clean - mean).square()).sum() / weights.sum()
    method.predict = lambda _seen: mean.expand_as(clean)  # type: ignore[attr-defined]
    out = method(views, rows, step=4)
    torch.testing.assert_close(out["loss"], variance)
    torch.testing.assert_close(out["loss_hole"], (clean - mean).square()[hole.expand_as(clean)].mean())


def test_only_hole_and_band_are_reconstructed() -> None:
    tiny_config = tiny()
    method = harness.build(tiny_config)
    views, rows = harness.first_batch(tiny_config)
    clean = views["image"].pixels
    reconstructed = (
        pixel_weights(draw_holes(rows, tiny_config.method, seed=tiny_config.seed, step=0), tiny_config.method) > 0
    )
    method.predict = lambda _seen: torch.where(reconstructed, clean, 1e6)  # type: ignore[attr-defined]
    assert method(views, rows, step=0)["loss"] == 0


@pytest.mark.parametrize(("size", "side"), [(32, 16), (33, 16), (224, 112)])
def test_central_hole(size: int, side: int) -> None:
    hole = draw_holes(ROWS[:3], config(holes="central", image_view=clean_view(size)), seed=0, step=0)
    assert hole.shape == (3, 1, size, size)
    assert (hole.sum(dim=(1, 2, 3)) == side**2).all()
    start = (size - side) // 2
    assert hole[:, :, start : start + side, start : start + side].all()


def test_regions() -> None:
    """20 to 30 % of each image, connected and of any shape, equally often everywhere."""
    method = config(holes="region", image_view=clean_view(64))
    hole = draw_holes(ROWS, method, seed=0, step=0)
    shares = hole.double().mean(dim=(1, 2, 3))
    assert shares.min() > 0.199
    assert shares.max() < 0.301
    assert abs(shares.mean() - 0.25) < 0.003
    assert shares.std() > 0.025  # uniform: 0.029
    often = hole.double().mean(dim=0)[0]
    assert (often - 0.25).abs().max() < 0.08
    # A cell of noise is 8.3 px wide: neighbouring pixels are nearly always both in or both out.
    assert (hole[:, :, 1:] != hole[:, :, :-1]).double().mean() < 0.1
    assert torch.equal(draw_holes(ROWS[3:7], method, seed=0, step=0), hole[3:7])
    assert not torch.equal(draw_holes(ROWS[:9], method, seed=0, step=1), hole[:9])


def test_cubic_weights() -> None:
    """They sum to 1 at any phase, reproduce lines, and are 1 on a node."""
    places = torch.linspace(3, 4, 11)[:, None]
    weights = cubic(places - torch.arange(8))
    torch.testing.assert_close(weights.sum(1), torch.ones(11))
    torch.testing.assert_close(weights @ torch.arange(8.0), places[:, 0])
    assert torch.equal(weights[0], torch.eye(8)[3])


def test_error_of_the_whole_image() -> None:
    method = config(holes="region", loss_over="image")
    assert (pixel_weights(draw_holes(ROWS[:3], method, seed=0, step=0), method) == 1).all()


def test_sides_are_the_nearest_even_number_in_the_centre_and_rounded_down_at_random() -> None:
    central = [config(holes="central", masked_share=share).block_side() for share in (0.2, 0.25, 0.3)]
    assert central == [14, 16, 18]  # of 14.3, 16 and 17.5
    random = [config(masked_share=share, blocks=blocks).block_side() for share, blocks in ((0.25, 5), (0.3, 5))]
    assert random == [7, 7]  # of 7.2 and 7.8


def test_corners_are_the_integers_of_the_corruption_stream() -> None:
    method = config(blocks=1)
    hole = draw_holes(ROWS, method, seed=3, step=1)[:, 0]
    corners = random_integers(ROWS, 2, 32 - method.block_side() + 1, seed=3, stream=Stream.CORRUPTION, step=1)
    assert torch.equal(hole.any(dim=2).int().argmax(dim=1), corners[:, 0])
    assert torch.equal(hole.any(dim=1).int().argmax(dim=1), corners[:, 1])


def test_one_random_hole_is_uniform_over_all_positions() -> None:
    method = config(blocks=1, image_view=clean_view(16))
    side = method.block_side()
    assert side == 8
    hole = draw_holes(ROWS, method, seed=3, step=1)[:, 0]
    assert (hole.sum(dim=(1, 2)) == side**2).all()
    top, left = hole.any(dim=2).int().argmax(dim=1), hole.any(dim=1).int().argmax(dim=1)
    expected = len(ROWS) / 9  # corners 0..8
    for corner in (top, left):
        counts = torch.bincount(corner, minlength=9)
        assert ((counts - expected).square() / expected).sum() < 26.1  # chi-squared, 8 degrees of freedom: p = 0.001
    together = torch.bincount(top * 9 + left, minlength=81)
    assert ((together - expected / 9).square() / (expected / 9)).sum() < 124.8  # 80 degrees of freedom: p = 0.001


def test_random_holes_cover_their_share_less_the_overlap() -> None:
    method = config(blocks=5, masked_share=0.25, image_view=clean_view(64))
    side = method.block_side()
    assert side == math.floor(64 * math.sqrt(0.05))
    hole = draw_holes(ROWS, method, seed=3, step=1)
    share = hole.float().mean(dim=(1, 2, 3))
    assert share.max() <= 5 * side**2 / 64**2 <= 0.25
    # A pixel at x is in a square along one axis for min(x + 1, side, ...) of the positions.
    places = 64 - side + 1
    along = torch.tensor([min(x, places - 1) - max(x - side + 1, 0) + 1 for x in range(64)]) / places
    expected = 1 - (1 - along[:, None] * along[None, :]) ** 5
    assert (hole[:, 0].float().mean(dim=0) - expected).abs().max() < 5 * math.sqrt(0.25 / len(ROWS))


def test_holes_are_a_function_of_seed_step_and_sample_id() -> None:
    rows, method = torch.tensor([5, 9, 9]), config()
    hole = draw_holes(rows, method, seed=1, step=2)
    assert torch.equal(hole[1], hole[2])
    assert not torch.equal(hole[0], hole[1])
    assert torch.equal(hole.flip(0), draw_holes(rows.flip(0), method, seed=1, step=torch.tensor(2)))
    assert not torch.equal(hole, draw_holes(rows, method, seed=1, step=3))
    assert not torch.equal(hole, draw_holes(rows, method, seed=2, step=2))


def test_weights_of_hole_band_and_rest() -> None:
    hole = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    hole[..., 3:6, 3:6] = True
    weights = pixel_weights(hole, config(overlap=2, overlap_weight=10.0))
    expected = torch.zeros(9, 9)
    expected[1:8, 1:8] = 10.0
    expected[3:6, 3:6] = 1.0
    assert torch.equal(weights[0, 0], expected)
    assert torch.equal(pixel_weights(hole, config(overlap=0)), hole.float())


@pytest.mark.parametrize("holes", ["central", "random"])
def test_what_is_in_the_holes_does_not_reach_the_network(holes: str) -> None:
    tiny_config = replace(tiny(holes=holes), seed=5)
    views, rows = harness.first_batch(tiny_config)
    clean = views["image"].pixels
    hole = draw_holes(rows, tiny_config.method, seed=tiny_config.seed, step=3)
    other = torch.where(hole, torch.randn_like(clean), clean)
    seen: list[Tensor] = []
    losses = []
    for x in (clean, other):
        method = harness.build(tiny_config)
        method.trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
        losses.append(method({"image": View(pixels=x)}, rows, step=3)["loss"])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], punched(clean, hole))
    assert losses[0] != losses[1]


def test_the_loss_of_the_holes_takes_no_gradients() -> None:
    views, rows = harness.first_batch(tiny())
    out = harness.build(tiny())(views, rows, step=0)
    assert out["loss"].requires_grad
    assert not out["loss_hole"].requires_grad


def test_trains_and_resumes(tmp_path: Path) -> None:
    harness.assert_gradients_reach_the_trunk(tiny())
    harness.assert_overfits(tiny(holes="central"), lr=0.03, share=0.3)  # fixed holes
    harness.assert_resumes(tiny(), tmp_path, stops=(2,))


def test_panels_show_what_a_run_with_the_seed_sees() -> None:
    tiny_config = tiny()
    views, rows = harness.first_batch(tiny_config)
    panels = tiny_config.method.preview_panels(views, rows, seed=5)
    hole = draw_holes(rows, tiny_config.method, seed=5, step=0)
    fill = torch.tensor(tiny_config.method.image_view.augment.mean)[:, None, None].expand_as(panels["input"])
    inside = hole.expand_as(fill)
    torch.testing.assert_close(panels["input"][inside], fill[inside])
    assert (panels["target"][:, :1][pixel_weights(hole, tiny_config.method) == 0] == 0.94).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_share": 0.0}, r"method.masked_share must be in \(0, 1\), got 0.0"),
        ({"blocks": 0}, "method.blocks must be at least 1, got 0"),
        ({"overlap": -1}, "method.overlap must be at least 0, got -1"),
        ({"overlap_weight": -1.0}, "method.overlap_weight must be at least 0, got -1.0"),
        ({"masked_share": 0.001, "blocks": 90}, "makes holes of 0 px in images of 224 px"),
        ({"holes": "central", "masked_share": 0.999}, "makes holes of 224 px in images of 224 px"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inpainting.Config(**changes).build(context(ResNetConfig(), 4, seed=0))


def test_recipes() -> None:
    method = inpainting().method
    assert isinstance(method, Inpainting.Config)
    assert (method.holes, method.loss_over, method.masked_share) == ("region", "image", 0.25)
    assert inpainting_small().method.image_view.crop.size == 64
