import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from sslfast.ops import ViewParameter, jigsaw_patches_reference, render_views, rotate90_reference
from sslfast.ops.pixels import ORDERS
from sslfast.views.parameters import ViewParameters, draw_view
from sslfast.views.stage import ViewStage, render
from sslfast.views.types import AugmentConfig, Batch, CropConfig, JigsawConfig, ViewConfig

PLAIN = AugmentConfig(
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
SMALL = CropConfig(size=26)
IMAGE = ViewConfig(crop=SMALL)
JIGSAW = ViewConfig(crop=SMALL, jigsaw=JigsawConfig(grid=3, patch_size=5))
ROTATION = ViewConfig(crop=SMALL, rotation=True)
BOTH = ViewConfig(crop=SMALL, rotation=True, jigsaw=JigsawConfig(grid=2, patch_size=10))
RECORDED = {
    "quarter_turns": [3, 2],
    "permutation": [[5, 7, 6, 3, 8, 1, 0, 2, 4], [8, 1, 7, 3, 6, 0, 4, 2, 5]],
    "offsets": [[2, 1], [0, 0], [2, 1], [2, 0], [2, 0], [1, 2], [1, 3], [0, 1], [2, 3]],
    "factors": [1.0683117, 0.6038305, 0.8767344],
    "order": [1, 0, 2, 3],
    "blur_sigma": [0.4991228, 0, 0.2775158, 1.629808, 0, 0, 0, 1.961229, 0.1264544],
}
VIEWS = {"image": IMAGE, "jigsaw": JIGSAW, "rotation": ROTATION, "both": BOTH}


def make_batch(sample_ids: list[int], *, epoch: int = 0, views: dict[str, ViewConfig] = VIEWS) -> Batch:
    """Crops that depend on the sample id only, as those of a loader."""
    crops = {
        name: torch.stack([picture(i + 1000 * position, config.crop.size) for i in sample_ids])
        for position, (name, config) in enumerate(views.items())
    }
    return Batch(sample_ids=torch.tensor(sample_ids), crops=crops, epoch=epoch)


def picture(number: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)


def tensors(p: ViewParameters) -> dict[str, Tensor | None]:
    pixel = {parameter.name: p.pixel[..., parameter] for parameter in ViewParameter}
    return {"quarter_turns": p.quarter_turns, "permutation": p.permutation, "offsets": p.offsets, **pixel}


def test_shapes() -> None:
    views = ViewStage(VIEWS, seed=0)(make_batch([3, 1, 4]))
    assert {name: list(view.pixels.shape) for name, view in views.items()} == {
        "image": [3, 3, 26, 26],
        "jigsaw": [3, 9, 3, 5, 5],
        "rotation": [3, 3, 26, 26],
        "both": [3, 4, 3, 10, 10],
    }
    assert views["image"].permutation is None
    assert views["image"].quarter_turns is None
    assert views["jigsaw"].permutation is not None
    assert views["jigsaw"].permutation.shape == (3, 9)
    assert views["both"].quarter_turns is not None
    assert views["both"].quarter_turns.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_channels_last(dtype: torch.dtype) -> None:
    batch = make_batch([3, 1, 4])
    for channels_last in (True, False):
        views = ViewStage(VIEWS, seed=0, dtype=dtype, channels_last=channels_last)(batch)
        expected = torch.channels_last if channels_last else torch.contiguous_format
        for view in views.values():
            images = view.pixels if view.pixels.dim() == 4 else view.pixels.flatten(0, 1)
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=expected)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    stage = ViewStage(VIEWS, seed=5)
    together = stage(make_batch([7, 2, 9, 2**40]))
    for name in VIEWS:
        for i, row in enumerate([7, 2, 9]):
            alone = stage(make_batch([row]))[name]
            assert torch.equal(alone.pixels[0], together[name].pixels[i])


def test_seed_epoch_sample_and_position_each_change_the_draw() -> None:
    gates = {field.name: 0.5 for field in fields(AugmentConfig) if field.name.endswith("_probability")}
    rows, config = torch.arange(64), replace(BOTH, augment=AugmentConfig(**gates))
    base = tensors(draw_view(rows, config, seed=1, position=0, epoch=0))
    for other in (
        draw_view(rows, config, seed=2, position=0, epoch=0),
        draw_view(rows, config, seed=1, position=1, epoch=0),
        draw_view(rows, config, seed=1, position=0, epoch=1),
        draw_view(rows + 64, config, seed=1, position=0, epoch=0),
    ):
        for name, values in tensors(other).items():
            # Gates and permutations of four agree often, but never in 64 samples at once.
            assert not torch.equal(values, base[name]), name
    again = tensors(draw_view(rows, config, seed=1, position=0, epoch=torch.tensor(0)))
    assert all(torch.equal(again[name], base[name]) for name in base)


