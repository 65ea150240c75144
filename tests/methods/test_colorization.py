import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sslfast.config import save_json, to_dict
from sslfast.evaluation.encoders import TRAINED, UNTRAINED, TrunkEncoder, load_run
from sslfast.methods.colorization import (
    SIGMA,
    Colorization,
    cell_colours,
    gamut_bins,
    lab_to_rgb,
    lightness,
    rebalancing,
    soft_code,
)
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models.resnet import ResNetConfig
from sslfast.ops import rgb_to_lab
from sslfast.recipes.generative import colorization, colorization_small
from sslfast.runs.checkpoint import save_checkpoint
from sslfast.views.types import View
from tests.methods import harness
from tests.tiny import context


def tiny(**changes: Any) -> Any:
    return harness.tiny(colorization_small(), **changes)


def colours(count: int, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def same_lightness(rgb: Tensor) -> Tensor:
    """Gray pixels of the same L."""
    lab = rgb_to_lab(rgb)
    lab[:, 1:] = 0
    return lab_to_rgb(lab)


def built(config: Any) -> Colorization:
    method = harness.build(config)
    assert isinstance(method, Colorization)
    return method


def test_bins_are_the_nearest_ones_of_srgb_colours() -> None:
    bins = gamut_bins()
    assert bins.shape == (261, 2)
    assert torch.equal(bins, (bins / 10).round() * 10)
    assert len(torch.unique(bins, dim=0)) == 261
    assert bins.amin(dim=0).tolist() == [-90, -110]
    assert bins.amax(dim=0).tolist() == [100, 90]
    known = {tuple(b) for b in bins.tolist()}
    # The bins of colours inside the cube are among those of its surface.
    ab = rgb_to_lab(colours(64, 32))[:, 1:].movedim(1, -1).reshape(-1, 2)
    assert {tuple(b) for b in ((ab / 10).round() * 10 + 0.0).unique(dim=0).tolist()} <= known


def test_lab_to_rgb_inverts() -> None:
    rgb = colours(4)
    rgb[0, :, 0, 0], rgb[0, :, 0, 1] = 0.0, 1.0
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, rtol=0, atol=1e-4)


def test_soft_code_against_all_distances() -> None:
    bins = gamut_bins()
    ab = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 120 - 60
    index, weights = soft_code(ab, bins)
    squared = (ab[:, None].double() - bins.double()).square().sum(-1)
    for row in range(50):
        order = squared[row].argsort()[:5]
        assert set(index[row].tolist()) == set(order.tolist())
        assert index[row, 0] == order[0]
        gauss = torch.exp(-squared[row][index[row]] / (2 * SIGMA**2))
        torch.testing.assert_close(weights[row].double(), gauss / gauss.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    ten, shares = soft_code(ab, bins, 10)
    assert torch.equal(ten[:, :5], index)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50))
    on_bin, share = soft_code(bins[130], bins)  # in the middle: four neighbours at distance 10
    assert on_bin[0] == 130
    torch.testing.assert_close(share, torch.tensor([1.0] + 4 * [math.exp(-2)]) / (1 + 4 * math.exp(-2)))


def test_gray_pictures_are_left_out_of_the_loss() -> None:
    """The loss of a batch with gray pictures is that of the others, over all cells."""
    config = tiny(mask_gray=True, cell_colour="first", neighbours=10)
    method = built(config)
    views, rows = harness.first_batch(config)
    gray = views["image"].pixels[:3].mean(1, keepdim=True)
    views["image"].pixels[:3] = method.pixel_space.from_rgb(gray.sigmoid().expand(-1, 3, -1, -1))
    out = method(views, rows, step=0)["loss"]
    rgb = method.pixel_space.to_rgb(views["image"].pixels)
    colour = cell_colours(rgb_to_lab(rgb), 4, "first")
    cells, weights = soft_code(colour, method.bins, 10)
    scores = method.predict(method.pixel_space.from_rgb(lightness(rgb))).log_softmax(1).movedim(1, -1)
    losses = -(scores.gather(-1, cells) * weights).sum(-1) * rebalancing(method.frequencies, 0.5)[cells[..., 0]].float()
    torch.testing.assert_close(out, losses[3:].sum() / losses.numel())
    assert (colour[3:].abs().amax((1, 2, 3)) > 5).all()


def test_cells_hold_mean_colours() -> None:
    lab = rgb_to_lab(colours(2))
    assert torch.equal(cell_colours(lab, 4, "first"), lab[:, 1:, ::4, ::4].movedim(1, -1))
    cells = cell_colours(lab, 4)
    assert cells.shape == (2, 2, 2, 2)
    torch.testing.assert_close(cells[1, 0, 1], lab[1, 1:, :4, 4:].mean(dim=(1, 2)))


