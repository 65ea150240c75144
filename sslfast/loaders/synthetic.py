"""The ``synthetic`` loader: crops generated from (seed, row), without files; an upper bound for loader throughput."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslfast.loaders.base import PlannedLoader
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views import Batch

CELLS = 8  # colour cells per side of an image


class SyntheticLoader(PlannedLoader):
    """The interface of :class:`sslfast.loaders.pillow.PillowLoader` over ``num_rows`` synthetic images.

    Image ``row`` is a grid of 8 x 8 random colours, a pure function of (seed, row): the same in every epoch and in
    every view, whatever the view's size. It is generated on the device, so no copy and no decoding is timed.

    Args:
        num_rows: images in the simulated data set.
        views, batch_size, seed, rank, world_size, device: as for PillowLoader.
    """

    def _iterate(self, epoch: int, start_step: int, generation: int) -> Iterator[Batch]:
        order = self.plan.order(epoch)
        for step in range(start_step, self.steps_per_epoch):
            self._check_current(generation)
            sample_ids = torch.from_numpy(self.plan.share(order, step).copy())
            if self.device.type == "cuda":
                sample_ids = sample_ids.pin_memory().to(self.device, non_blocking=True)  # the host does not wait
            cells = colour_cells(sample_ids, seed=self.plan.seed)
            yield Batch(
                sample_ids=sample_ids,
                crops={name: enlarge(cells, size) for name, size in self._sizes.items()},
                epoch=epoch,
            )


def colour_cells(sample_ids: Tensor, *, seed: int) -> Tensor:
    """uint8 ``[B, 3, CELLS, CELLS]``: the little-endian bytes of Philox draws of each row."""
    bits = random_uint32(sample_ids, 3 * CELLS * CELLS // 4, seed=seed, stream=Stream.SYNTHETIC, step=0)
    octets = torch.stack([(bits >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    return octets.to(torch.uint8).reshape(-1, 3, CELLS, CELLS)


def enlarge(cells: Tensor, size: int) -> Tensor:
    """``[B, 3, size, size]``: pixel ``y, x`` shows cell ``y * CELLS // size, x * CELLS // size``."""
    index = torch.arange(size, device=cells.device) * CELLS // size
    return cells[:, :, :, index][:, :, index]


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    return True, "built in", ""
