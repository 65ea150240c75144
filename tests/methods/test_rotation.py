import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sslfast.methods.rotation import IMAGE, Rotation
from sslfast.models.build import build_trunk
from sslfast.models.init import seeded
from sslfast.ops import rotate90
from sslfast.recipes.pretext import rotation, rotation_small
from sslfast.views.types import JigsawConfig, View, ViewConfig
from tests.methods.harness import (
    assert_gradients_reach_the_trunk,
    assert_overfits,
    assert_resumes,
    assert_two_processes_train_as_one,
    build,
    first_batch,
    tiny,
    tiny_trunks,
)
from tests.tiny import same


@pytest.mark.parametrize("all_turns", [False, True])
def test_uniform_logits_and_perfect_prediction(all_turns: bool) -> None:
    config = tiny(rotation_small(), all_turns=all_turns)
    method = build(config)
    views, rows = first_batch(config)
    nn.init.zeros_(method.head.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(method.head.bias)  # type: ignore[union-attr, arg-type]
    assert method(views, rows, step=0)["loss"].item() == pytest.approx(math.log(4))

    # A trunk that outputs the brightest corner solves the task for images with one bright corner.
    class Corner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            corners = x[:, 0, [0, 0, -1, -1], [0, -1, -1, 0]]  # clockwise from the upper left
            return 100 * torch.nn.functional.one_hot(corners.argmax(1), 4).float()

    method.trunk = Corner()
    upright = torch.zeros(8, 3, 6, 6)
    upright[:, :, 0, 0] = 1
    turns = torch.arange(8) % 4
    pixels = upright if all_turns else rotate90(upright, turns)
    answer = torch.tensor([0, 3, 2, 1])  # a counter-clockwise turn takes the upper left corner to the lower left
    method.head = nn.Linear(4, 4, bias=False)
    method.head.weight.data = torch.eye(4)[:, answer]
    out = method({IMAGE: View(pixels=pixels, quarter_turns=None if all_turns else turns)}, rows, step=0)
    assert out["loss"].item() == pytest.approx(0, abs=1e-6)
    assert out["accuracy"] == 1


def test_all_turns_is_the_mean_over_the_turns() -> None:
    one, four = (build(tiny(rotation_small(), all_turns=value), normalised=False) for value in (False, True))
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(4)
    parts = []
    for turn in range(4):
        turns = torch.full((4,), turn)
        parts.append(one({IMAGE: View(pixels=rotate90(pixels, turns), quarter_turns=turns)}, rows, step=0)["loss"])
    together = four({IMAGE: View(pixels=pixels)}, rows, step=0)["loss"]
    torch.testing.assert_close(together, torch.stack(parts).mean(), rtol=1e-5, atol=1e-6)


def test_labels_are_balanced_and_match_the_image() -> None:
    config = tiny(rotation_small())
    config.batch_size = 512
    views, _ = first_batch(config, rows=512)
    counts = views[IMAGE].quarter_turns.bincount(minlength=4)  # type: ignore[union-attr]
    assert ((counts - 128).abs() < 5 * math.sqrt(128 * 0.75)).all()


def test_weights_are_drawn_from_the_seed() -> None:
    config = replace(tiny(rotation_small()), seed=5)
    method = build(config)
    assert isinstance(method, Rotation)
    with tiny_trunks():
        trunk = build_trunk(config.model, seed=5)
    with seeded(6):
        head = nn.Linear(24, 4)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.head.state_dict(), head.state_dict())


def test_views() -> None:
    assert Rotation.Config().views()[IMAGE].rotation
    assert not Rotation.Config(all_turns=True).views()[IMAGE].rotation
    assert Rotation.Config(all_turns=True).preview_views()[IMAGE].rotation
    paper = rotation()
    assert (paper.epochs, paper.batch_size, paper.optim.lr_per_256_images) == (105, 256, 0.1)
    for view in (ViewConfig(rotation=True), ViewConfig(jigsaw=JigsawConfig())):
        with pytest.raises(ValueError, match=r"method.image_view must be a whole upright image, got .*; set neither"):
            Rotation.Config(image_view=view).validate()
    pixels = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="the view has no quarter_turns; set rotation=True"):
        build(tiny(rotation_small()))({IMAGE: View(pixels=pixels)}, torch.arange(2), step=0)


@pytest.mark.parametrize("all_turns", [False, True])
def test_trains(all_turns: bool) -> None:
    config = tiny(rotation_small(), all_turns=all_turns)
    assert_gradients_reach_the_trunk(config)
    assert_overfits(config, steps=80, lr=0.1)


def test_resumes(tmp_path: Path) -> None:
    assert_resumes(tiny(rotation_small()), tmp_path)


def test_two_processes(tmp_path: Path) -> None:
    assert_two_processes_train_as_one(tiny(rotation_small()), tmp_path)
