"""What the joint-embedding methods have in common: views that say nothing, NaN, preview, memory, torch.compile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.recipes.joint_embedding import RECIPES
from sslfast.runs.log import read_log
from sslfast.training.config import TrainConfig
from sslfast.training.nonfinite import NonFiniteLossError
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.methods import harness
from tests.tiny import same

HEADS = {"hidden_features": 32, "dimensions": 16}
CROPS = {**HEADS, "local_view": ViewConfig(crop=CropConfig(size=16)), "local_crops": 2}
SIZES: dict[str, dict[str, Any]] = {
    "byol-small": HEADS,
    "simsiam-small": {**HEADS, "predictor_features": 8},
    "barlow-twins-small": HEADS,
    "vicreg-small": HEADS,
    "swav-small": {**CROPS, "prototypes": 6, "queue_size": 12, "queue_start_epoch": 0},
    "dino-small": {**CROPS, "bottleneck_features": 16},
}
SMALL = list(SIZES)


def config(recipe: str) -> TrainConfig:
    return harness.tiny(RECIPES[recipe](), **SIZES[recipe])


def test_every_small_recipe_is_here() -> None:
    assert set(SMALL) == {name for name in RECIPES if name.endswith("-small")}


@pytest.mark.parametrize("recipe", SMALL)
def test_equal_black_images_leave_everything_finite(recipe: str) -> None:
    """No norm, variance or logarithm of 0 divides: loss, gradients, logged values and state stay finite."""
    whole = config(recipe)
    method, (views, rows) = harness.build(whole), harness.first_batch(whole)
    views = {name: replace(view, pixels=torch.zeros_like(view.pixels)) for name, view in views.items()}
    out = method(views, rows, step=0)
    out["loss"].backward()
    method.after_step()
    assert all(value.isfinite() for value in out.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
    assert all(value.isfinite().all() for value in method.state_dict().values())
    assert all(not value.requires_grad for name, value in out.items() if name != "loss")


@pytest.mark.parametrize("recipe", SMALL)
def test_a_nan_in_a_batch(recipe: str, tmp_path: Path) -> None:
    """It reaches the loss: the run stops, or leaves the step out with every state as it was."""

    def run(mode: Any) -> Trainer:
        whole = replace(config(recipe), on_nonfinite=mode, epochs=1)
        with harness.tiny_trunks():
            trainer = Trainer(whole, harness.ROWS, tmp_path / mode, report=lambda _line: None)
        take, seen = trainer.samples.take, []

        def spoiled(batches: Any) -> Any:
            sample_ids, views = take(batches)
            seen.append(1)
            if len(seen) == 2:
                views["first"].pixels[0, 0, 0, 0] = torch.nan
                before.update({name: value.clone() for name, value in trainer.method.state_dict().items()})
            elif len(seen) == 3:
                assert same(before, dict(trainer.method.state_dict()))
            return sample_ids, views

        before: dict[str, Any] = {}
        trainer.samples.take = spoiled  # type: ignore[method-assign]
        trainer.fit()
        return trainer

    with pytest.raises(NonFiniteLossError, match="the loss of step 2 is not finite"):
        run("error")
    run("skip")
    assert read_log(tmp_path / "skip" / "log.jsonl")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("recipe", ["barlow-twins-small", "swav-small", "dino-small"])
def test_compiles_without_a_graph_break(recipe: str) -> None:
    whole = config(recipe)
    views, rows = harness.first_batch(whole)
    step = torch.tensor(1)
    eager, method = harness.build(whole), harness.build(whole)
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    out, expected = compiled(views, rows, step=step), eager(views, rows, step=step)
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    out["loss"].backward()
    expected["loss"].backward()
    for (name, a), b in zip(method.named_parameters(), eager.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("recipe", SMALL)
def test_micro_batches_have_one_update_after_them(recipe: str, tmp_path: Path) -> None:
    trainer = harness.train(replace(config(recipe), accumulate_steps=2, epochs=1), tmp_path / "run")
    assert trainer.step == 3
    if recipe == "swav-small":
        assert int(trainer.method.queued) == 3 * harness.BATCH  # type: ignore[arg-type]
