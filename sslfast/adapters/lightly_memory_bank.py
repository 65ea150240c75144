"""MemoryBankModule and NTXentLoss with lightly's interface (lightly-ai/lightly), on sslfast's ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from sslfast.distributed import gather_rows
from sslfast.models import initial_rows
from sslfast.ops import bank_enqueue_, bank_nce


class MemoryBankModule(nn.Module):
    """A queue of the newest keys: ``output, bank = module(output, update=True)``.

    ``bank`` is a copy of the queue as it was before the update, as in lightly, so that a later update cannot change
    what a pending backward pass reads; :class:`NTXentLoss` below needs no copy.

    Differences from lightly: ``bank`` and ``bank_ptr`` are in the ``state_dict``, so a resumed run keeps its negatives;
    a batch that reaches the end of the queue wraps around instead of dropping the rest; the pointer is a 0-d tensor
    that stays on its device; the initial rows are drawn from ``seed``, not from the global generator.

    Args:
        size: ``(rows, columns)``; or rows only, then the first batch (or a loaded state) determines the columns.
            0 rows: no memory bank, ``forward`` returns None in its place.
        gather_distributed: enqueue the keys of all ranks, in the order of ranks.
        dim_first: return the bank as ``[columns, rows]`` (the default, as in lightly) or ``[rows, columns]``.
        seed: of the initial rows.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        dim_first: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if len(self.size) not in (1, 2) or any(length < 0 for length in self.size):
            raise ValueError(f"MemoryBankModule: size must be rows or (rows, columns), none negative, got {size=}")
        self.gather_distributed, self.dim_first, self.seed = gather_distributed, dim_first, seed
        columns = self.size[1] if len(self.size) == 2 else 0
        self.register_buffer("bank", initial_rows(self.size[0], columns, seed=seed))
        self.register_buffer("bank_ptr", torch.zeros((), dtype=torch.int64))

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``(output, bank)``; with ``update`` the queue then takes the output ``[B, columns]``. ``labels`` are
        ignored."""
        if self.size[0] == 0:
            return output, None
        self._fit(output)
        bank = self.bank.clone()
        if update:
            self.enqueue(output)
        return output, bank.transpose(0, 1) if self.dim_first else bank

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys ``[B, columns]`` over the oldest rows."""
        bank_enqueue_(self.bank, self.bank_ptr, gather_rows(keys) if self.gather_distributed else keys)

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        return f"size={self.size}, gather_distributed={self.gather_distributed}, dim_first={self.dim_first}"

    def _fit(self, output: Tensor) -> None:
        if len(self.size) == 1 and self.bank.shape[1] == 0:
            self.bank = initial_rows(self.size[0], output.shape[1], seed=self.seed).to(output.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "bank")
        if len(self.size) == 1 and saved is not None and self.bank.shape[1] == 0:
            self.bank = self.bank.new_zeros(self.size[0], saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)


class NTXentLoss(MemoryBankModule):
    """Softmax contrast of ``out0`` with ``out1`` against the queue: MoCo's loss (He et al. 2020, equation 1).

    ``loss = mean_b(log(exp(s_b) + sum_n exp(q_b . bank_n / τ)) - s_b)`` with ``q``, ``k`` the normalised ``out0``,
    ``out1`` and ``s_b = q_b . k_b / τ``. The queue then takes ``k`` if ``out0`` requires a gradient. The queue is read
    once for loss and gradient; neither a copy of it nor the ``[B, rows]`` logits are stored. Gradients flow to both
    outputs.

    Args:
        temperature: τ, as in lightly 0.5 by default.
        memory_bank_size: ``(rows, columns)`` or rows, at least 1. 0, lightly's in-batch form without a bank, is an
            error: use lightly's own class.
        gather_distributed, seed: see :class:`MemoryBankModule`.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = (4096, 128),
        gather_distributed: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(memory_bank_size, gather_distributed, seed=seed)
        if not temperature >= 1e-8:
            raise ValueError(f"NTXentLoss: temperature must be at least 1e-8, got {temperature=}")
        if self.size[0] < 1:
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be at least 1 row, got {memory_bank_size!r}; "
                "lightly's own NTXentLoss has the form without a memory bank"
            )
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:  # type: ignore[override]
        """0-d mean loss of ``out0`` and ``out1``, both ``[B, columns]``."""
        self._fit(out0)
        query, key = normalize(out0.float(), dim=1), normalize(out1.float(), dim=1)
        positive = (query * key).sum(dim=1) / self.temperature
        # The positive is no bank row. Against bank row 0, bank_nce is logsumexp over all rows less the score of row 0.
        first = torch.zeros(len(query), dtype=torch.int64, device=self.bank.device)
        over_first = bank_nce(query, self.bank, first, negatives="full", temperature=self.temperature)
        assert isinstance(over_first, Tensor)
        negatives = over_first + query @ self.bank[0].clone() / self.temperature
        if out0.requires_grad:
            self.enqueue(key)
        return softplus(negatives - positive).mean()
