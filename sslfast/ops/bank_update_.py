"""bank_update_: exponential moving average of memory-bank rows, in place."""

import torch
from torch import Tensor

from sslfast.ops import _library

_op = torch.ops.sslfast.bank_update_.default


def bank_update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float = 0.5) -> None:
    """Move rows of a memory bank toward new features and normalise them to unit length.

    ``bank[index] = normalize(momentum * bank[index] + (1 - momentum) * features)``, where ``momentum`` weighs the old
    row (PIRL section 3.2, NPID section 3.2; VISSL, PyContrast and lemniscate share this convention, mmselfsup has the
    opposite one). When an index repeats, the last occurrence wins and blends with the row as it was before the call, so
    the result does not depend on threads; an index of -1 (a row of another shard) is skipped. A blend
    shorter than 1e-12 is divided by 1e-12. No host sync.

    Args:
        bank: ``[N, D]`` fp32, fp64, bf16 or fp16, contiguous; updated in place.
        index: ``[B]`` int64 rows of the bank, or -1.
        features: ``[B, D]`` fp32, fp64, bf16 or fp16; no gradient flows. Neither index nor features may share memory
            with the bank.
        momentum: weight of the old row in [0, 1].

    Raises:
        ValueError: momentum out of range, tensors on different devices, a bank that requires a gradient.
        RuntimeError: wrong dtype or shape, shared memory; on CPU also an index outside the bank (CUDA: a device trap);
            called under activation checkpointing, which would run the update twice.
    """
    _library.check_momentum("bank_update_", momentum)
    tensors = {"bank": bank, "index": index, "features": features}
    _library.check_arguments("bank_update_", tensors, gradient=("features",), written=("bank",))
    _library.check_runs_once("bank_update_")
    _op(bank, index, _library.detached("bank_update_", "features", features), momentum)
    _library.mark_updated(bank)


def bank_update_reference(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float = 0.5) -> None:
    """The same update in torch, in the wider of the two dtypes and at least fp32: the specification."""
    accumulate = torch.float64 if torch.float64 in (bank.dtype, features.dtype) else torch.float32
    blend = momentum * bank[index].to(accumulate) + (1 - momentum) * features.detach().to(accumulate)
    rows = torch.nn.functional.normalize(blend, dim=1, eps=1e-12).to(bank.dtype)
    later = torch.triu(index[:, None] == index[None, :], diagonal=1).any(dim=1)
    writes = ~later & (index >= 0)
    bank[index[writes]] = rows[writes]


@torch.library.register_fake("sslfast::bank_update_")
def _(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    _library.check_same_device("bank_update_", bank=bank, index=index, features=features)
    torch._check(bank.dim() == 2, lambda: f"bank_update_: bank must have shape [N, D], got {list(bank.shape)}")
