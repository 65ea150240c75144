"""Epoch order, the ranks' shares of a step, replacements and crop boxes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslfast.loaders.plan import REPLACEMENTS, EpochPlan, epoch_order, replacement_rows, shard_order
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views.crops import ATTEMPTS, crop_boxes, crop_draws
from sslfast.views.types import CropConfig, ViewConfig, check_views


def test_an_epoch_has_every_row_once_and_epochs_and_seeds_differ() -> None:
    order = epoch_order(1000, seed=3, epoch=5)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(1000, seed=3, epoch=5))
    assert (order != epoch_order(1000, seed=3, epoch=6)).mean() > 0.9
    assert (order != epoch_order(1000, seed=4, epoch=5)).mean() > 0.9


def test_the_order_is_the_argsort_of_one_draw_per_row() -> None:
    bits = random_uint32(torch.arange(77), 2, seed=9, stream=Stream.EPOCH_ORDER, step=2)
    keys = [(int(high) << 31) | (int(low) >> 1) for high, low in bits]
    assert epoch_order(77, seed=9, epoch=2).tolist() == sorted(range(77), key=keys.__getitem__)


def test_the_order_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = epoch_order(1000, seed=1, epoch=0)
    monkeypatch.setattr("sslfast.loaders.plan._CHUNK", 64)
    assert np.array_equal(whole, epoch_order(1000, seed=1, epoch=0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_put_together_are_the_single_process_step(world_size: int) -> None:
    alone = EpochPlan(num_rows=40, batch_size=12, seed=7)
    order = alone.order(4)
    assert alone.steps_per_epoch == 3
    for step in range(alone.steps_per_epoch):
        parts = [
            EpochPlan(num_rows=40, batch_size=12, seed=7, rank=rank, world_size=world_size).share(order, step)
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {12 // world_size}
        assert np.array_equal(np.concatenate(parts), alone.share(order, step))
    assert np.array_equal(np.concatenate([alone.share(order, step) for step in range(3)]), order[:36])


def test_plan_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 must be a multiple of world_size=4: use 8"):
        EpochPlan(num_rows=40, batch_size=10, seed=0, world_size=4)
    with pytest.raises(ValueError, match=r"batch_size=64 is larger than the data set \(40 images\): lower"):
        EpochPlan(num_rows=40, batch_size=64, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        EpochPlan(num_rows=40, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="rank must be in"):
        EpochPlan(num_rows=40, batch_size=4, seed=0, rank=2, world_size=2)
    plan = EpochPlan(num_rows=40, batch_size=4, seed=0)
    plan.check_start(0, 10)
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 10\], got start_step=11"):
        plan.check_start(0, 11)
    with pytest.raises(ValueError, match="epoch must be in"):
        plan.check_start(-1, 0)


def test_replacements_are_rows_that_depend_on_seed_epoch_and_row() -> None:
    drawn = replacement_rows(3, 50, seed=1, epoch=2)
    assert len(drawn) == REPLACEMENTS
    assert all(0 <= row < 50 for row in drawn)
    assert drawn == replacement_rows(3, 50, seed=1, epoch=2)
    others = [replacement_rows(4, 50, seed=1, epoch=2), replacement_rows(3, 50, seed=2, epoch=2)]
    others += [replacement_rows(3, 50, seed=1, epoch=3)]
    assert all(drawn != other for other in others)


def reference_box(draws: np.ndarray, width: int, height: int, config: CropConfig) -> list[int]:
    """One image at a time, as torchvision's RandomResizedCrop.get_params."""
    low, high = config.ratio
    for attempt in range(ATTEMPTS):
        area = width * height * (config.scale[0] + draws[2 * attempt] * (config.scale[1] - config.scale[0]))
        aspect = math.exp(math.log(low) + draws[2 * attempt + 1] * (math.log(high) - math.log(low)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1))
            return [left, top, left + w, top + h]
    if width / height < low:
        w, h = width, round(width / low)
    elif width / height > high:
        w, h = round(height * high), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return [left, top, left + w, top + h]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    size=st.tuples(st.integers(8, 3000), st.integers(8, 3000)),
    scale=st.sampled_from([(0.08, 1.0), (0.6, 1.0), (1.0, 1.0), (0.001, 0.002)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 3.0)]),
)
def test_boxes_agree_with_the_rule_written_for_one_image(seed, size, scale, ratio) -> None:
    config = CropConfig(scale=scale, ratio=ratio)
    draws = crop_draws(torch.arange(20), seed=seed, epoch=1, position=0)
    boxes = crop_boxes(draws, np.tile(np.array(size), (20, 1)), config)
    assert boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.tolist() == [reference_box(draw, *size, config) for draw in draws]


