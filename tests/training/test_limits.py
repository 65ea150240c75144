"""Settings without a use are refused before anything starts: numbers out of range, and losses without a gradient."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.config import from_dict, merge, to_dict
from sslfast.methods.base import BatchSplit
from sslfast.methods.registry import METHODS
from sslfast.methods.sela import SeLa
from sslfast.models import ResNetConfig, build_trunk
from sslfast.recipes import RECIPES
from sslfast.training.config import TrainConfig
from sslfast.training.limits import check_start, check_trunk
from sslfast.training.trainer import Trainer
from tests.methods.harness import build, first_batch, tiny

OPTIONAL = {
    "workers": 4,
    "white_level": 1023,
    "max_pixels": 10**6,
    "max_offset": 1,
    "warmup_factor": 0.5,
    "final_weight_decay": 0.5,
}
"""Numbers that are None by default."""


def of_method(name: str) -> TrainConfig:
    """The small recipe of a method."""
    found = (RECIPES[recipe]() for recipe in RECIPES if recipe.endswith("-small"))
    return next(config for config in found if config.method.name == name)


def numbers(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every number, optional number and tuple of numbers."""
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{where}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}.")
        elif field.name in OPTIONAL and value is None:
            yield path, OPTIONAL[field.name]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, value
        elif isinstance(value, tuple) and field.type != tuple[str, ...]:
            yield path, value or (1.0,)


def refused(config: TrainConfig, path: str, value: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        from_dict(TrainConfig, merge(to_dict(config), {path: value})).method.validate()
    message = str(caught.value)
    assert path.rpartition(".")[2] in message, message
    assert "\n" not in message
    return message


BUILT_IN = sorted(name for name, config in METHODS.items() if config.__module__.startswith("sslfast."))


@pytest.mark.parametrize("method", BUILT_IN)
def test_every_number_has_a_range_and_none_may_be_nan(method: str) -> None:
    config = of_method(method)
    for path, value in numbers(config):
        is_tuple = isinstance(value, tuple)
        is_float = isinstance(value[0] if is_tuple else value, float)
        bad = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30] if is_float else [10**30, -(10**30)]
        for number in bad:
            given = (number, *value[1:]) if is_tuple else number
            refused(config, path, given)
            if is_tuple:
                refused(config, path, (*value[:-1], number))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("epochs", 10**12),
        ("batch_size", 2**40),
        ("loader.workers", 10**6),
        ("seed", 2**63),
        ("seed", -1),
        ("optim.weight_decay", -1e-4),
        ("optim.momentum", 2.0),
        ("method.image_view.crop.size", 1),
        ("method.image_view.crop.size", 10**6),
        ("method.image_view.augment.std", (0.2, 0.0, 0.2)),
        ("method.temperature", 0.0),
        ("method.temperature", -1.0),
        ("method.queue_size", 0),
        ("method.momentum", 1.01),
        ("model.width", float("inf")),
    ],
)
def test_impossible_sizes(path: str, value: Any) -> None:
    assert str(value) in refused(of_method("moco"), path, value)


