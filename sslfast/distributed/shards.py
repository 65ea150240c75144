"""A rank's part of a tensor that is split over ranks, for checkpoints that every rank writes its part of."""

from dataclasses import dataclass

from torch import Tensor

from sslfast.distributed.collectives import own_rows

_SPLIT_BYTES = 1 << 20
"""Tensors that every rank holds are split between them from this size on; rank 0 writes smaller ones."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Elements ``first .. first + n`` of a tensor that is laid out row by row; the ranks' shards together are all."""

    values: Tensor
    """``[n]``, this rank's elements."""
    first: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


def row_shard(rows: Tensor, first_row: int, num_rows: int) -> Shard:
    """The shard of a rank that holds ``rows`` ``[n, ...]``, rows from ``first_row`` on of ``num_rows``."""
    width = rows[:0].flatten(1).shape[1] if rows.dim() > 1 else 1
    return Shard(values=rows.detach().reshape(-1), first=first_row * width, shape=(num_rows, *rows.shape[1:]))


def split_evenly(x: Tensor) -> Tensor | Shard:
    """This rank's part of a tensor that is equal on all ranks, the tensor itself where it is small."""
    if x.nbytes < _SPLIT_BYTES:
        return x
    part = own_rows(x.numel())
    flat = x.detach().reshape(-1)
    return Shard(values=flat[part.start : part.stop], first=part.start, shape=tuple(x.shape))
