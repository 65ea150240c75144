"""Counter-based random numbers: Philox4x32-10 written in torch, the same bits as ``csrc/common/philox.h``.

Every draw in sslfast is a pure function of ``(seed, stream, step, id)``, where the id is that of a sample, a bank row
or another item: there is no generator state to save, to share between workers or to restore. Source: Salmon, Moraes,
Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for. Streams are independent. Their values are part of every recorded run and never change."""

    NEGATIVES = 0
    EPOCH_ORDER = 1
    REPLACEMENT = 2
    SYNTHETIC = 3
    BANK_INIT = 4
    DEMO_CROPS = 5
    PROBE_SPLIT = 6
    SHARED_NEGATIVES = 7
    PERMUTATIONS = 8  # order of the candidates of csrc/permutations.cpp
    PRETEXT = 9  # the question of a covariant method: class, pair, colour channels
    CLUSTERS = 10  # initial centroids of k-means
    CORRUPTION = 11  # noise and masks of the methods that reconstruct
    BATCH_ORDER = 12  # shuffled over ranks by MoCo
    SHARD_ORDER = 13
    CROP = 16  # + position of the view in its recipe, up to 15 views
    VIEW = 32  # + position of the view in its recipe, up to 15 views
    DETECTION = 48  # + draws of detector fine-tuning: order, size and mirror, anchors, proposals


def philox4x32(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 block function.

    Args:
        counter: ``[..., 4]`` int64 holding uint32 values.
        seed: the 64-bit key, ``0 <= seed < 2**63``.

    Returns:
        ``[..., 4]`` int64 holding uint32 values.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which keeps all 64 bits of a 32x32 product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_uint32(ids: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """``count`` uniform uint32 numbers for every id.

    The counter of block ``j`` of id ``r`` is ``(j, r mod 2**32, step mod 2**32, stream * 2**16 + r // 2**32)``.

    Args:
        ids: ``[B]`` int64 in ``[0, 2**48)``.
        count: numbers per id.
        seed: ``0 <= seed < 2**63``.
        stream: a :class:`Stream` value (plus the view's position where the stream says so), below ``2**16``.
        step: int or 0-d int64 tensor: step or epoch number.

    Returns:
        ``[B, count]`` int64 holding uint32 values, on the device of ``ids``.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed=}")
    blocks = (count + 3) // 4
    shape = (ids.shape[0], blocks)
    block = torch.arange(blocks, dtype=torch.int64, device=ids.device).expand(shape)
    low = (ids & _MASK)[:, None].expand(shape)
    high = (stream * 2**16 + (ids >> 32))[:, None].expand(shape)
    if isinstance(step, Tensor):
        step = step.to(ids.device, torch.int64) & _MASK
    else:  # filled on the device: copying a host scalar would synchronise
        step = torch.full((), step & _MASK, dtype=torch.int64, device=ids.device)
    counter = torch.stack((block, low, step.expand(shape), high), dim=-1)
    return philox4x32(counter, seed).reshape(shape[0], blocks * 4)[:, :count]


def random_uniform(ids: Tensor, count: int, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """``[B, count]`` float32 uniform on the 2**24 multiples of 2**-24 in ``[0, 1)``; see :func:`random_uint32`."""
    return (random_uint32(ids, count, seed=seed, stream=stream, step=step) >> 8).to(torch.float32) * 2.0**-24


def random_integers(ids: Tensor, count: int, bound: int, *, seed: int, stream: int, step: int | Tensor) -> Tensor:
    """``[B, count]`` int64 uniform on ``0 .. bound-1`` (``1 <= bound <= 2**32``); see :func:`random_uint32`.

    Uses 64 random bits per number, so the bias is below ``bound / 2**64``.
    """
    bits = random_uint32(ids, 2 * count, seed=seed, stream=stream, step=step)
    return _scale_to_bound(bits[:, 0::2], bits[:, 1::2], bound)


def integers_below(words: Tensor, bounds: Tensor) -> Tensor:
    """``[B]`` int64, each uniform on ``0 .. bounds[b]-1`` (at most ``2**32``) from uint32 ``words`` ``[B, 2]``."""
    return _scale_to_bound(words[:, 0], words[:, 1], bounds)


def _scale_to_bound(low: Tensor, high: Tensor, bound: int | Tensor) -> Tensor:
    # floor((high * 2**32 + low) * bound / 2**64) without a 128-bit product.
    carry = ((low * bound) >> 32) & _MASK
    return _high_word(high, bound, carry)


def _high_word(high: Tensor, bound: int | Tensor, carry: Tensor) -> Tensor:
    """``(high * bound + carry) >> 32`` where the 64-bit sum may set the sign bit."""
    return ((high * bound + carry) >> 32) & _MASK


def uint32_below(words: Tensor, bound: int) -> Tensor:
    """int64 uniform on ``0 .. bound-1`` from uint32 ``words`` (``bound < 2**31``; bias below ``bound / 2**32``)."""
    return (words * bound) >> 32