def test_recorded_draws() -> None:
    """The numbers of a recorded run: a change here would change the draws of every earlier run."""
    config = replace(JIGSAW, rotation=True, augment=AugmentConfig(blur_probability=0.5))
    p = draw_view(torch.tensor([0, 123456]), config, seed=42, position=1, epoch=3)
    assert p.quarter_turns is not None
    assert p.permutation is not None
    assert p.offsets is not None
    assert p.quarter_turns.tolist() == RECORDED["quarter_turns"]
    assert p.permutation.tolist() == RECORDED["permutation"]
    assert p.offsets[0].tolist() == RECORDED["offsets"]
    factors = p.pixel[..., ViewParameter.BRIGHTNESS : ViewParameter.HUE]
    assert factors[1, 0].tolist() == pytest.approx(RECORDED["factors"], abs=1e-7)
    assert list(ORDERS[int(p.pixel[1, 8, ViewParameter.JITTER_ORDER])]) == RECORDED["order"]
    assert p.pixel[1, :, ViewParameter.BLUR_SIGMA].tolist() == pytest.approx(RECORDED["blur_sigma"], abs=1e-6)


def test_permutations_are_uniform_over_all_orders() -> None:
    config = ViewConfig(crop=SMALL, jigsaw=JigsawConfig(grid=2, patch_size=13))
    count = 48_000
    permutation = draw_view(torch.arange(count), config, seed=0, position=0, epoch=0).permutation
    assert permutation is not None
    orders, counts = permutation.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, orders.tolist())) == list(itertools.permutations(range(4)))
    chi_squared = ((counts - count / 24) ** 2 / (count / 24)).sum()
    assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_offsets_and_turns_cover_their_range_uniformly() -> None:
    config = ViewConfig(crop=CropConfig(size=255), jigsaw=JigsawConfig(), rotation=True)
    p = draw_view(torch.arange(4000), config, seed=0, position=0, epoch=0)
    assert p.offsets is not None
    assert p.quarter_turns is not None
    counts = p.offsets.flatten().bincount()
    assert len(counts) == 22  # 0 .. 85 - 64
    assert ((counts - 72000 / 22) ** 2 / (72000 / 22)).sum() < 46.8  # 21 degrees of freedom, p = 0.001
    assert (p.quarter_turns.bincount() - 1000).abs().max() < 100
    config = replace(config, jigsaw=JigsawConfig(max_offset=3))
    offsets = draw_view(torch.arange(400), config, seed=0, position=0, epoch=0).offsets
    assert offsets is not None
    assert offsets.unique().tolist() == [0, 1, 2, 3]


def test_without_augmentation_the_pixels_are_the_references() -> None:
    for config in (
        replace(ROTATION, augment=PLAIN),
        replace(JIGSAW, augment=PLAIN),
        replace(BOTH, augment=PLAIN),
        replace(IMAGE, augment=PLAIN),
    ):
        crops = make_batch([1, 2, 3, 4, 5], views={"view": config}).crops["view"]
        p = draw_view(torch.arange(5), config, seed=9, position=0, epoch=0)
        expected = crops
        if p.quarter_turns is not None:
            expected = rotate90_reference(expected, p.quarter_turns)
        if config.jigsaw is not None:
            assert p.permutation is not None
            assert p.offsets is not None
            expected = jigsaw_patches_reference(
                expected, p.permutation, p.offsets, grid=config.jigsaw.grid, patch_size=config.jigsaw.patch_size
            )
        torch.testing.assert_close(render(crops, config, p).pixels, expected / 255, rtol=0, atol=1e-6)


def test_a_rotated_view_is_mirrored_first() -> None:
    config = replace(ROTATION, augment=replace(PLAIN, flip_probability=0.5))
    rows = list(range(32))
    crops = make_batch(rows, views={"view": config}).crops["view"]
    p = draw_view(torch.arange(32), config, seed=1, position=0, epoch=0)
    assert p.quarter_turns is not None
    flip = p.pixel[:, 0, ViewParameter.FLIP] != 0
    assert len((flip * 4 + p.quarter_turns).unique()) == 8
    mirrored = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
    expected = rotate90_reference(mirrored, p.quarter_turns) / 255
    torch.testing.assert_close(render(crops, config, p).pixels, expected, rtol=0, atol=1e-6)


def test_permutation_moves_rendered_patches_and_does_not_change_them() -> None:
    config = replace(JIGSAW, augment=AugmentConfig(photometric_probability=0.5))
    crops = make_batch([1, 2, 3], views={"view": config}).crops["view"]
    p = draw_view(torch.arange(3), config, seed=9, position=0, epoch=0)
    assert p.permutation is not None
    in_order = render(crops, config, replace(p, permutation=torch.arange(9).expand(3, 9)))
    moved = render(crops, config, p)
    for sample, order in enumerate(p.permutation):
        assert torch.equal(moved.pixels[sample], in_order.pixels[sample, order])


