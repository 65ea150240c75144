import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast.methods.relative_position import (
    NOISE,
    PATCHES,
    Draws,
    RelativePosition,
    cells_of_neighbours,
    draw,
    draw_kept,
    draw_sides,
    drop_colours,
    standardise,
)
from sslfast.methods.shared.patches import gather_patches, resampling_matrices
from sslfast.models.build import build_trunk
from sslfast.models.heads import PairHead
from sslfast.models.init import seeded
from sslfast.ops.philox import Stream, random_uint32
from sslfast.recipes.pretext import relative_position, relative_position_doersch, relative_position_small
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, JigsawConfig, View, ViewConfig
from tests.distributed.test_training import run
from tests.methods.harness import (
    _train_rank,
    assert_gradients_reach_the_trunk,
    assert_overfits,
    assert_resumes,
    build,
    final,
    first_batch,
    losses,
    tiny,
    tiny_trunks,
)
from tests.methods.test_jigsaw import Cell, numbered
from tests.tiny import same


def config(**changes: Any) -> TrainConfig:
    return tiny(relative_position_small(), **{"hidden_features": 16, **changes})


class Pair(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=1)


@pytest.mark.parametrize("pairs", ["all", "drawn"])
def test_pairs_are_the_centre_and_its_neighbours(pairs: str) -> None:
    method = build(config(pairs=pairs))
    assert isinstance(method, RelativePosition)
    method.trunk, method.head = Cell(), Pair()
    drawn = draw(torch.arange(5), 4, seed=0, step=0)
    shown, answers = method.logits(numbered(5), drawn)
    assert (shown[:, 0] == 4).all()
    if pairs == "all":
        assert shown[:, 1].tolist() == [0, 1, 2, 3, 5, 6, 7, 8] * 5
        assert answers.tolist() == list(range(8)) * 5
    else:
        assert torch.equal(answers, drawn.neighbour)
        assert torch.equal(shown[:, 1].long(), cells_of_neighbours(answers))
    assert torch.equal(shown[:, 1].long(), cells_of_neighbours(answers))