def test_a_box_depends_on_seed_epoch_view_row_and_on_nothing_else_in_the_batch() -> None:
    rows, sizes, config = torch.tensor([5, 900, 5]), np.array([[500, 375], [64, 64], [500, 375]]), CropConfig()
    draws = crop_draws(rows, seed=1, epoch=2, position=0)
    together = crop_boxes(draws, sizes, config)
    assert np.array_equal(together[0], together[2])
    alone = crop_boxes(crop_draws(rows[1:2], seed=1, epoch=2, position=0), sizes[1:2], config)
    assert np.array_equal(together[1:2], alone)
    for seed, epoch, position in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not np.array_equal(draws, crop_draws(rows, seed=seed, epoch=epoch, position=position))


def test_boxes_have_the_stated_distribution() -> None:
    draws = crop_draws(torch.arange(20_000), seed=0, epoch=0, position=0)
    boxes = crop_boxes(draws, np.tile(np.array([1000, 1000]), (20_000, 1)), CropConfig(scale=(0.2, 0.5)))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, aspect = width * height / 1e6, np.log(width / height)
    # Uniform on [a, b] has mean (a + b) / 2 and deviation (b - a) / sqrt(12); 20,000 draws.
    assert abs(share.mean() - 0.35) < 0.003
    assert abs(share.std() - 0.3 / math.sqrt(12)) < 0.002
    assert abs(aspect.mean()) < 0.005
    assert abs(aspect.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.003
    assert abs((boxes[:, 0] / (1000 - width)).mean() - 0.5) < 0.01
    assert abs((boxes[:, 1] / (1000 - height)).mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (CropConfig(size=0), "view 'image': crop.size must be at least 1, got 0"),
        (CropConfig(scale=(0.0, 1.0)), "view 'image': crop.scale must be"),
        (CropConfig(scale=(0.5, 1.5)), "view 'image': crop.scale must be"),
        (CropConfig(ratio=(2.0, 1.0)), "view 'image': crop.ratio must be"),
    ],
)
def test_crop_configs_out_of_range(crop: CropConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_views({"image": ViewConfig(crop=crop)})


def test_number_of_views() -> None:
    with pytest.raises(ValueError, match="1 to 15 views, got 0"):
        check_views({})
    with pytest.raises(ValueError, match="1 to 15 views, got 16"):
        check_views({f"view{i}": ViewConfig() for i in range(16)})


SHARDS = np.repeat(np.arange(7), [5, 1, 30, 12, 2, 9, 21])


def test_the_shard_order_mixes_blocks_of_shuffled_shards() -> None:
    order = shard_order(SHARDS, seed=3, epoch=2, mixed_shards=3)
    assert sorted(order) == list(range(80))
    assert np.array_equal(order, shard_order(SHARDS, seed=3, epoch=2, mixed_shards=3))
    keys = {row: place for place, row in enumerate(epoch_order(80, seed=3, epoch=2).tolist())}
    seen: list[set[int]] = []
    rest = order.tolist()
    while rest:
        block = {int(SHARDS[rest[0]])}
        # A block ends where its shards have no row left.
        length = 0
        while length < sum(np.isin(SHARDS, list(block))):
            block.add(int(SHARDS[rest[length]]))
            length += 1
        assert rest[:length] == sorted(rest[:length], key=keys.__getitem__)
        seen.append(block)
        rest = rest[length:]
    assert sorted(shard for block in seen for shard in block) == list(range(7))
    assert all(len(block) <= 3 for block in seen)
    assert any(not np.array_equal(order, shard_order(SHARDS, seed=3, epoch=e, mixed_shards=3)) for e in (0, 1))


def test_one_block_of_all_shards_is_the_full_order() -> None:
    for mixed_shards in (7, 100):
        order = shard_order(SHARDS, seed=9, epoch=4, mixed_shards=mixed_shards)
        assert np.array_equal(order, epoch_order(80, seed=9, epoch=4))


def test_the_shard_order_does_not_depend_on_rank_or_step() -> None:
    plans = [
        EpochPlan(num_rows=80, batch_size=8, seed=1, rank=rank, world_size=2, shards=SHARDS, mixed_shards=2)
        for rank in range(2)
    ]
    order = plans[0].order(6)
    assert np.array_equal(order, plans[1].order(6))
    whole = np.concatenate([plan.share(order, step) for step in range(10) for plan in plans])
    assert np.array_equal(whole, order)
    # Every shard comes first in some epoch.
    assert {int(SHARDS[plans[0].order(epoch)[0]]) for epoch in range(200)} == set(range(7))
    with pytest.raises(ValueError, match=r"mixed_shards must be at least 1, got mixed_shards=0"):
        EpochPlan(num_rows=80, batch_size=8, seed=1, shards=SHARDS, mixed_shards=0)