def test_patches_of_a_sample_are_augmented_independently() -> None:
    p = draw_view(torch.arange(200), JIGSAW, seed=0, position=0, epoch=0).pixel
    brightness = p[..., ViewParameter.BRIGHTNESS] - 1
    correlation = (brightness[:, 0] * brightness[:, 1]).mean() / brightness.square().mean()
    assert abs(correlation) < 0.2
    assert (
        p[..., ViewParameter.FLIP].mean(dim=1).std() < 0.25
    )  # 0.17 for nine independent flips, 0.5 for one flip of all nine


def test_image_view_is_its_augmentation() -> None:
    batch = make_batch([4, 5])
    p = draw_view(batch.sample_ids, IMAGE, seed=3, position=0, epoch=0)
    pixels = ViewStage(VIEWS, seed=3)(batch)["image"].pixels
    assert torch.equal(pixels, render_views(batch.crops["image"], p.pixel))


def test_render_compiles_in_one_graph() -> None:
    config = BOTH
    crops = make_batch([1, 2, 3], views={"view": config}).crops["view"]
    p = draw_view(torch.arange(3), config, seed=9, position=0, epoch=0)
    compiled = torch.compile(lambda x: render(x, config, p).pixels, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(crops), render(crops, config, p).pixels, rtol=0, atol=1e-5)


def test_no_gradient_and_empty_batch() -> None:
    stage = ViewStage(VIEWS, seed=0)
    assert not any(view.pixels.requires_grad for view in stage(make_batch([1])).values())
    empty = Batch(
        sample_ids=torch.zeros(0, dtype=torch.int64),
        crops={name: torch.zeros(0, 3, 26, 26, dtype=torch.uint8) for name in VIEWS},
        epoch=0,
    )
    assert stage(empty)["both"].pixels.shape == (0, 4, 3, 10, 10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ViewConfig(crop=CropConfig(size=0)), r"view 'v': crop.size must be at least 1, got 0"),
        (ViewConfig(jigsaw=JigsawConfig(grid=0)), r"jigsaw.grid must be at least 1, got 0"),
        (
            ViewConfig(jigsaw=JigsawConfig(patch_size=75)),
            r"patch_size must be in \[1, 74\], the cell side of a 224-pixel crop in 3 x 3 cells, got 75",
        ),
        (ViewConfig(jigsaw=JigsawConfig(max_offset=11)), r"max_offset must be in \[0, 10\].*got 11"),
        (ViewConfig(augment=AugmentConfig(flip_probability=1.5)), r"flip_probability must be in \[0, 1\], got 1.5"),
        (ViewConfig(augment=AugmentConfig(contrast=-0.1)), r"contrast must be at least 0, got -0.1"),
        (ViewConfig(augment=AugmentConfig(hue=0.6)), r"hue must be in \[0, 0.5\] turns, got 0.6"),
        (ViewConfig(augment=AugmentConfig(blur_probability=2)), r"blur_probability must be in \[0, 1\], got 2"),
        (ViewConfig(augment=AugmentConfig(blur_sigma=(0.0, 2.0))), r"0 < low <= high <= 5.0, got 0.0 and 2.0"),
        (ViewConfig(augment=AugmentConfig(blur_sigma=(2.0, 9.0))), r"0 < low <= high <= 5.0, got 2.0 and 9.0"),
        (ViewConfig(augment=AugmentConfig(std=(0.1, 0.0, 0.1))), r"std above 0, got"),
    ],
)
def test_bad_config(config: ViewConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewStage({"v": config}, seed=0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs 1 to 15 views, got 0"):
        ViewStage({}, seed=0)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\), got seed=-1"):
        ViewStage(VIEWS, seed=-1)
    with pytest.raises(ValueError, match="dtype must be one of"):
        ViewStage(VIEWS, seed=0, dtype=torch.uint8)
    batch = make_batch([1, 2], views={"image": IMAGE})
    with pytest.raises(ValueError, match=r"no crops for view 'jigsaw'; it has \['image'\]"):
        ViewStage(VIEWS, seed=0)(batch)
    larger = ViewStage({"image": replace(IMAGE, crop=CropConfig(size=27))}, seed=0)
    with pytest.raises(ValueError, match=r"crops of view 'image' must be uint8 \[2, 3, 27, 27\].*\[2, 3, 26, 26\]"):
        larger(batch)
    p = draw_view(batch.sample_ids, IMAGE, seed=0, position=0, epoch=0)
    with pytest.raises(ValueError, match="drawn for a view without a jigsaw"):
        render(batch.crops["image"], JIGSAW, p)
