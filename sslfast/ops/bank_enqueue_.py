"""bank_enqueue_: first-in, first-out queue of keys, in place."""

import torch
from torch import Tensor

from sslfast.ops import _library

_op = torch.ops.sslfast.bank_enqueue_.default


def bank_enqueue_(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    """Write keys over the oldest rows of a ring and move its head.

    ``bank[(head + b) % N] = keys[b]`` for b = 0 .. B-1 in this order, then ``head = (head + B) % N``: the first-in,
    first-out dictionary of MoCo (He et al. 2020, section 3.1). B need not divide N, and of more than N keys the last N
    are kept. The head is a tensor on the device, read and advanced there (no host sync; captured graphs replay it), and
    is part of the state to save. The rows written are distinct, so the result does not depend on threads.

    Args:
        bank: ``[N, D]`` fp32, fp64, bf16 or fp16, contiguous, N >= 1; updated in place.
        head: 0-d int64 in [0, N), the row of the next key; updated in place.
        keys: ``[B, D]`` fp32, fp64, bf16 or fp16, rounded to the bank's dtype; stored as given (normalise before); no
            gradient flows. Bank, head and keys must not share memory.

    Raises:
        ValueError: tensors on different devices, a bank that requires a gradient.
        RuntimeError: wrong dtype or shape, shared memory; on CPU also a head outside the bank (CUDA: a device trap);
            called under activation checkpointing, which would run the update twice.
    """
    tensors = {"bank": bank, "head": head, "keys": keys}
    _library.check_arguments("bank_enqueue_", tensors, gradient=("keys",), written=("bank", "head"))
    _library.check_runs_once("bank_enqueue_")
    _op(bank, head, _library.detached("bank_enqueue_", "keys", keys))
    _library.mark_updated(bank, head)


def bank_enqueue_reference(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    """The same update in torch: the specification of :func:`bank_enqueue_`, equal to the last bit."""
    num_rows, batch = len(bank), len(keys)
    kept = torch.arange(max(0, batch - num_rows), batch, device=bank.device)
    bank[(head + kept) % num_rows] = keys.detach()[kept].to(bank.dtype)
    head.copy_((head + batch) % num_rows)


@torch.library.register_fake("sslfast::bank_enqueue_")
def _(bank: Tensor, head: Tensor, keys: Tensor) -> None:
    _library.check_same_device("bank_enqueue_", bank=bank, head=head, keys=keys)
    torch._check(bank.dim() == 2, lambda: f"bank_enqueue_: bank must have shape [N, D], got {list(bank.shape)}")
    torch._check(head.dim() == 0, lambda: f"bank_enqueue_: head must be 0-d, got shape {list(head.shape)}")
    torch._check(
        keys.dim() == 2 and keys.shape[1] == bank.shape[1],
        lambda: f"bank_enqueue_: keys must have shape [B, D] = [B, {bank.shape[1]}], got {list(keys.shape)}",
    )
