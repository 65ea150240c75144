"""negative_rows: the bank rows that sampled negatives use."""

import torch
from torch import Tensor

from sslfast.ops import _library
from sslfast.ops.philox import Stream, random_integers


def negative_rows(
    index: Tensor,
    *,
    num_negatives: int,
    num_rows: int,
    seed: int,
    step: int | Tensor,
    exclude_self: bool = True,
    shared: bool = False,
) -> Tensor:
    """Rows that ``bank_nce`` scores for negatives "sampled" and "shared": with replacement, the same on every device.

    Row ``k`` of sample ``b`` is uniform over the ``num_rows`` rows (over all but ``index[b]`` with ``exclude_self``)
    and a function of ``(seed, step, index[b], k)`` only: neither batch size nor order change it. Shared rows are one
    draw for the whole batch from all rows, a function of ``(seed, step, k)``.

    Args:
        index: ``[B]`` int64, bank row of each sample.
        num_negatives: K, at least 1.
        num_rows: N, rows of the bank; at least 2 when ``exclude_self``, at most 2**32.
        seed: ``0 <= seed < 2**63``.
        step: int or 0-d int64 tensor on the device of ``index`` (advances inside a captured graph); used modulo 2**32.
        exclude_self: never draw ``index[b]`` for sample ``b`` (PIRL section 3: negatives from D without I). A shared
            draw excludes no row; ``bank_nce`` skips a sample's own row when scoring.
        shared: one draw for the batch; only the device of ``index`` is used.

    Returns:
        ``[B, K]`` int64; ``[K]`` when shared.

    Raises:
        ValueError: num_negatives, num_rows or seed out of range, tensors on different devices.
        RuntimeError: wrong dtype or shape; on CPU also an index outside the bank (CUDA: a device trap).
    """
    exclude_self = exclude_self and not shared
    _check(num_negatives, num_rows, seed, exclude_self)
    step_tensor, step_number = _library.step_arguments("negative_rows", step)
    _library.check_arguments("negative_rows", {"index": index, "step": step_tensor})
    index = index.new_zeros(1) if shared else index
    rows: Tensor = torch.ops.sslfast.negative_rows(
        index, step_tensor, step_number, num_negatives, num_rows, seed, exclude_self, shared
    )
    return rows[0] if shared else rows


def negative_rows_reference(
    index: Tensor,
    *,
    num_negatives: int,
    num_rows: int,
    seed: int,
    step: int | Tensor,
    exclude_self: bool = True,
    shared: bool = False,
) -> Tensor:
    """The same draw in torch: the specification of :func:`negative_rows`, equal to the last bit."""
    if shared:
        zero = index.new_zeros(1)
        return random_integers(zero, num_negatives, num_rows, seed=seed, stream=Stream.SHARED_NEGATIVES, step=step)[0]
    bound = num_rows - 1 if exclude_self else num_rows
    rows = random_integers(index, num_negatives, bound, seed=seed, stream=Stream.NEGATIVES, step=step)
    return rows + (rows >= index[:, None]) if exclude_self else rows


def _check(num_negatives: int, num_rows: int, seed: int, exclude_self: bool) -> None:
    _library.check_integers("negative_rows", num_negatives=num_negatives, num_rows=num_rows)
    if not 1 <= num_negatives < 2**33:
        raise ValueError(f"negative_rows: num_negatives must be at least 1 and below 2**33, got {num_negatives=}")
    needed = 2 if exclude_self else 1
    if not needed <= num_rows <= 2**32:
        raise ValueError(f"negative_rows: num_rows must be in [{needed}, 2**32] with {exclude_self=}, got {num_rows=}")
    _library.check_seed("negative_rows", seed)


@torch.library.register_fake("sslfast::negative_rows")
def _(
    index: Tensor,
    step_tensor: Tensor | None,
    step: int,
    num_negatives: int,
    num_rows: int,
    seed: int,
    exclude_self: bool,
    shared: bool,
) -> Tensor:
    _library.check_same_device("negative_rows", index=index, step=step_tensor)
    torch._check(index.dim() == 1, lambda: f"negative_rows: index must have shape [B], got {list(index.shape)}")
    return index.new_empty((index.shape[0], num_negatives))
