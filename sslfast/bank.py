"""The memory bank: one unit row per training image, and the normaliser Z that goes with it."""

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_rows
from sslfast.ops import bank_update_
from sslfast.ops.philox import Stream, random_uniform

_INIT_CHUNK = 65536  # rows drawn at a time: bounds the int64 temporaries of the Philox rounds


def initial_rows(num_rows: int, dimensions: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[num_rows, dimensions]`` random unit rows; row r depends on (seed, r) alone.

    Uniform in a cube, then normalised, as the public NPID and PIRL code does (lemniscate, VISSL).
    """
    rows = torch.empty(num_rows, dimensions, dtype=dtype)
    for start in range(0, num_rows, _INIT_CHUNK):
        ids = torch.arange(start, min(start + _INIT_CHUNK, num_rows))
        uniform = random_uniform(ids, dimensions, seed=seed, stream=Stream.BANK_INIT, step=0)
        rows[start : start + len(ids)] = nn.functional.normalize(2 * uniform - 1, dim=1).to(dtype)
    return rows


class MemoryBank(nn.Module):
    """``rows``: ``[N, D]`` unit rows, a buffer, so that checkpoints hold it (Wu et al. 2018, section 3.2).

    ``update_(index, features)`` moves rows by ``bank_update_``; rows never receive gradients.
    """

    rows: Tensor

    def __init__(
        self, num_rows: int, dimensions: int, *, momentum: float, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", initial_rows(num_rows, dimensions, seed=seed, dtype=dtype))

    def update_(self, index: Tensor, features: Tensor) -> None:
        """``rows[index] = normalize(momentum * rows[index] + (1 - momentum) * features)`` for the samples of all ranks.

        Every rank holds the whole bank and applies the same update in the same order, so banks stay equal to the bit.
        """
        bank_update_(self.rows, gather_rows(index), gather_rows(features), momentum=self.momentum)