def test_rebalancing_averages_to_one() -> None:
    p = torch.rand(261, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = p**4 / (p**4).sum()
    for share in (0.1, 0.5, 1.0):
        w = rebalancing(p, share)
        torch.testing.assert_close((p * w).sum(), torch.ones((), dtype=torch.float64))
        assert (w[p.argsort()].diff() <= 0).all()  # rare bins weigh more
        expected = 1 / ((1 - share) * p + share / 261)
        torch.testing.assert_close(w / w[0], expected / expected[0])
    assert torch.equal(rebalancing(p, 1.0), torch.full_like(p, rebalancing(p, 1.0)[0].item()))


def test_uniform_scores_cost_ln_q() -> None:
    """The best scores cost the entropy of the soft code, for an image of one bin's colour."""
    config = tiny(uniform_share=1.0)
    method = built(config)
    views, rows = harness.first_batch(config)
    method.predict = lambda x: torch.full((len(x), 261, 8, 8), 3.0)  # type: ignore[method-assign]
    out = method(views, rows, step=0)
    torch.testing.assert_close(out["loss"], torch.tensor(math.log(261)))
    torch.testing.assert_close(out["loss_unweighted"], torch.tensor(math.log(261)))
    rgb = method.pixel_space.to_rgb(views["image"].pixels)
    cells, weights = soft_code(cell_colours(rgb_to_lab(rgb), 4), method.bins)
    dense = (one_hot(cells, 261) * weights[..., None]).sum(dim=-2).movedim(-1, 1)
    method.predict = lambda _seen: dense.clamp(min=1e-30).log()  # type: ignore[method-assign]
    entropy = -(weights * weights.log()).sum(-1).mean()
    torch.testing.assert_close(method(views, rows, step=0)["loss"], entropy)


def test_frequencies_are_the_mean_soft_code_and_weigh_the_loss() -> None:
    config = tiny()
    method = built(config)
    views, rows = harness.first_batch(config)
    rgb = method.pixel_space.to_rgb(views["image"].pixels)
    cells, weights = soft_code(cell_colours(rgb_to_lab(rgb), 4), method.bins)
    dense = (one_hot(cells, 261) * weights[..., None]).sum(dim=-2)
    mean = dense.flatten(0, -2).double().mean(dim=0)
    scores = torch.randn(len(rows), 261, 8, 8, generator=torch.Generator().manual_seed(1))
    method.predict = lambda _seen: scores  # type: ignore[method-assign]
    out = method(views, rows, step=0)
    torch.testing.assert_close(method.frequencies, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(method.frequencies.sum(), torch.ones((), dtype=torch.float64))
    losses = -(dense * scores.movedim(1, -1).log_softmax(-1)).sum(-1)
    weight = rebalancing(mean, 0.5).float()[cells[..., 0]]
    torch.testing.assert_close(out["loss"], (weight * losses).mean(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out["loss_unweighted"], losses.mean())
    # Two batches have equal weight; evaluation does not count.
    gray = {"image": View(pixels=torch.zeros_like(views["image"].pixels))}
    first = method.frequencies.clone()
    method(gray, rows, step=1)
    alone = built(config)
    alone.predict = method.predict  # type: ignore[method-assign]
    alone(gray, rows, step=1)
    torch.testing.assert_close(method.frequencies, (first + alone.frequencies) / 2)
    assert method.batches == 2
    method.eval()(views, rows, step=2)
    assert method.batches == 2
    # After the window it is an exponential moving average.
    method.train().batches.fill_(5000)
    before = method.frequencies.clone()
    method(views, rows, step=3)
    torch.testing.assert_close(method.frequencies, 0.999 * before + 0.001 * first)


def test_colour_does_not_reach_the_network() -> None:
    config = tiny()
    views, rows = harness.first_batch(config)
    space = PixelSpace(config.method.image_view.augment)
    rgb = space.to_rgb(views["image"].pixels)
    seen: list[Tensor] = []
    losses = []
    for picture in (rgb, same_lightness(rgb)):
        method = harness.build(config)
        method.trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
        losses.append(method({"image": View(pixels=space.from_rgb(picture))}, rows, step=0)["loss"])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(space.to_rgb(seen[0])[:, 0], rgb_to_lab(rgb)[:, 0] / 100, rtol=0, atol=1e-5)
    assert (losses[0] - losses[1]).abs() > 0.01  # it is the target


def test_evaluations_give_the_trunk_the_input_of_the_method(tmp_path: Path) -> None:
    config = tiny()
    method = harness.build(config)
    save_json(tmp_path / "config.json", to_dict(config))
    save_checkpoint(tmp_path / "checkpoints", {"step": 5, "method": method.state_dict()}, 5)
    with harness.tiny_trunks():
        encoders = load_run(tmp_path).encoders
    images = (colours(4, 32) * 255).round().to(torch.uint8)
    space = PixelSpace(config.method.image_view.augment)
    seen: list[Tensor] = []
    method.eval().trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    method({"image": View(pixels=space.from_rgb(images / 255))}, torch.arange(4), step=0)
    for name in (TRAINED, UNTRAINED):
        encoder = encoders[name]
        assert isinstance(encoder, TrunkEncoder)
        assert encoder.identity()["colours"] == "lightness"
        torch.testing.assert_close(encoder.prepare(images), seen[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(encoders[TRAINED](images), method.trunk(seen[0]), rtol=1e-4, atol=1e-4)


def test_the_unweighted_loss_takes_no_gradients() -> None:
    views, rows = harness.first_batch(tiny())
    out = harness.build(tiny())(views, rows, step=0)
    assert out["loss"].requires_grad
    assert not out["loss_unweighted"].requires_grad


def test_trains_and_resumes(tmp_path: Path) -> None:
    harness.assert_gradients_reach_the_trunk(tiny())
    harness.assert_overfits(tiny(), lr=0.1)
    harness.assert_resumes(tiny(), tmp_path, stops=(2,))
    assert harness.final(tmp_path / "whole")["method"]["batches"] == 6


def test_two_processes_share_the_frequencies(tmp_path: Path) -> None:
    with harness.tiny_trunks():
        method = built(tiny())
    assert [t.data_ptr() for t in method.replicated()] == [method.frequencies.data_ptr(), method.batches.data_ptr()]
    config = replace(tiny(), epochs=1)
    harness.train(config, tmp_path / "1")
    harness.run(harness._train_rank, 2, config, tmp_path / "2", True)
    one, two = (harness.final(tmp_path / name)["method"] for name in ("1", "2"))
    torch.testing.assert_close(two["frequencies"], one["frequencies"], rtol=0, atol=1e-6)
    assert one["batches"] == two["batches"] == 3


def test_panels() -> None:
    config = tiny()
    views, rows = harness.first_batch(config)
    panels = config.method.preview_panels(views, rows, seed=0)
    rgb = PixelSpace(config.method.image_view.augment).to_rgb(views["image"].pixels)
    torch.testing.assert_close(panels["input"], lightness(rgb))
    assert panels["target"].shape == rgb.shape
    assert 0 <= panels["target"].min() <= panels["target"].max() <= 1
    green = torch.tensor([0.2, 0.6, 0.3])[:, None, None].expand(1, 3, 32, 32)
    view = {"image": View(pixels=PixelSpace(config.method.image_view.augment).from_rgb(green))}
    target = config.method.preview_panels(view, rows[:1], seed=0)["target"]
    torch.testing.assert_close(target, green, rtol=0, atol=0.05)
    cells, weights = soft_code(rgb_to_lab(green)[0, 1:, 0, 0], gamut_bins())
    torch.testing.assert_close(rgb_to_lab(target)[0, 1:, 0, 0], weights @ gamut_bins()[cells], rtol=0, atol=0.05)
    halves = green.clone()
    halves[:, :, 16:] = torch.tensor([0.5, 0.3, 0.6])[:, None, None]
    view = {"image": View(pixels=PixelSpace(config.method.image_view.augment).from_rgb(halves))}
    target = config.method.preview_panels(view, rows[:1], seed=0)["target"]
    torch.testing.assert_close(target, halves, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 3}, "method.stride must be a power of two that divides method.image_view.crop.size=224, got 3"),
        ({"stride": 64}, "divides method.image_view.crop.size=224, got 64"),
        ({"uniform_share": 0.0}, r"method.uniform_share must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Colorization.Config(**changes).validate()


def test_cells_are_at_most_one_cell_of_res5() -> None:
    assert Colorization.Config(stride=8).build(context(ResNetConfig(stem="small"), 4, seed=0)).config.stride == 8
    with pytest.raises(ValueError, match=r"method.stride must be at most 8, the stride of resnet50 with stem small"):
        Colorization.Config(stride=16).build(context(ResNetConfig(stem="small"), 4, seed=0))


def test_recipes() -> None:
    method = colorization().method
    assert isinstance(method, Colorization.Config)
    assert (method.stride, method.uniform_share, method.trunk_input) == (4, 0.5, "lightness")
    assert (method.neighbours, method.cell_colour, method.mask_gray) == (10, "first", True)
    assert colorization_small().method.image_view.crop.size == 64