@pytest.mark.parametrize("pairs", ["all", "drawn"])
def test_uniform_logits_and_perfect_prediction(pairs: str) -> None:
    method = build(config(pairs=pairs))
    assert isinstance(method, RelativePosition)
    views, rows = first_batch(config())
    nn.init.zeros_(method.head.classes.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(method.head.classes.bias)  # type: ignore[union-attr, arg-type]
    assert method(views, rows, step=0)["loss"].item() == pytest.approx(math.log(8))

    class Reads(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return 100 * (second == cells_of_neighbours(torch.arange(8))).float()

    method.trunk, method.head = Cell(), Reads()
    out = method({PATCHES: numbered(6)}, torch.arange(6), step=2)
    assert out["loss"] == 0
    assert out["accuracy"] == 1


@pytest.mark.parametrize("pairs", ["all", "drawn"])
def test_the_order_in_the_view_does_not_matter(pairs: str) -> None:
    method = build(config(pairs=pairs, drop_colours=True))
    views, rows = first_batch(config())
    view = views[PATCHES]
    other = torch.rand(view.pixels.shape[:2], generator=torch.Generator().manual_seed(4)).argsort(1)
    assert view.permutation is not None
    shuffled = View(pixels=gather_patches(view.pixels, other), permutation=view.permutation.gather(1, other))
    first, second = (method({PATCHES: v}, rows, step=1)["loss"] for v in (view, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_other_patches_and_positions_carry_no_information() -> None:
    method = build(config(pairs="drawn"), normalised=False).eval()
    assert isinstance(method, RelativePosition)
    view = numbered(6)
    drawn = draw(torch.arange(6), 4, seed=0, step=0)
    before = method.logits(view, drawn)[0]
    assert view.permutation is not None
    used = (view.permutation == 4) | (view.permutation == cells_of_neighbours(drawn.neighbour)[:, None])
    view.pixels[~used] = 77.0  # patches of other cells
    torch.testing.assert_close(method.logits(view, drawn)[0], before)
    # Equal patches in all cells: every neighbour gets the same scores.
    both = build(config(pairs="all"))
    assert isinstance(both, RelativePosition)
    scores = both.logits(View(pixels=torch.ones(3, 9, 3, 8, 8), permutation=numbered(3).permutation), drawn)[0]
    torch.testing.assert_close(scores, scores[:1].expand_as(scores))


def test_colours_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = 2 + 3 * torch.randn(50, 9, 3, 15, 15, generator=generator)
    drawn = draw(torch.arange(50), 15, seed=1, step=4)
    dropped = drop_colours(patches, drawn.channel, drawn.noise)
    kept = torch.arange(3) == drawn.channel[..., None]
    assert torch.equal(dropped[kept], patches[kept])
    noise = dropped[~kept]
    deviation = patches[kept].std(dim=(1, 2), correction=0)
    assert noise.abs().max() < 6 * NOISE * deviation.max()
    assert noise.std().item() == pytest.approx(NOISE * 3, rel=0.05)
    # The content of dropped channels has no effect.
    changed = torch.where(kept[..., None, None], patches, -patches)
    assert torch.equal(drop_colours(changed, drawn.channel, drawn.noise), dropped)
    # All patches of a sample have the same noise, scaled by the kept channel: it carries no position.
    scaled = dropped / (NOISE * patches.gather(2, drawn.channel[:, :, None, None, None].expand(-1, -1, 1, 15, 15))
                        .std(dim=(-2, -1), correction=0, keepdim=True))  # fmt: skip
    torch.testing.assert_close(
        scaled[~kept], drawn.noise[:, None, None].expand(-1, 9, 3, -1, -1)[~kept], rtol=1e-4, atol=1e-4
    )


def test_standardised_patches() -> None:
    """Mean 0 and root mean square 1, whatever brightness and contrast; of the kept channel alone where one is kept."""
    generator = torch.Generator().manual_seed(0)
    patches = 2 + 3 * torch.randn(5, 9, 3, 15, 15, generator=generator) * torch.tensor([1, 2, 3])[:, None, None]
    whole = standardise(patches, None)
    torch.testing.assert_close(whole.mean(dim=(-3, -2, -1)), torch.zeros(5, 9), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.square().mean(dim=(-3, -2, -1)), torch.ones(5, 9))
    torch.testing.assert_close(standardise(4 * patches - 1, None), whole, rtol=1e-4, atol=1e-4)
    channel = torch.arange(45).view(5, 9) % 3
    kept = torch.arange(3) == channel[..., None]
    one = standardise(patches, channel)
    assert (one[~kept] == 0).all()
    torch.testing.assert_close(one[kept].mean(dim=(1, 2)), torch.zeros(45), rtol=0, atol=1e-5)
    torch.testing.assert_close(one[kept].square().mean(dim=(1, 2)), torch.full((45,), 3.0))
    assert (standardise(torch.full((1, 9, 3, 4, 4), 0.3), None).abs() < 1e-4).all()


def test_patches_are_made_small_and_enlarged() -> None:
    matrices = resampling_matrices(16)
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    for side in (1, 10, 15, 16):
        small = nn.functional.interpolate(x[None], size=side, mode="bilinear")
        expected = nn.functional.interpolate(small, size=16, mode="bilinear")[0]
        torch.testing.assert_close(matrices[side] @ x @ matrices[side].T, expected, rtol=1e-4, atol=1e-5)
    rows = torch.arange(3000)
    sides = draw_sides(rows, 96, 1 / 3, seed=0, step=1)
    share = (sides < 96).double().mean()
    assert abs(share - 1 / 3) < 5 * math.sqrt(2 / 9 / 27000)
    drawn = sides[sides < 96].double()
    assert drawn.min() >= 10
    assert drawn.max() == 94  # the root of an area below 95²
    # Area uniform: half of the patches are above the root of the mean area.
    assert abs((drawn > math.sqrt((100 + 95**2) / 2)).double().mean() - 0.5) < 0.03
    assert torch.equal(draw_sides(rows[5:8], 96, 1 / 3, seed=0, step=1), sides[5:8])


def test_dropout_is_a_function_of_seed_step_and_sample_id() -> None:
    rows = torch.arange(40)
    kept = draw_kept(rows, 8, 50, 0.25, seed=0, step=1)
    assert kept.shape == (320, 50)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((kept == 0).double().mean() - 0.25) < 5 * math.sqrt(0.1875 / 16000)
    assert torch.equal(draw_kept(rows[3:5], 8, 50, 0.25, seed=0, step=1), kept[24:40])
    assert not torch.equal(draw_kept(rows, 8, 50, 0.25, seed=0, step=2), kept)
    method = build(config(dropout=0.5))
    views, ids = first_batch(config())
    first, again, other = (method(views, ids, step=step)["loss"] for step in (1, 1, 2))
    assert first == again != other
    plain = build(config()).eval()
    plain.load_state_dict(method.state_dict())
    torch.testing.assert_close(method.eval()(views, ids, step=1)["loss"], plain(views, ids, step=1)["loss"])


def test_draws_are_uniform_functions_of_the_sample_id() -> None:
    rows = torch.arange(4000)
    drawn = draw(rows, 5, seed=0, step=2)
    assert ((drawn.neighbour.bincount(minlength=8) - 500).abs() < 5 * math.sqrt(500)).all()
    assert ((drawn.channel.flatten().bincount(minlength=3) - 12000).abs() < 5 * math.sqrt(12000)).all()
    assert abs(drawn.noise.mean().item()) < 5 / math.sqrt(drawn.noise.numel())
    assert drawn.noise.std().item() == pytest.approx(1, abs=0.02)
    part = draw(rows[7:9], 5, seed=0, step=torch.tensor(2))
    for name in ("neighbour", "channel", "noise"):
        assert torch.equal(getattr(part, name), getattr(drawn, name)[7:9])
    assert not torch.equal(draw(rows, 5, seed=0, step=3).neighbour, drawn.neighbour)
    words = random_uint32(rows, 10, seed=5, stream=Stream.PRETEXT, step=3)
    other = draw(rows, 5, seed=5, step=3)
    assert torch.equal(other.neighbour, words[:, 0] * 8 >> 32)
    assert torch.equal(other.channel, words[:, 1:] * 3 >> 32)


def test_weights_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = build(whole)
    assert isinstance(method, RelativePosition)
    with tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        head = PairHead(24, 16, 8)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.head.state_dict(), head.state_dict())


def test_draws_of_a_step_are_those_of_seed_step_and_sample_ids() -> None:
    method = build(replace(config(pairs="drawn"), seed=5))
    assert isinstance(method, RelativePosition)
    seen: list[Draws] = []

    def logits(view: View, drawn: Draws) -> tuple[Tensor, Tensor]:
        seen.append(drawn)
        return torch.zeros(8, 8), drawn.neighbour

    method.logits = logits  # type: ignore[method-assign]
    rows = 3 * torch.arange(8)
    method({PATCHES: numbered(8)}, rows, step=3)
    expected = draw(rows, 4, seed=5, step=3)
    for name in ("neighbour", "channel", "noise"):
        assert torch.equal(getattr(seen[0], name), getattr(expected, name))


@pytest.mark.parametrize("dropped", [False, True])
def test_preview_shows_the_pair_and_the_answer(dropped: bool) -> None:
    tiny_config = config(drop_colours=dropped)
    views, rows = first_batch(tiny_config)
    panels = tiny_config.method.preview_panels(views, rows, seed=0)
    side = views[PATCHES].pixels.shape[-1]
    assert {name: tuple(p.shape) for name, p in panels.items()} == {
        "centre and which neighbour?": (8, 3, side, 2 * side + 2),
        "answer": (8, 3, 3 * side + 4, 3 * side + 4),
    }
    answer = panels["answer"]
    white = (answer[:, :, :: side + 2, :: side + 2] == 1).all(1).flatten(1)  # corner pixel of each cell
    assert (white.sum(1) >= 7).all()
    cells = cells_of_neighbours(draw(rows, side, seed=5, step=0).neighbour)
    answer = tiny_config.method.preview_panels(views, rows, seed=5)["answer"]
    for picture, cell in zip(answer, cells.tolist(), strict=True):
        shown = [not (part == 1).all() for row in picture.split(side + 2, 1) for part in row.split(side + 2, 2)]
        assert [place for place in range(9) if shown[place]] == sorted((4, cell))


@pytest.mark.parametrize("pairs", ["all", "drawn"])
def test_trains(pairs: str) -> None:
    assert_gradients_reach_the_trunk(config(pairs=pairs, drop_colours=pairs == "drawn"))
    if pairs == "all":
        assert_overfits(config(), steps=60, lr=0.1)


def test_two_processes(tmp_path: Path) -> None:
    """BatchNorm in the head sees each rank's part, so losses are not those of one process; the replicas stay equal."""
    run(_train_rank, 2, config(), tmp_path, False)
    assert all(map(math.isfinite, losses(tmp_path)))
    method = final(tmp_path)["method"]
    assert method["head.classes.weight"].shape == (8, 16)


def test_resumes(tmp_path: Path) -> None:
    changes = {"drop_colours": True, "standardise": True, "downsample_probability": 0.5, "dropout": 0.5}
    assert_resumes(config(**changes, crop_flip_probability=0.5, crop_grayscale_probability=0.5), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_view": ViewConfig()}, "method.patch_view.jigsaw.grid must be 3, .*, got None"),
        (
            {"patch_view": ViewConfig(crop=CropConfig(size=32), jigsaw=JigsawConfig(grid=2, patch_size=4))},
            "method.patch_view.jigsaw.grid must be 3, a centre and eight neighbours, got 2",
        ),
        (
            {"patch_view": ViewConfig(rotation=True, jigsaw=JigsawConfig(grid=3, patch_size=4))},
            "method.patch_view.rotation must be False: rotation changes the relative positions, got True",
        ),
        ({"hidden_features": 0}, "method.hidden_features must be at least 1, got 0"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**changes))


def test_recipes() -> None:
    """The one of the number, which keeps colours, and the authors' patches."""
    recipe, doersch = relative_position(), relative_position_doersch()
    assert isinstance(recipe.method, RelativePosition.Config)
    assert isinstance(doersch.method, RelativePosition.Config)
    assert not recipe.method.drop_colours
    assert (recipe.epochs, recipe.batch_size, recipe.method.hidden_features) == (70, 512, 4096)
    assert doersch.method.drop_colours
    assert doersch.method.standardise
