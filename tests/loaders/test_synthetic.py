"""The synthetic loader: synthetic images with the interface and the order of the pillow loader."""

import numpy as np
import pytest
import torch

from sslfast.loaders.plan import EpochPlan
from sslfast.loaders.synthetic import CELLS, SyntheticLoader, colour_cells, enlarge
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views.types import CropConfig, ViewConfig

VIEWS = {"image": ViewConfig(crop=CropConfig(size=21)), "jigsaw": ViewConfig(crop=CropConfig(size=5))}


def test_an_image_is_a_function_of_seed_and_row(device: torch.device) -> None:
    data = SyntheticLoader(50, VIEWS, batch_size=8, seed=4, device=device)
    images: dict[int, torch.Tensor] = {}
    for epoch in (0, 1):
        for batch in data.epoch(epoch):
            assert batch.epoch == epoch
            assert batch.sample_ids.device.type == device.type
            assert (batch.crops["image"].dtype, batch.crops["image"].shape) == (torch.uint8, (8, 3, 21, 21))
            assert batch.crops["jigsaw"].shape == (8, 3, 5, 5)
            for row, image in zip(batch.sample_ids.tolist(), batch.crops["image"], strict=True):
                assert torch.equal(images.setdefault(row, image), image)
    assert len(images) == 50
    assert len({image.cpu().numpy().tobytes() for image in images.values()}) == 50
    other = next(SyntheticLoader(50, VIEWS, batch_size=8, seed=5, device=device).epoch(0))
    assert not torch.equal(other.crops["image"][0], images[int(other.sample_ids[0])])


def test_order_restart_and_ranks_are_as_for_every_loader() -> None:
    plan = EpochPlan(num_rows=50, batch_size=8, seed=4)
    data = SyntheticLoader(50, VIEWS, batch_size=8, seed=4)
    assert (data.num_rows, data.steps_per_epoch, data.bad_images) == (50, 6, [])
    whole = list(data.epoch(2))
    assert [batch.sample_ids.tolist() for batch in whole] == [plan.share(plan.order(2), s).tolist() for s in range(6)]
    tail = list(data.epoch(2, start_step=4))
    assert all(torch.equal(a.crops["image"], b.crops["image"]) for a, b in zip(whole[4:], tail, strict=True))
    ranks = [SyntheticLoader(50, VIEWS, batch_size=8, seed=4, rank=r, world_size=2).epoch(2) for r in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.crops["image"], torch.cat([part.crops["image"] for part in parts]))
    data.close()


def test_cells_are_the_bytes_of_the_draws_and_enlarge_repeats_them() -> None:
    rows = torch.tensor([3, 2**40])
    cells = colour_cells(rows, seed=1)
    bits = random_uint32(rows, 48, seed=1, stream=Stream.SYNTHETIC, step=0)
    assert cells.shape == (2, 3, CELLS, CELLS)
    for image, words in zip(cells, bits.tolist(), strict=True):
        assert bytes(image.flatten().tolist()) == b"".join(word.to_bytes(4, "little") for word in words)
    for size in (5, 8, 21, 64):
        large = enlarge(cells, size)
        for y in (0, size // 2, size - 1):
            for x in (0, size // 3, size - 1):
                assert torch.equal(large[:, :, y, x], cells[:, :, y * CELLS // size, x * CELLS // size])


def test_arguments_fail_before_any_work() -> None:
    with pytest.raises(ValueError, match="must be a multiple of world_size=3"):
        SyntheticLoader(50, VIEWS, batch_size=8, seed=0, world_size=3)
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 6\], got start_step=7"):
        SyntheticLoader(50, VIEWS, batch_size=8, seed=0).epoch(0, 7)


def test_rows_of_an_epoch_from_a_function() -> None:
    loader = SyntheticLoader(12, VIEWS, batch_size=4, seed=0)
    loader.set_order(lambda epoch: np.full(12, epoch))
    assert [batch.sample_ids.tolist() for batch in loader.epoch(5, 1)] == [[5] * 4] * 2
    shards = SyntheticLoader(12, VIEWS, batch_size=4, seed=0, shards=np.zeros(12, dtype=np.int64))
    with pytest.raises(ValueError, match=r"the method orders the rows .* use --loader.shuffle full"):
        shards.set_order(lambda epoch: np.full(12, epoch))
