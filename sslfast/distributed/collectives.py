"""Collectives over the ranks of a run, for tensors and for host objects, and the split of rows over ranks.

In a single process each of them is the identity, so callers need not check how many processes there are.
"""

from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sslfast.distributed.process_group import rank, world_size

T = TypeVar("T")


def gather_rows(x: Tensor) -> Tensor:
    """``[B, ...]`` of every rank, concatenated in the order of ranks: ``[world_size * B, ...]``."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


def gather_rows_with_gradient(x: Tensor) -> Tensor:
    """:func:`gather_rows` whose backward sums every rank's gradient for this rank's rows.

    With gradients averaged over ranks afterwards (:func:`replicate`), the mean of the ranks' losses is differentiated.
    """
    if world_size() == 1:
        return x
    return cast(Tensor, _GatherWithGradient.apply(x))


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of a tensor over ranks, bit-identical on each."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def reduce_scatter_rows(x: Tensor) -> Tensor:
    """``[world_size * B, ...]`` of every rank, summed over ranks; each rank gets its own ``[B, ...]`` of the sum.

    The transpose of :func:`gather_rows`: rank r gets the sum over ranks for the rows that it contributed.
    """
    if world_size() == 1:
        return x
    own = x.new_empty(len(x) // world_size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous())
    return own


def shard_bounds(num_rows: int, ranks: int) -> list[int]:
    """The split of ``num_rows`` rows over ranks: rank r has rows ``bounds[r]`` up to ``bounds[r + 1]``.

    Parts are contiguous, in the order of ranks, and differ in size by at most one; :func:`own_rows` is this rank's.
    """
    return [num_rows * r // ranks for r in range(ranks + 1)]


def own_rows(count: int) -> range:
    """This rank's part of ``count`` rows, as :func:`shard_bounds` splits them; :func:`gather_uneven` undoes it."""
    return range(*shard_bounds(count, world_size())[rank() : rank() + 2])


def gather_uneven(x: Tensor) -> Tensor:
    """``[n_r, ...]`` of every rank, concatenated in the order of ranks, on every rank; n_r may differ and be 0."""
    if world_size() == 1:
        return x
    counts = gather_objects(len(x))
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = gather_rows(padded).reshape(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_to_rank0(rows: Tensor, bounds: list[int], *, chunk_rows: int = 1 << 18) -> Tensor | None:
    """A matrix that is split over ranks by rows, complete on the host of rank 0; None on the others.

    Ranks send ``chunk_rows`` rows at a time, one rank after the other, so that rank 0's device holds one extra chunk.
    """
    if rank():
        for chunk in rows.split(chunk_rows):
            dist.send(chunk.contiguous(), 0)
        return None
    whole = torch.empty(bounds[-1], *rows.shape[1:], dtype=rows.dtype)
    whole[: len(rows)] = rows.cpu()
    for source in range(1, len(bounds) - 1):
        for start in range(bounds[source], bounds[source + 1], chunk_rows):
            chunk = rows.new_empty(min(chunk_rows, bounds[source + 1] - start), *rows.shape[1:])
            dist.recv(chunk, source)
            whole[start : start + len(chunk)] = chunk.cpu()
    return whole


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a floating tensor over ranks, bit-identical on each."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum over ranks."""
    if world_size() == 1:
        return x
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def broadcast_tensor(x: Tensor, source: int) -> Tensor:
    """The tensor of rank ``source``; the others pass one of its shape and type, which is overwritten."""
    if world_size() == 1:
        return x
    x = x.contiguous()
    dist.broadcast(x, source)
    return x


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank; what other ranks pass is ignored. Host objects only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_file(path: Path, *, keep: bool, chunk_bytes: int = 1 << 26) -> None:
    """Write rank 0's file ``path`` to the ``path`` of the other ranks that ``keep`` it, with ``chunk_bytes`` in memory.

    Raises:
        OSError: it cannot be written, on the rank that cannot, after all have received it.
    """
    size = broadcast_object(path.stat().st_size if rank() == 0 else 0)
    error: OSError | None = None
    with path.open("rb") if rank() == 0 else path.open("wb") if keep else BytesIO() as file:
        for start in range(0, size, chunk_bytes):
            chunk = torch.empty(min(chunk_bytes, size - start), dtype=torch.uint8)
            if rank() == 0:
                chunk = torch.frombuffer(bytearray(file.read(len(chunk))), dtype=torch.uint8)
            dist.broadcast(chunk, 0)
            try:
                if rank() and keep and error is None:
                    file.write(chunk.numpy().tobytes())
            except OSError as problem:
                error = problem
    if error is not None:
        raise error


def first_on_machine(folder: Path) -> int:
    """The first rank whose ``folder`` this one sees, which is its own at the latest: one on the same machine, where
    folders are of local disks.

    Args:
        folder: of this rank alone, with a name that no other has.
    """
    folders = gather_objects(str(folder))
    first = next(place for place, name in enumerate(folders) if place == rank() or Path(name).exists())
    barrier()  # all have looked
    return first


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in the order of ranks, on every rank. Host objects only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


_BACKGROUND_LIMIT = timedelta(hours=1)  # by which ranks may differ in the time that a disk takes


def background_gather() -> Callable[[Any], list[Any]]:
    """:func:`gather_objects` for a thread of each rank, in a process group of its own; every rank calls this once.

    What the threads exchange does not meet what the main threads exchange meanwhile.
    """
    if world_size() == 1:
        return lambda value: [value]
    group = dist.new_group(backend="gloo", timeout=_BACKGROUND_LIMIT)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value, group=group)
        return values

    return gather


def barrier() -> None:
    """Wait until every rank has called this."""
    max_over_ranks(torch.zeros(1))


def is_main() -> bool:
    """True on rank 0, which writes files."""
    return rank() == 0


def raise_together(error: str | None) -> None:
    """Raise ValueError on every rank if any rank passes an error, so that none waits for a rank that has stopped."""
    for found in gather_objects(error):
        if found is not None:
            raise ValueError(found)


def together(action: Callable[[], object], *, only_main: bool = False) -> None:
    """Do something on every rank, or on rank 0; what is wrong on one rank is raised on all, as ValueError."""
    error = None
    if world_size() == 1:
        action()
    elif is_main() or not only_main:
        try:
            action()
        except (ValueError, OSError, RuntimeError) as problem:
            error = str(problem)
    raise_together(error)
