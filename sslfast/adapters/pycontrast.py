"""PyContrast's memories RGBMem and CMCMem (HobbitLong/PyContrast, commit 84f94ea, ``pycontrast/memory/mem_bank.py``).

They are called, and their results are used, as in PyContrast: with cross-entropy and label 0. The logits have 2 columns
in place of K + 1: the score of the positive, and the log-sum-exp of the scores of the K negatives, which never exist as
a tensor. Cross-entropy and its gradient are the same; the accuracy counts a sample where the positive outweighs all
negatives together, so it is lower.
"""

import torch
from torch import Tensor

from sslfast.adapters.nce_memory import NCEMemory


class _InfoNCEMemory(NCEMemory):
    """The options that PyContrast's memories have in common."""

    def __init__(
        self,
        n_dim: int,
        n_data: int,
        K: int = 65536,
        T: float = 0.07,
        m: float = 0.5,
        *,
        exclude_self: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            n_dim, n_data, K, T, m, None, loss="infonce", norm_embedding=False, exclude_self=exclude_self,
            gather_distributed=False, seed=seed, dtype=dtype,
        )  # fmt: skip


class RGBMem(_InfoNCEMemory):
    """``logits, labels = module(x, y)``: x against one memory, which is then updated with x (Wu et al. 2018; with
    ``x_jig`` PIRL's two losses)::

        contrast = RGBMem(opt.feat_dim, n_data, opt.nce_k, opt.nce_t, opt.nce_m)
        *logits, labels = contrast(f, index, f_jig, all_f, all_index)
        losses = [cross_entropy(logit, labels) for logit in logits]

    Buffers: ``memory`` ``[n_data, n_dim]``, as in PyContrast, whose checkpoints load, ``z`` (not used), ``step``.

    Differences from PyContrast: the 2 columns above; negatives are Philox draws from (seed, step, y); the memory is
    updated in train mode only, of an index that occurs twice with the last one; every device, no ``.cuda()`` inside. A
    training batch inside a function that ``torch.utils.checkpoint`` recomputes is a RuntimeError in the backward pass.

    Args:
        n_dim, n_data: columns and rows of the memory, at least 1 and 2.
        K: negatives per sample, at least 1.
        T: temperature, at least 1e-8 and finite.
        m: weight of the OLD row, in [0, 1].
        exclude_self: leave a sample's own row out of its negatives; PyContrast includes it.
        seed: of the initial rows and the draws.
        dtype: of the memory; bf16 or fp16 halves it, sums stay fp32.

    Raises:
        ValueError: an option out of range.
    """

    memory: Tensor

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_jig: Tensor | None = None,
        all_x: Tensor | None = None,
        all_y: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits of one batch; in train mode then the memory update and the next draw.

        Args:
            x, x_jig: ``[B, n_dim]`` floating features, normalised.
            y: ``[B]`` int64 rows of the memory.
            all_x, all_y: features and rows of all ranks to update with, gathered by the caller; both or none.

        Returns:
            ``(logits, labels)`` or ``(logits, logits_jig, labels)``: fp32 ``[B, 2]`` (fp64 for fp64), int64 ``[B]`` 0.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`sslfast.adapters.NCEAverage.forward`.
        """
        self._check_gathered(all_y, all_x=all_x)
        y, views = self._prepare(y, **({"x": x} if x_jig is None else {"x": x, "x_jig": x_jig}))
        logits = _two_columns(*self._score(torch.stack(views), y, None))
        self._advance(y, views[:1], all_y, all_x)
        return (*logits, torch.zeros_like(y))


class CMCMem(_InfoNCEMemory):
    """``logits1, logits2, labels = module(x1, x2, y)``: x1 against the memory of modality 2 and the reverse.

    Buffers ``memory_1``, ``memory_2``, whose names are PyContrast's, ``z_1``, ``z_2`` (not used), ``step``. Arguments
    and differences: see :class:`RGBMem`.
    """

    _memories = ("memory_1", "memory_2")
    _normalisers = ("z_2", "z_1")

    memory_1: Tensor
    memory_2: Tensor

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        y: Tensor,
        x1_jig: Tensor | None = None,
        x2_jig: Tensor | None = None,
        all_x1: Tensor | None = None,
        all_x2: Tensor | None = None,
        all_y: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits of one batch; in train mode then the update of both memories and the next draw.

        Args:
            x1, x2, x1_jig, x2_jig: ``[B, n_dim]`` floating features of the two modalities; both of the latter or none.
            y: ``[B]`` int64 rows of the memories.
            all_x1, all_x2, all_y: of all ranks, to update with, gathered by the caller; all or none.

        Returns:
            ``(logits1, logits2, labels)`` or ``(logits1, logits2, logits1_jig, logits2_jig, labels)``, see
            :class:`RGBMem`.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`sslfast.adapters.NCEAverage.forward`.
        """
        if (x1_jig is None) != (x2_jig is None):
            raise ValueError("CMCMem: give x1_jig and x2_jig together, or none of them")
        self._check_gathered(all_y, all_x1=all_x1, all_x2=all_x2)
        given = {"x1": x1, "x2": x2, "x1_jig": x1_jig, "x2_jig": x2_jig}
        y, views = self._prepare(y, **{name: x for name, x in given.items() if x is not None})
        first, second = (torch.stack(views[place::2]) for place in (0, 1))
        logits = [_two_columns(*scored) for scored in self._score_crosswise(first, second, y, None)]
        self._advance(y, views[:2], all_y, all_x1, all_x2)
        return (*(view for pair in zip(*logits, strict=True) for view in pair), torch.zeros_like(y))


def _two_columns(losses: Tensor, lse: Tensor) -> Tensor:
    """``[V, B]`` InfoNCE losses and log-sum-exps as logits ``[V, B, 2]`` of the same cross-entropy and gradient.

    ``loss = log(1 + exp(d))`` with d the log-sum-exp of the negatives less the positive, so ``d = log(exp(loss) - 1)``.
    Only d carries the gradient: cross-entropy depends on it alone.
    """
    losses = losses.clamp_min(1e-30)  # a loss rounded to 0 keeps a finite logit
    margin = losses + (-torch.expm1(-losses)).log()
    positive = (lse - losses).detach()
    return torch.stack((positive, positive + margin), dim=-1)
