"""Which rows a step gets, in which order, and what replaces a bad row: pure functions of (seed, epoch, row).

Every loader uses these, so a run can change its loader, its number of workers or ranks, or restart at any step, and get
the same samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sslfast.ops.philox import Stream, random_integers, random_uint32

REPLACEMENTS = 32  # rows tried in place of a bad one: all bad with probability (bad share) ** 32
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Order of an epoch and this rank's part of each step.

    Step ``s`` of an epoch is ``order[s * batch_size : (s + 1) * batch_size]``, whatever the number of ranks; rank
    ``r`` takes the ``r``-th of ``world_size`` equal contiguous parts of it. The rows left over after the last full
    step are dropped; which rows they are changes every epoch.
    """

    num_rows: int
    """Rows in the manifest."""
    batch_size: int
    """Global batch: the rows of one step over all ranks."""
    seed: int
    rank: int = 0
    world_size: int = 1
    shards: NDArray[np.int64] | None = None
    """``[num_rows]`` shard of each row: the order mixes a few of them at a time (:func:`shard_order`)."""
    mixed_shards: int = 16
    """How many of them."""
    orders: Callable[[int], NDArray[np.int64]] | None = None
    """Epoch -> its ``[num_rows]`` rows, in which some may be missing and others repeated, the same on every rank; None:
    a permutation."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got batch_size={self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={self.rank}, world_size={self.world_size}")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"the global batch_size={self.batch_size} must be a multiple of world_size={self.world_size}: "
                f"use {self.batch_size // self.world_size * self.world_size or self.world_size} or another multiple"
            )
        if self.mixed_shards < 1:
            raise ValueError(f"mixed_shards must be at least 1, got mixed_shards={self.mixed_shards}")
        if self.num_rows < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the data set ({self.num_rows} images): "
                "lower --batch-size or add images"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """``[num_rows]`` the epoch's permutation of all rows, or what ``orders`` has in its place; the same on every
        rank."""
        if self.orders is not None:
            return self.orders(epoch)
        if self.shards is None:
            return epoch_order(self.num_rows, seed=self.seed, epoch=epoch)
        return shard_order(self.shards, seed=self.seed, epoch=epoch, mixed_shards=self.mixed_shards)

    def share(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """``[batch_size / world_size]`` this rank's rows of a step."""
        local = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * local
        return order[start : start + local]

    def check_start(self, epoch: int, start_step: int) -> None:
        """ValueError unless ``0 <= epoch < 2**32`` and ``0 <= start_step <= steps_per_epoch``."""
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be in [0, 2**32), got {epoch=}")
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in [0, {self.steps_per_epoch}], got {start_step=}")


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """``[num_rows]`` int64 permutation: argsort of one 63-bit Philox draw per row (ties, if ever, by row)."""
    return np.argsort(_keys(num_rows, seed=seed, stream=Stream.EPOCH_ORDER, epoch=epoch), kind="stable")


def shard_order(shards: NDArray[np.int64], *, seed: int, epoch: int, mixed_shards: int) -> NDArray[np.int64]:
    """``[num_rows]`` int64 permutation that reads few shards at a time.

    The shards are shuffled, each ``mixed_shards`` consecutive ones form a block, and the rows of a block are in the
    order that :func:`epoch_order` gives them. With one block of all shards the two orders are equal.

    Args:
        shards: ``[num_rows]`` shard of each row.
        seed, epoch: of the draws.
        mixed_shards: shards in a block; the last block may have fewer.
    """
    count = int(shards.max()) + 1
    shuffled = np.argsort(_keys(count, seed=seed, stream=Stream.SHARD_ORDER, epoch=epoch), kind="stable")
    block = np.empty(count, dtype=np.int64)
    block[shuffled] = np.arange(count) // mixed_shards
    return np.lexsort((_keys(len(shards), seed=seed, stream=Stream.EPOCH_ORDER, epoch=epoch), block[shards]))


def _keys(count: int, *, seed: int, stream: Stream, epoch: int) -> NDArray[np.int64]:
    keys = np.empty(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        rows = torch.arange(start, min(start + _CHUNK, count), dtype=torch.int64)
        bits = random_uint32(rows, 2, seed=seed, stream=stream, step=epoch)
        keys[start : start + _CHUNK] = ((bits[:, 0] << 31) | (bits[:, 1] >> 1)).numpy()
    return keys


def replacement_rows(row: int, num_rows: int, *, seed: int, epoch: int) -> list[int]:
    """The ``REPLACEMENTS`` rows to try, in this order, when ``row`` turns out bad in this epoch."""
    rows = torch.tensor([row], dtype=torch.int64)
    draws = random_integers(rows, REPLACEMENTS, num_rows, seed=seed, stream=Stream.REPLACEMENT, step=epoch)
    return [int(candidate) for candidate in draws[0]]
