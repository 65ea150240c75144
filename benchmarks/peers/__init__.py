"""Other ways to compute ``bank_nce``'s loss and gradient, from the published formulas: what it is timed beside.

Every peer is ``(query [V, B, D], bank [N, D], index [B], negatives, *, temperature) -> (loss [V, B], gradient
[V, B, D])`` in fp32 (fp64 for an fp64 bank): InfoNCE of each query, and the derivative of the sum of losses. The
``negatives`` are bank rows: ``[B, K]`` for "sampled", ``[K]`` for "shared", None for "full". Products are in the bank's
dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from benchmarks.peers.dense import chunked, matmul, matmul_compiled, split_attention
from benchmarks.peers.gather import gather_compiled, gather_eager

Mode = Literal["sampled", "shared", "full"]
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class Peer:
    """One implementation, and the memory it needs."""

    name: str
    mode: Mode
    function: Function
    values: Callable[[int, int, int, int], int]
    """(V * B, K or N, D, B) -> elements of the largest tensors that it holds, to predict what does not fit."""


def _gathered(queries: int, count: int, columns: int, batch: int) -> int:
    return 2 * batch * count * columns + 3 * queries * count  # the rows and their gradient's products


def _scores(queries: int, count: int, columns: int, batch: int) -> int:
    return 3 * queries * count + count * columns  # scores, softmax and its gradient


def _streamed(queries: int, count: int, columns: int, batch: int) -> int:
    return queries * (columns + 8192) * 3


PEERS = [
    Peer(name="eager gather", mode="sampled", function=gather_eager, values=_gathered),
    Peer(name="compiled gather", mode="sampled", function=gather_compiled, values=_gathered),
    Peer(name="matmul", mode="shared", function=matmul, values=_scores),
    Peer(name="compiled matmul", mode="shared", function=matmul_compiled, values=_scores),
    Peer(name="matmul", mode="full", function=matmul, values=_scores),
    Peer(name="compiled matmul", mode="full", function=matmul_compiled, values=_scores),
    Peer(name="chunked", mode="full", function=chunked, values=_streamed),
    Peer(name="split attention", mode="full", function=split_attention, values=_streamed),
]