def test_a_field_set_later_is_checked_too(tmp_path: Path) -> None:
    config = tiny(of_method("simclr"))
    config.optim.lr_per_256_images = float("nan")
    with pytest.raises(ValueError, match=r"optim\.lr_per_256_images must be a finite number, got nan"):
        Trainer(config, 24, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_are_inside_their_limits_and_start(recipe: str) -> None:
    config = RECIPES[recipe]()
    config.method.validate()
    split = BatchSplit(batch_size=config.batch_size, ranks=8, sync_batchnorm=config.sync_batchnorm)
    check_start(config, split, rows=1_281_167, steps_per_epoch=1_281_167 // config.batch_size)


def test_more_steps_than_random_draws(tmp_path: Path) -> None:
    config = replace(tiny(of_method("rotation")), epochs=10**6)
    with pytest.raises(
        ValueError, match="epochs=1000000 of 5,000 steps are more than 4,294,967,295 steps; lower epochs"
    ):
        check_start(config, BatchSplit(batch_size=8), rows=40_000, steps_per_epoch=5000)


SMALLEST: dict[str, int] = {
    "simclr": 2,
    "cpc": 2,
    "byol": 3,
    "simsiam": 3,
    "barlow-twins": 3,
    "vicreg": 3,
    "swav": 2,
}
"""Samples of the smallest forward pass with a gradient; 1 for the other methods, whose labels are their own."""

SIZES: dict[str, dict[str, int]] = {
    "deepcluster": {"clusters": 4, "pca_dimensions": 8},
    "sela": {"clusters": 4},
    "cpc": {"patch_size": 8, "patch_stride": 4},
}
"""Of methods that need more for tiny images."""


def start(config: TrainConfig, batch_size: int, **split: Any) -> None:
    check_start(config, BatchSplit(batch_size=batch_size, **split), rows=24, steps_per_epoch=1)


@pytest.mark.parametrize("method", BUILT_IN)
def test_the_smallest_batch_has_a_gradient_and_a_smaller_one_is_refused(method: str) -> None:
    config = tiny(of_method(method), **SIZES.get(method, {}))
    size = SMALLEST.get(method, 1)
    if size > 1:
        for ranks, parts in ((1, 1), (1, 8), (4, 2)):
            batch = (size - 1) * ranks * parts
            if method in ("simclr", "cpc", "swav") and ranks > 1:
                continue  # contrasted over processes
            with pytest.raises(ValueError, match=f"batch_size={batch} .*raise batch_size or lower accumulate_steps"):
                start(
                    replace(config, batch_size=batch, accumulate_steps=parts),
                    batch,
                    ranks=ranks,
                    accumulate_steps=parts,
                )
    config = replace(config, batch_size=size)
    start(config, size)
    learner = build(config)
    views, rows = first_batch(config)
    if learner.needs_feature_pass(0):
        learner.eval()
        collected = config.method.feature_views()
        for ids in torch.arange(24).split(8):
            pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(int(ids[0])))
            learner.store_features({name: replace(views["image"], pixels=pixels) for name in collected}, ids)
        learner.train()
    learner.start_epoch(0)
    learner(views, rows, step=0)["loss"].backward()
    gradients = [p.grad.norm() for p in learner.trunk.parameters() if p.grad is not None]
    assert torch.stack(gradients).max() > 1e-4


def test_two_samples_in_batchnorm_pass_no_gradient() -> None:
    """Why three are needed."""
    for count, least, most in ((2, 0.0, 1e-3), (3, 1e-3, 100.0)):
        x = torch.randn(count, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weights = torch.randn(count, 5, generator=torch.Generator().manual_seed(1))
        (torch.nn.BatchNorm1d(5)(x) * weights).sum().backward()
        assert x.grad is not None
        assert least <= float(x.grad.norm()) < most


@pytest.mark.parametrize(
    ("method", "changes", "batch", "split", "message"),
    [
        ("simclr", {}, 1, {}, "batch_size=1 on 1 process in accumulate_steps=1 leaves 1 sample in a forward pass"),
        ("simclr", {}, 8, {"accumulate_steps": 8}, "in accumulate_steps=8 leaves 1 sample"),
        ("byol", {}, 8, {"ranks": 8}, "batch_size=8 on 8 processes .* leaves BatchNorm in byol's .* 1 of the 3 values"),
        ("moco", {"queue_size": 7}, 8, {}, r"method\.queue_size must be at least batch_size=8, .* got 7; raise it"),
        ("relative-position", {"pairs": "drawn"}, 2, {}, "2 of the 3 values .* or set method.pairs to all"),
    ],
)
def test_batches_without_a_loss(
    method: str, changes: dict[str, Any], batch: int, split: dict[str, int], message: str
) -> None:
    config = replace(tiny(of_method(method), **changes), batch_size=batch)
    with pytest.raises(ValueError, match=message):
        start(config, batch, **split)
    if method == "byol":
        start(config, batch, **split, sync_batchnorm=True)


def test_batchnorm_of_one_cell_in_the_trunk() -> None:
    """32 px under the ImageNet stem are one cell of res5: torch refuses one value and two have no gradient."""
    config = tiny(of_method("rotation"))

    def check(batch_size: int, **model: Any) -> None:
        chosen = ResNetConfig(name="resnet18", width=0.125, **model)
        trunk = build_trunk(chosen, seed=0)
        check_trunk(trunk, replace(config, model=chosen), BatchSplit(batch_size=batch_size))

    with pytest.raises(ValueError, match=r"res5 on the view 'image' of 32 px 2 of the 3 .* model\.stem to small"):
        check(2)
    check(3)
    check(1, norm="layer")
    check(1, stem="small")
    check_trunk(torch.nn.Conv2d(3, 8, 3), replace(config, model=ResNetConfig()), BatchSplit(batch_size=1))


@pytest.mark.parametrize(
    ("method", "path", "value"),
    [
        ("jigsaw", "method.num_permutations", 1),
        ("jigsaw", "method.jigsaw_view.jigsaw.grid", 1),
        ("pirl", "method.jigsaw_view.jigsaw.grid", 1),
        ("pirl", "method.num_negatives", 0),
        ("deepcluster", "method.clusters", 1),
        ("sela", "method.clusters", 1),
        ("sela", "method.heads", 0),
        ("cpc", "method.last_step", 7),
        ("cpc", "method.first_step", 0),
        ("relative-position", "method.patch_view.jigsaw.grid", 2),
        ("autoencoder", "method.masked_share", 0.0),
        ("inpainting", "method.masked_share", 1.0),
        ("inpainting", "method.masked_share", 1e-9),
        ("super-resolution", "method.factor", 1),
        ("colorization", "method.uniform_share", 0.0),
    ],
)
def test_tasks_without_a_question(method: str, path: str, value: Any) -> None:
    refused(of_method(method), path, value)


def test_the_plan_of_the_longest_run_is_quick() -> None:
    config = replace(SeLa.Config(), labellings=10**6, labelling_epochs=10**6)
    began = time.perf_counter()
    assert sum(map(config.labels_in, range(10**4))) > 10**3
    assert time.perf_counter() - began < 1
