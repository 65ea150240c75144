"""The memory bank: one unit vector per training image, on every rank or split over ranks."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sslfast.distributed import gather_rows, rank, shard_bounds, world_size
from sslfast.models.derivatives import first_derivative_only
from sslfast.models.recomputation import snapshot
from sslfast.ops import bank_nce, bank_update_
from sslfast.ops.philox import Stream, random_uniform

_INIT_CHUNK = 65536  # rows per block: bounds the int64 temporaries of the Philox rounds


def initial_rows(
    num_rows: int, dimensions: int, *, seed: int, dtype: torch.dtype = torch.float32, first_row: int = 0
) -> Tensor:
    """``[num_rows, dimensions]`` random unit vectors, rows from ``first_row`` on; row r depends on (seed, r) alone.

    Uniform in a cube, then normalised, as the public NPID and PIRL code does (lemniscate, VISSL).
    """
    rows = torch.empty(num_rows, dimensions, dtype=dtype)
    for start in range(0, num_rows, _INIT_CHUNK):
        ids = first_row + torch.arange(start, min(start + _INIT_CHUNK, num_rows))
        uniform = random_uniform(ids, dimensions, seed=seed, stream=Stream.BANK_INIT, step=0)
        rows[start : start + len(ids)] = nn.functional.normalize(2 * uniform - 1, dim=1).to(dtype)
    return rows


class MemoryBank(nn.Module):
    """N unit vectors of D dimensions (Wu et al. 2018, section 3.2), which take no gradient.

    ``vectors`` is a buffer. ``layout="replicated"``: every rank holds all N and applies the same updates in the same
    order, so banks stay bit-equal. ``"sharded"``: rank r holds rows ``N r / R`` up to ``N (r + 1) / R``, 1/R of
    the memory; queries and updates of all ranks go to every rank, see ``sharded_bank.py``. Losses and gradients
    are the same up to rounding.

    Checkpoints hold the whole bank as ``vectors``, whatever the layout: loading takes this rank's part of it, for any
    layout and number of ranks.

    Args:
        num_rows: N; sharded, at least 2 for every rank.
        dimensions: D.
        momentum: weight of the old vector in :meth:`update_`.
        seed: of the initial vectors, see :func:`initial_rows`.
        dtype: storage; sums are fp32 (fp64 for fp64).
        layout: over the ranks of the process group at construction.

    Scoring or updating inside a function that ``torch.utils.checkpoint`` recomputes is an error: by then the vectors
    may be others.

    Raises:
        ValueError: fewer than 2 rows, or 2 for every shard; dimensions below 1; momentum outside [0, 1].
    """

    vectors: Tensor
    updates: Tensor

    def __init__(
        self,
        num_rows: int,
        dimensions: int,
        *,
        momentum: float,
        seed: int,
        dtype: torch.dtype = torch.float32,
        layout: Literal["replicated", "sharded"] = "replicated",
    ) -> None:
        super().__init__()
        if num_rows < 2 or dimensions < 1:
            raise ValueError(
                f"MemoryBank: needs at least 2 rows, a positive and a negative, of 1 dimension, got {num_rows=}, "
                f"{dimensions=}"
            )
        if not 0 <= momentum <= 1:
            raise ValueError(f"MemoryBank: momentum must be in [0, 1], got {momentum=}")
        self.num_rows, self.momentum = num_rows, momentum
        self.is_sharded = layout == "sharded" and world_size() > 1
        self.bounds = shard_bounds(num_rows, world_size() if self.is_sharded else 1)
        if self.is_sharded and num_rows < 2 * world_size():
            raise ValueError(
                f"a sharded bank needs at least 2 rows for each of {world_size()} ranks, got {num_rows}; "
                "use a replicated one"
            )
        place = rank() if self.is_sharded else 0
        self.first_row, end = self.bounds[place : place + 2]
        own = initial_rows(end - self.first_row, dimensions, seed=seed, dtype=dtype, first_row=self.first_row)
        self.register_buffer("vectors", own)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64), persistent=False)

    def score(self, query: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """``bank_nce`` of this rank's queries against the whole bank.

        Args:
            query: ``[V, B, D]`` floating, fp64 for fp64 vectors alone; sharded: V and B the same on every rank.
            index: ``[B]`` int64, rows of the whole bank.
            options: of :func:`sslfast.ops.bank_nce`; sharded, NCE needs ``z``.

        Returns:
            ``(losses, log-sum-exps of the scores)``, each ``[V, B]``; gradient flows to ``query`` through the losses.

        Raises:
            ValueError, RuntimeError: as ``bank_nce`` does.
            RuntimeError: inside a recomputation; a second or forward-mode derivative is asked for.
        """
        index = snapshot(index, "MemoryBank.score", once=True)
        query = first_derivative_only(query, "MemoryBank.score")
        if self.vectors.dtype == torch.float64:
            query = query.double()
        if self.is_sharded:
            # Imported here, since it loads torch.compile, which takes seconds.
            from sslfast.models.sharded_bank import score_over_shards

            return score_over_shards(query, self.vectors, index, shard=(self.first_row, self.num_rows), **options)
        return cast(tuple[Tensor, Tensor], bank_nce(query, self.vectors, index, **options, return_lse=True))

    @torch.no_grad()
    def update_(self, index: Tensor, features: Tensor) -> None:
        """``vectors[index] = normalize(momentum * vectors[index] + (1 - momentum) * features)``, samples of all ranks.

        Every rank gets the whole batch in the same order and updates the rows that it holds; of a repeated index the
        last occurrence counts.
        """
        index = snapshot(index, "MemoryBank.update_", once=True)
        index, features = gather_rows(index), gather_rows(features)
        if self.is_sharded:
            bits = features.detach().float().contiguous().view(torch.int32)
            self.updates.mul_(31).add_(bits.sum(dtype=torch.int64)).add_(index.sum())  # modulo 2**64
            local = index - self.first_row
            index = torch.where((local >= 0) & (local < len(self.vectors)), local, -1)
        bank_update_(self.vectors, index, features, momentum=self.momentum)

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks: the vectors, or, where they are sharded, a checksum of all updates so
        far."""
        return [self.updates if self.is_sharded else self.vectors]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "rows" in state_dict:  # name in older checkpoints
            state_dict[prefix + "vectors"] = state_dict.pop(prefix + "rows")
        whole = state_dict.get(prefix + "vectors")
        if self.is_sharded and whole is not None and len(whole) == self.num_rows:
            state_dict[prefix + "vectors"] = whole[self.first_row : self.first_row + len(self.vectors)]
        super()._load_from_state_dict(state_dict, prefix, *args)
