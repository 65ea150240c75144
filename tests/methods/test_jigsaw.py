import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslfast.methods.jigsaw import JIGSAW, Jigsaw, draw_classes
from sslfast.methods.shared.patches import augment_crop, gather_patches, mosaic, normalise_patches, slots_of_cells
from sslfast.methods.shared.permutations import max_hamming_permutations
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models.build import build_trunk
from sslfast.models.heads import JigsawHead
from sslfast.models.init import seeded
from sslfast.ops.philox import Stream, random_integers
from sslfast.recipes.pretext import jigsaw, jigsaw_small
from sslfast.training.config import TrainConfig
from sslfast.views.augment import AugmentConfig
from sslfast.views.stage import ViewStage
from sslfast.views.types import Batch, CropConfig, JigsawConfig, View, ViewConfig
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
from tests.tiny import same


def config(**changes: Any) -> TrainConfig:
    return tiny(jigsaw_small(), **{"num_permutations": 12, "patch_features": 8, **changes})


class Cell(nn.Module):
    """Reads the number that a patch is filled with."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].mean(dim=(2, 3))


def numbered(batch: int, *, seed: int = 0) -> View:
    """Patches filled with the number of their cell, in random order."""
    order = torch.rand(batch, 9, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return View(pixels=order.float()[:, :, None, None, None].expand(-1, -1, 3, 4, 4).contiguous(), permutation=order)


def test_head_sees_the_patches_in_the_order_of_the_class() -> None:
    method = build(config())
    assert isinstance(method, Jigsaw)
    method.trunk, method.head = Cell(), nn.Flatten()
    classes = torch.arange(12)
    for seed in range(3):
        shown = method.logits(numbered(12, seed=seed), classes)  # [12, 9]: the cells in the order shown
        assert torch.equal(shown.long(), method.permutations)


def test_uniform_logits_and_perfect_prediction() -> None:
    method = build(config())
    assert isinstance(method, Jigsaw)
    views, rows = first_batch(config())
    weight = method.head.classes.weight.data.clone()  # type: ignore[union-attr]
    nn.init.zeros_(method.head.classes.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(method.head.classes.bias)  # type: ignore[union-attr, arg-type]
    assert method(views, rows, step=0)["loss"].item() == pytest.approx(math.log(12))
    method.head.classes.weight.data = weight  # type: ignore[union-attr]

    class Matches(nn.Module):
        """Scores every permutation by the positions in which it agrees with the cells shown."""

        def forward(self, features: Tensor) -> Tensor:
            cells = features.flatten(1)
            return 100 * (cells[:, None] == method.permutations).float().sum(2)

    method.trunk, method.head = Cell(), Matches()
    out = method({JIGSAW: numbered(8)}, torch.arange(8), step=3)
    assert out["loss"] == 0
    assert out["accuracy"] == 1


def test_the_order_in_the_view_does_not_matter() -> None:
    """The view stage's own permutation carries no information: with BatchNorm too, slots can be exchanged."""
    method = build(config(normalise_patches=True))
    views, rows = first_batch(config())
    view = views[JIGSAW]
    other = torch.rand(view.pixels.shape[:2], generator=torch.Generator().manual_seed(4)).argsort(1)
    assert view.permutation is not None
    shuffled = View(pixels=gather_patches(view.pixels, other), permutation=view.permutation.gather(1, other))
    first, second = (method({JIGSAW: v}, rows, step=1)["loss"] for v in (view, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_the_class_is_independent_of_the_content_of_patches() -> None:
    """With equal patches the scores are the same for every class: only the patches determine the order."""
    method = build(config())
    assert isinstance(method, Jigsaw)
    view = numbered(12)
    view.pixels = torch.ones_like(view.pixels)
    scores = method.logits(view, torch.arange(12))
    torch.testing.assert_close(scores, scores[:1].expand_as(scores))


def test_classes_are_drawn_uniformly() -> None:
    rows = torch.arange(6000)
    classes = draw_classes(rows, 12, seed=0, step=3)
    counts = classes.bincount(minlength=12)
    assert ((counts - 500).abs() < 5 * math.sqrt(500)).all()
    assert torch.equal(draw_classes(rows[5:9], 12, seed=0, step=torch.tensor(3)), classes[5:9])
    bits = random_integers(rows, 1, 12, seed=5, stream=Stream.PRETEXT, step=3)
    assert torch.equal(draw_classes(rows, 12, seed=5, step=3), bits[:, 0])
    for other in (draw_classes(rows, 12, seed=1, step=3), draw_classes(rows, 12, seed=0, step=4)):
        assert (other == classes).float().mean() < 0.2


def test_weights_and_permutations_are_drawn_from_the_seed() -> None:
    whole = replace(config(), seed=5)
    method = build(whole)
    assert isinstance(method, Jigsaw)
    with tiny_trunks():
        trunk = build_trunk(whole.model, seed=5)
    with seeded(6):
        head = JigsawHead(24, 8, 9, 12)
    assert same(method.trunk.state_dict(), trunk.state_dict())
    assert same(method.head.state_dict(), head.state_dict())
    assert torch.equal(method.permutations, max_hamming_permutations(12, 9, 5))


def test_classes_are_those_of_seed_step_and_sample_ids() -> None:
    method = build(replace(config(), seed=5))
    assert isinstance(method, Jigsaw)
    drawn: list[Tensor] = []

    def logits(view: View, classes: Tensor) -> Tensor:
        drawn.append(classes)
        return nn.functional.one_hot((classes + (torch.arange(8) < 2)) % 12, 12).float()  # two of eight wrong

    method.logits = logits  # type: ignore[method-assign]
    rows = 3 * torch.arange(8)
    out = method({JIGSAW: numbered(8)}, rows, step=3)
    assert torch.equal(drawn[0], draw_classes(rows, 12, seed=5, step=3))
    assert out["accuracy"] == 0.75
    assert out["loss"].item() == pytest.approx(math.log(math.e + 11) - 0.75)


def test_a_mirrored_crop_is_cut_into_mirrored_patches() -> None:
    """Cutting the mirrored crop by hand; gray is of all patches of a sample or of none."""
    augment = AugmentConfig(flip_probability=0.0, jitter_probability=0.0, grayscale_probability=0.0)
    view = ViewConfig(crop=CropConfig(size=30), jigsaw=JigsawConfig(grid=3, patch_size=10), augment=augment)
    crops = torch.randint(256, (64, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(64)
    stage = ViewStage({JIGSAW: view}, seed=0, channels_last=False)
    plain, mirrored = (
        stage(Batch(sample_ids=rows, crops={JIGSAW: c}, epoch=0))[JIGSAW] for c in (crops, crops.flip(3))
    )
    space = PixelSpace(augment)

    def by_cell(view: View) -> Tensor:
        return gather_patches(view.pixels, slots_of_cells(view))

    changed = config(crop_flip_probability=1.0, jigsaw_view=view).method
    assert isinstance(changed, Jigsaw.Config)
    flipped = augment_crop(plain, rows, changed, space, seed=0, step=4)
    assert torch.equal(by_cell(flipped), by_cell(mirrored))

    gray = augment_crop(plain, rows, replace(changed, crop_grayscale_probability=1.0), space, seed=0, step=4)
    luminance = torch.einsum("nchw,c->nhw", crops.flip(3) / 255, torch.tensor([0.299, 0.587, 0.114]))
    whole = space.from_rgb(luminance[:, None].expand(-1, 3, -1, -1)).unflatten(3, (3, 10)).unflatten(2, (3, 10))
    torch.testing.assert_close(by_cell(gray), whole.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), rtol=1e-4, atol=1e-4)

    half = replace(changed, crop_flip_probability=0.5, crop_grayscale_probability=0.66)
    some = by_cell(augment_crop(plain, rows, half, space, seed=0, step=4))
    is_gray = ((space.to_rgb(some).amax(2) - space.to_rgb(some).amin(2)) < 1e-3).flatten(2).all(2)
    assert (is_gray.all(1) == is_gray.any(1)).all()
    assert 20 < is_gray.all(1).sum() < 60
    assert plain.permutation is not None
    part = View(pixels=plain.pixels[3:9], permutation=plain.permutation[3:9])
    assert torch.equal(some[3:9], by_cell(augment_crop(part, rows[3:9], half, space, seed=0, step=4)))
    neither = replace(half, crop_flip_probability=0.0, crop_grayscale_probability=0.0)
    assert augment_crop(plain, rows, neither, space, seed=0, step=4) is plain


def test_permutations_of_a_file(tmp_path: Path) -> None:
    """As VISSL publishes them, from 0, or as Noroozi and Favaro, from 1."""
    path = tmp_path / "set.npy"
    rows = max_hamming_permutations(12, 9, 3)
    for first, dtype in ((0, np.int64), (1, np.uint8)):
        np.save(path, (rows.numpy() + first).astype(dtype))
        method = build(config(permutation_file=str(path)))
        assert torch.equal(method.permutations, rows)  # type: ignore[arg-type]
    views, ids = first_batch(config())
    named = config(permutation_file=str(path)).method
    other = config().method.preview_panels(views, ids, seed=0)["which of 12 orders?"]
    assert not torch.equal(named.preview_panels(views, ids, seed=0)["which of 12 orders?"], other)
    with pytest.raises(ValueError, match=r"method.num_permutations must be 12, the rows of .*set.npy, got 100"):
        build(config(permutation_file=str(path), num_permutations=100))
    bad = rows.numpy().copy()
    bad[4, 0] = bad[4, 1]
    for array, message in (
        (rows.numpy()[:, :8], r"must hold integers \[K, 9\], .* got int64 \[12, 8\]"),
        (rows.numpy() / 2, "must hold integers .* got float64"),
        (bad, "row 4 is no permutation of the 9 patches"),
        (np.concatenate((rows.numpy()[:11], rows.numpy()[:1])), "holds a permutation twice"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            build(config(permutation_file=str(path)))
    path.write_bytes(b"\x93NUMPY")
    for missing in (path, tmp_path / "none.npy"):
        with pytest.raises(ValueError, match=r"cannot be read as .npy"):
            build(config(permutation_file=str(missing)))


def test_patches() -> None:
    view = numbered(5)
    slots = slots_of_cells(view)
    assert torch.equal(gather_patches(view.pixels, slots)[:, :, 0, 0, 0], torch.arange(9.0).expand(5, -1))
    with pytest.raises(ValueError, match="the view has no permutation; give it a jigsaw"):
        slots_of_cells(View(pixels=view.pixels))
    pixels = 3 + 2 * torch.randn(4, 9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    normal = normalise_patches(pixels)
    torch.testing.assert_close(normal.mean(dim=(-2, -1)), torch.zeros(4, 9, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.std(dim=(-2, -1), correction=0), torch.ones(4, 9, 3))
    torch.testing.assert_close(normalise_patches(0.5 * pixels - 7), normal, rtol=1e-4, atol=1e-5)
    assert (normalise_patches(torch.full((1, 9, 3, 4, 4), 0.3)).abs() < 1e-4).all()  # flat patches stay flat
    picture = mosaic(numbered(1).pixels, 3, gap=1)
    assert picture.shape == (1, 3, 14, 14)
    assert picture[0, 0, ::5, ::5].flatten().tolist() == numbered(1).pixels[0, :, 0, 0, 0].tolist()
    assert (picture[0, :, 4] == 1).all()


def test_preview_shows_the_patches_in_the_order_of_the_class() -> None:
    tiny_config = config()
    views, rows = first_batch(tiny_config)
    panels = tiny_config.method.preview_panels(views, rows, seed=0)
    (heading,) = panels
    assert heading == "which of 12 orders?"
    side = 3 * views[JIGSAW].pixels.shape[-1] + 2 * 2
    assert panels[heading].shape == (8, 3, side, side)
    assert panels[heading].min() >= 0
    assert panels[heading].max() <= 1


def test_preview_shows_the_order_of_the_seed() -> None:
    tiny_config = config()
    views, rows = first_batch(tiny_config)
    view = views[JIGSAW]
    order = max_hamming_permutations(12, 9, 5)[draw_classes(rows, 12, seed=5, step=0)]
    patches = gather_patches(view.pixels, slots_of_cells(view).gather(1, order))
    (picture,) = tiny_config.method.preview_panels(views, rows, seed=5).values()
    assert isinstance(tiny_config.method, Jigsaw.Config)
    assert torch.equal(picture, mosaic(PixelSpace(tiny_config.method.jigsaw_view.augment).to_rgb(patches), 3))


def test_trains() -> None:
    method = assert_gradients_reach_the_trunk(config())
    assert isinstance(method, Jigsaw)
    assert torch.equal(method.permutations, max_hamming_permutations(12, 9, seed=0))
    # One batch in orders that change every step: the loss still falls below that of guessing.
    assert_overfits(config(num_permutations=2), steps=60, lr=0.1)


def test_two_processes(tmp_path: Path) -> None:
    """BatchNorm in the head sees each rank's part, so losses are not those of one process; the replicas stay equal."""
    run(_train_rank, 2, config(), tmp_path, False)
    assert all(map(math.isfinite, losses(tmp_path)))
    method = final(tmp_path)["method"]
    assert method["permutations"].shape == (12, 9)


def test_resumes(tmp_path: Path) -> None:
    assert_resumes(config(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_permutations": 1}, "method.num_permutations must be at least 2, got 1"),
        ({"jigsaw_view": ViewConfig()}, "method.jigsaw_view.jigsaw must be set, got None"),
        (
            {"jigsaw_view": ViewConfig(crop=CropConfig(size=32), jigsaw=JigsawConfig(grid=4, patch_size=4))},
            "method.jigsaw_view.jigsaw.grid must be 2 or 3, got 4",
        ),
        ({"patch_features": 0}, "method.patch_features must be at least 1, got 0"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**changes))


def test_recipe() -> None:
    paper = jigsaw()
    assert isinstance(paper.method, Jigsaw.Config)
    assert (paper.method.num_permutations, paper.method.patch_features) == (2000, 1000)
    assert (paper.epochs, paper.batch_size, paper.optim.lr_per_256_images) == (105, 256, 0.1)
    view = paper.method.views()[JIGSAW]
    assert (view.crop.size, view.augment.grayscale_probability) == (255, 0.0)
    assert (paper.method.crop_flip_probability, paper.method.crop_grayscale_probability) == (0.5, 0.66)
