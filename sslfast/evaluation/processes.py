"""An evaluation in several processes: who takes which rows, and how the parts come together again.

Everything is the identity in a single process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sslfast.distributed import gather_objects, gather_rows, join, leave, process_group, resolve_device, world_size


@contextmanager
def evaluation_device(name: str) -> Iterator[torch.device]:
    """The device of this process, with all processes of ``torchrun`` joined while the block runs."""
    group = process_group()
    device = resolve_device(name, local_rank=group.local_rank if group.world_size > 1 else None)
    own = world_size() == 1
    join(group, device)
    try:
        yield device
    finally:
        if own:
            leave()


def rank() -> int:
    """Number of this process among those that have joined."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """True in the process that writes files."""
    return rank() == 0


def own_rows(count: int) -> range:
    """This rank's part of ``count`` rows: contiguous, in the order of ranks, sizes equal to within one."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gather_uneven(x: Tensor) -> Tensor:
    """``[n_r, ...]`` of every rank in their order, of as many rows as each has; on every rank."""
    if world_size() == 1:
        return x
    counts = gather_objects(len(x))
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = gather_rows(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def raise_together(error: str | None) -> None:
    """ValueError on every rank where one or more of them have an error: no rank waits for one that has stopped."""
    for found in gather_objects(error):
        if found is not None:
            raise ValueError(found)
