"""MemoryBankModule and NTXentLoss with the interface of lightly 1.5.26 (lightly-ai/lightly, commit e8d317f), on
sslfast's ops.

In place of ``lightly.models.modules.memory_bank.MemoryBankModule`` and ``lightly.loss.NTXentLoss``: the same arguments,
positional too, and the same values. lightly's ``NNMemoryBankModule`` works as a subclass of this
:class:`MemoryBankModule`. Of the 257 tests that lightly has for the two classes (commit e8d317f), 252 pass here, 3 need
CUDA, and 2 compare the words of an error and of a warning, which are other words. Where lightly gives in silence a loss
that trains nothing or the wrong way, so does :class:`NTXentLoss`, with a warning: one sample without a memory bank, a
negative temperature.
"""

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from sslfast.adapters.checks import check_counts, check_features, check_precision, check_temperature
from sslfast.distributed import gather_rows, gather_rows_with_gradient, rank, world_size
from sslfast.models import first_derivative_only, info_nce, initial_rows, snapshot
from sslfast.ops import bank_nce_dense


class MemoryBankModule(nn.Module):
    """A queue of the newest keys: ``output, bank = module(output, update=True)``.

    ``bank`` is a detached copy of the queue as it was before the update, so that a later update cannot change what a
    pending backward pass reads, in compiled code neither. As in lightly, a batch that reaches the end of the queue
    fills it, the rest of that batch is dropped and the next one starts at row 0; so of a batch larger than the queue
    the first rows are kept. The queue has the dtype of the module (``.half()``, ``.double()``) and follows the outputs
    to their device.

    An update inside a function that ``torch.utils.checkpoint`` recomputes is a RuntimeError in the backward pass.

    Differences from lightly: ``bank`` and ``bank_ptr`` are in the ``state_dict``, so a resumed run keeps its negatives
    (a state of lightly, which has neither, loads too and leaves the queue as it is); the initial rows are drawn from
    ``seed``, not from the global generator; no host synchronisation. Before 1.4.25 lightly's bank was
    ``[columns, rows]``.

    Args:
        size: ``(rows, columns)``, or ``(rows, *shape)`` for features of more dimensions; or rows only, then the first
            batch (or a loaded state) determines the columns, with a UserWarning, since wrappers for distributed
            training hold the buffers that they find at the start. 0 rows: no memory bank, ``forward`` returns None in
            its place.
        gather_distributed: enqueue the keys of all ranks, in the order of ranks; batches must be of one size.
        feature_dim_first: return the bank as ``[columns, rows]``, else ``[rows, columns]``.
        seed: of the initial rows, unit vectors.

    Raises:
        ValueError: a size that is not made of integers, negative, or of 0 columns.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        try:
            self.size = (size,) if isinstance(size, int) else tuple(size)
        except TypeError:
            self.size = ()
        if not self.size:
            raise ValueError(f"MemoryBankModule: size must be rows or (rows, columns), got {size=}")
        check_counts("MemoryBankModule", 0, **{f"rows of {size=}": self.size[0]})
        check_counts(
            "MemoryBankModule", int(self.size[0] > 0), **{f"columns of {size=}": min(self.size[1:], default=1)}
        )
        self.gather_distributed, self.feature_dim_first, self.seed = gather_distributed, feature_dim_first, seed
        if isinstance(size, int) and size > 0:
            warnings.warn(
                f"MemoryBankModule: {size=} leaves the number of columns to the first batch, which distributed "
                "training may not notice; give (rows, columns)",
                UserWarning,
                stacklevel=2,
            )
        self.register_buffer("bank", torch.empty(self.size[0], 0))
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64))
        if len(self.size) > 1:
            self._start(self.size[1:])

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the queue before the update.

        Args:
            output: ``[B, columns]`` floating.
            labels: ignored, as in lightly.
            update: the queue then takes the output.

        Returns:
            ``(output, bank)``: the same tensor, and a copy of the queue, detached; None if it has 0 rows.

        Raises:
            TypeError, ValueError: the output is no floating tensor, or of another shape than the bank.
            RuntimeError: with ``update``, inside a recomputation.
        """
        if self.size[0] == 0:
            return output, None
        self._fit(output)
        bank = snapshot(self.bank, type(self).__name__, once=update)
        if update:
            self.enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys ``[B, columns]`` over the oldest rows, without normalising. Raises as :meth:`forward` does."""
        self._fit(keys, "keys")
        if self.gather_distributed:
            keys = gather_rows(keys)
        rows, batch = self.size[0], len(keys)
        # lightly drops what lies beyond the end: those rows are written with what they hold.
        target = self.bank_ptr + torch.arange(min(batch, rows), device=self.bank.device)
        inside = (target < rows).reshape(-1, *(1,) * (self.bank.dim() - 1))
        target = target % rows
        kept = torch.where(inside, keys.detach()[:rows].to(self.bank.dtype), self.bank[target])
        self.bank.index_copy_(0, target, kept)
        end = self.bank_ptr + batch
        self.bank_ptr.copy_(torch.where(end < rows, end, 0))

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        return (
            f"size={self.size}, gather_distributed={self.gather_distributed}, "
            f"feature_dim_first={self.feature_dim_first}"
        )

    def _start(self, shape: Sequence[int]) -> None:
        """Initial rows of this shape, in the dtype and on the device of the module."""
        rows = initial_rows(self.size[0] * prod(shape[:-1]), shape[-1], seed=self.seed)
        self.bank = rows.reshape(self.size[0], *shape).to(self.bank)

    def _fit(self, output: Tensor, argument: str = "output") -> None:
        """Check an output against the bank, which gets columns if it has none and follows it to its device."""
        name = type(self).__name__
        if not isinstance(output, Tensor) or not output.is_floating_point():
            received = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"{name}: {argument} must be a floating tensor [B, columns], got {received}")
        shape = self.bank.shape[1:]
        if shape == (0,) and output.dim() > 1 and 0 not in output.shape[1:]:
            self._start(shape := output.shape[1:])
        if output.dim() == 0 or output.shape[1:] != shape or len(output) == 0:
            wanted = str([*shape] if shape != (0,) else ["columns"])[1:-1].replace("'", "")
            raise ValueError(f"{name}: {argument} must be [B, {wanted}], none of them 0, got {list(output.shape)}")
        if self.bank.is_meta and not output.is_meta:
            raise RuntimeError(
                f"{name}: its bank is on the meta device and has no values; build the module again outside of "
                'torch.device("meta"), then load its state'
            )
        if self.bank.device != output.device:
            self.bank, self.bank_ptr = self.bank.to(output.device), self.bank_ptr.to(output.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved, pointer = state_dict.get(prefix + "bank"), state_dict.get(prefix + "bank_ptr")
        if saved is None and pointer is None:  # lightly's state: it saves neither
            state_dict |= {prefix + "bank": self.bank, prefix + "bank_ptr": self.bank_ptr}
        if pointer is not None:
            state_dict[prefix + "bank_ptr"] = pointer.reshape(1)  # 0-d in older checkpoints of this module
        if saved is not None and self.bank.shape[1:] == (0,):
            self.bank = self.bank.new_zeros(self.size[0], *saved.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *args)


class NTXentLoss(nn.Module):
    """SimCLR's loss of a batch, or MoCo's loss against a queue: ``loss = module(out0, out1)``.

    ``q``, ``k`` are the normalised ``out0``, ``out1`` ``[B, columns]``, τ the temperature.

    Without a memory bank (the default), SimCLR (Chen et al. 2020, equation 1): the 2B vectors ``z = (q, k)`` are each
    contrasted with all others, ``loss = mean_i(log(sum_{j != i} exp(z_i . z_j / τ)) - z_i . z_p(i) / τ)``, p(i) the
    other view of sample i. With ``gather_distributed`` the others are those of all ranks, and gradients reach them.

    With a memory bank, MoCo (He et al. 2020, equation 1): ``loss = mean_b(log(exp(s_b) + sum_n exp(q_b . bank_n / τ)) -
    s_b)`` with ``s_b = q_b . k_b / τ``. The queue then takes ``k``, if a gradient is recorded for ``q``. It is read
    once for loss and gradient; no copy of it and no ``[B, rows]`` logits are stored.

    Gradients flow to both outputs, under autocast and in half types from sums in fp32. Without a memory bank all
    derivatives are computed; with one, first derivatives in reverse mode, others are a RuntimeError.
    ``torch.utils.checkpoint`` may recompute the former; for the latter it is a RuntimeError in the backward pass.

    Differences from lightly: the loss is fp32 for half types (fp64 for fp64); what the head of this module lists; see
    :class:`MemoryBankModule` for the queue. ``bank`` and ``bank_ptr`` are those of ``memory_bank``: before 1.5.16
    lightly's loss was itself a bank.

    Args:
        temperature: τ, at least 1e-8 and finite. A learned one may be given, or set as ``loss.temperature``, as a 0-d
            ``nn.Parameter``: its gradient is computed. A negative number is a UserWarning: the loss is then least where
            positive pairs are opposite.
        memory_bank_size: ``(rows, columns)`` or rows, see :class:`MemoryBankModule`; 0 rows: no bank.
        gather_distributed: see above; with a bank, its keys are those of all ranks.
        seed: of the queue's initial rows.

    Raises:
        ValueError: an option out of range; ``gather_distributed`` where torch has no distributed package.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if isinstance(temperature, float | int) and temperature < 0:
            warnings.warn(
                f"NTXentLoss: {temperature=} makes the loss least for opposite positive pairs; give a positive one",
                UserWarning,
                stacklevel=2,
            )
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError(
                "NTXentLoss: gather_distributed=True needs a torch built with torch.distributed; "
                "pass gather_distributed=False"
            )
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, seed=seed)
        if len(self.memory_bank.bank.shape) > 2:
            raise ValueError(f"NTXentLoss: memory_bank_size must be rows or (rows, columns), got {memory_bank_size!r}")

    @property
    def bank(self) -> Tensor:
        """``[rows, columns]``."""
        return self.memory_bank.bank

    @property
    def bank_ptr(self) -> Tensor:
        """``[1]`` int64, the row that the next key takes."""
        return self.memory_bank.bank_ptr

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss of a batch.

        Of one sample without a bank it is 0 with a gradient of 0, and a UserWarning where a gradient is asked for.

        Args:
            out0, out1: ``[B, columns]`` floating, the two views.

        Returns:
            0-d loss in nats.

        Raises:
            TypeError: no floating tensors; fp64 outputs and a bank of less.
            ValueError: a shape or device.
            RuntimeError: with a bank, inside a recomputation.
        """
        check_features("NTXentLoss", None, out0=out0, out1=out1)
        _check_temperature(self.temperature)
        dtype = torch.promote_types(torch.promote_types(out0.dtype, out1.dtype), torch.float32)
        if self.memory_bank.size[0] == 0:
            return self._contrast_views(*(normalize(x.to(dtype), dim=1) for x in (out0, out1)))
        self.memory_bank._fit(out0)
        bank = self.memory_bank.bank
        check_precision("NTXentLoss", bank, out0, out1)
        query, key = (normalize(x.to(torch.promote_types(dtype, bank.dtype)), dim=1) for x in (out0, out1))
        scaled = query * (1 / self.temperature)  # here, so that the gradient of a learned temperature is computed
        no_row = torch.full(
            (len(query),), -1, dtype=torch.int64, device=query.device
        )  # the positive is not in the bank
        index = snapshot(no_row, "NTXentLoss", once=query.requires_grad)
        scored = first_derivative_only(scaled[None], "NTXentLoss")
        negatives, _ = bank_nce_dense(scored, bank, index, temperature=1.0)
        if query.requires_grad:
            self.memory_bank.enqueue(key)
        positive = (scaled * key).sum(dim=1)
        return -logsigmoid(positive - negatives[0]).mean()

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"

    def _contrast_views(self, query: Tensor, key: Tensor) -> Tensor:
        batch, ranks, place = len(query), 1, 0
        everyone = (query, key)
        if self.gather_distributed:
            ranks, place = world_size(), rank()
            everyone = (gather_rows_with_gradient(query), gather_rows_with_gradient(key))
        if batch * ranks == 1:
            loss = 0 * (query * key).sum()
            if loss.requires_grad:
                warnings.warn(
                    "NTXentLoss: one sample has no negatives, so the loss is 0 whatever the embeddings; give at least "
                    "2 samples, or a memory bank with memory_bank_size=(rows, columns)",
                    UserWarning,
                    stacklevel=3,
                )
            return loss
        temperature, queries = self.temperature, torch.cat((query, key))
        if not isinstance(temperature, Tensor) and temperature < 0:
            temperature, queries = -temperature, -queries
        own = place * batch + torch.arange(batch, device=query.device)
        other = own + ranks * batch
        return info_nce(
            queries,
            torch.cat(everyone),
            torch.cat((other, own)),
            temperature=temperature,
            excluded=torch.cat((own, other)),
        ).mean()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("bank", "bank_ptr"):  # older checkpoints of this module
            if prefix + name in state_dict:
                state_dict[f"{prefix}memory_bank.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_temperature(temperature: Any) -> None:
    """:func:`check_temperature` of the size of a number."""
    is_number = isinstance(temperature, float | int)
    check_temperature("NTXentLoss", abs(temperature) if is_number else temperature)
