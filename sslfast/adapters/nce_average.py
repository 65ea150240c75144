"""NCEAverage: memory buffer, scoring, criterion and update in one module, for trainers of the lemniscate family.

In place of ``NCEAverage`` + ``NCECriterion`` (zhirongw/lemniscate.pytorch, commit f7cfe29), of ``MemoryInsDis`` + a
criterion (HobbitLong/CMC, commit 7b227be) and of ``NCELossWithMemory``'s inner pair (facebookresearch/vissl, commit
09270ed), whose whole is :class:`sslfast.adapters.vissl.NCELossWithMemory`. CMC's class of the same name, for two
modalities, is :class:`sslfast.adapters.cmc.NCEAverage`; PyContrast's memories are in
:mod:`sslfast.adapters.pycontrast`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sslfast.adapters.nce_memory import NCEMemory
from sslfast.distributed import gather_rows


class NCEAverage(NCEMemory):
    """``loss = module(x, y)``: NCE or InfoNCE of ``x`` against the memory, which is then updated with ``x``.

    With ``x_jig``, features of a transformed view (PIRL): ``weight * L(x_jig) + (1 - weight) * L(x)``; the memory
    is updated with ``x`` only. L is the mean over the batch of :func:`sslfast.ops.bank_nce`.

    Before, in lemniscate's trainer, and after::

        loss = criterion(lemniscate(feature, index), index)    # NCEAverage, NCECriterion
        loss = lemniscate(feature, index)                      # this class

    Buffers: ``memory`` ``[outputSize, inputSize]``, the name in all three projects, ``z`` (NaN until the first training
    batch), ``step``. ``load_state_dict`` also takes their checkpoints: it reads ``memory`` and, where there is a
    ``params`` vector (K, T, Z, momentum), its Z if positive; K, T and momentum must be those of this module; the tables
    of VISSL's sampler are ignored.

    Differences from them:

    - ``forward`` returns the loss, not the ``[B, K + 1]`` scores, which are never stored: no criterion is needed.
    - Negatives are uniform Philox draws from (seed, step, y), not alias-table draws from the global generator, and
      one draw serves both views (VISSL: ``separate_draws=True``). ``idx`` gives the rows to use instead.
    - ``exclude_self=True`` leaves a sample's own row out of its negatives; all three include it (the default).
    - Memory starts normalised, as in VISSL; the initial rows of the others are only near unit length.
    - The memory is updated in ``forward`` after scoring, in train mode only (lemniscate: in ``backward``); of an index
      that occurs twice the last one counts. In eval mode no state changes: before Z is frozen, it is measured on each
      batch.
    - lemniscate and VISSL add a small term inside the logarithms of NCE (1e-7, 2**-23), this does not.
    - No host synchronisation, and no assertion on ``y.max()``.
    - A training batch inside a function that ``torch.utils.checkpoint`` recomputes is a RuntimeError in the backward
      pass.

    Features in half types are scored in fp32 and give an fp32 loss; ``.half()``, ``.bfloat16()`` and ``.double()``
    convert the memory alone. First derivatives in reverse mode are computed; others are a RuntimeError.

    Args:
        inputSize, outputSize: columns and rows of the memory; at least 1 and 2.
        K: negatives per sample, at least 1.
        T: temperature, at least 1e-8 and finite.
        momentum: weight of the OLD row, in [0, 1].
        Z: normaliser of NCE. None, or negative as they write it: ``N * mean(exp(s))`` of the first training batch (the
            mean over ranks, as in VISSL), then frozen. lemniscate's own Z is not used there. CMC's sixth argument is
            ``use_softmax``: pass ``loss``.
        loss: "nce" or "infonce" (their cross-entropy on the scores).
        weight: λ of ``x_jig``.
        z_from: "all" views of the first batch, or "x_jig" alone (VISSL scores the patches first).
        norm_embedding: L2-normalise the features here (VISSL); else they must be normalised.
        gather_distributed: update with the batches of all ranks, of one size (VISSL does); else give ``all_x`` and
            ``all_y``, or the memories of the ranks drift apart.
        seed: of the initial memory and the draws.
        dtype: of the memory; bf16 or fp16 halves it, sums stay fp32.

    Raises:
        ValueError: an option out of range.
    """

    memory: Tensor
    z: Tensor

    def __init__(
        self,
        inputSize: int,
        outputSize: int,
        K: int,
        T: float = 0.07,
        momentum: float = 0.5,
        Z: float | None = None,
        *,
        loss: Literal["nce", "infonce"] = "nce",
        weight: float = 0.5,
        z_from: Literal["all", "x_jig"] = "all",
        norm_embedding: bool = False,
        exclude_self: bool = False,
        separate_draws: bool = False,
        gather_distributed: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            inputSize, outputSize, K, T, momentum, Z, loss=loss, norm_embedding=norm_embedding,
            exclude_self=exclude_self, gather_distributed=gather_distributed, seed=seed, dtype=dtype,
        )  # fmt: skip
        if not 0 <= weight <= 1:
            raise ValueError(f"{self._name}: weight must be in [0, 1], got {weight=}")
        if z_from not in ("all", "x_jig"):
            raise ValueError(f'{self._name}: z_from must be "all" or "x_jig", got {z_from!r}')
        self.weight, self.z_from, self.separate_draws = weight, z_from, separate_draws

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_jig: Tensor | None = None,
        all_x: Tensor | None = None,
        all_y: Tensor | None = None,
        *,
        idx: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch; in train mode then the memory update and the next draw.

        Args:
            x: ``[B, inputSize]`` floating features.
            y: ``[B]`` int64 rows of the memory.
            x_jig: ``[B, inputSize]`` or None.
            all_x, all_y: features and rows of all ranks to update with, gathered by the caller; both or none.
            idx: ``[B, K + 1]`` int64 rows to score, column 0 the positive (skipped, y is used), or
                ``[2, B, K + 1]``: those of x_jig, those of x. Third argument in CMC and VISSL, here by keyword.

        Returns:
            0-d loss, differentiable in x and x_jig.

        Raises:
            TypeError: features that are not floating, or fp64 for a memory of less.
            ValueError: a shape, dtype or device.
            RuntimeError: on CPU a row outside the memory (CUDA: a device trap); in train mode, inside a recomputation;
                a second or forward-mode derivative.
        """
        self._check_gathered(all_y, all_x=all_x)
        losses, features, y = self._losses(x, y, x_jig, idx)
        means = losses.mean(dim=1)
        loss = means[0] if x_jig is None else self.weight * means[0] + (1 - self.weight) * means[1]
        self._advance(y, [features], all_y, all_x)
        return loss

    @torch.no_grad()
    def update_memory(self, embedding: Tensor, y: Tensor) -> None:
        """``memory[y] = normalize(momentum * memory[y] + (1 - momentum) * embedding)``."""
        y, (embedding,) = self._prepare(y, embedding=embedding)
        self._update([embedding], y)

    def _losses(self, x: Tensor, y: Tensor, x_jig: Tensor | None, idx: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(losses ``[V, B]`` of x_jig, where given, and x; x as scored; y)."""
        y, views = self._prepare(y, **({"x": x} if x_jig is None else {"x_jig": x_jig, "x": x}))
        self._check_idx(idx, y, draws=len(views))
        query = torch.stack(views)
        split = len(query) > 1 and (self.separate_draws if idx is None else idx.dim() == 3)

        def score(query: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
            parts = [
                self._score(part, y, idx if idx is None or idx.dim() == 2 else idx[draw], z=z, draw=draw)
                for draw, part in enumerate(query.split(1) if split else [query])
            ]
            losses, lse = zip(*parts, strict=True)
            return torch.cat(losses), torch.cat(lse)

        z = self._normaliser(0, lambda: score(query[:1] if self.z_from == "x_jig" else query, None)[1])
        return score(query, z)[0], views[-1], y

    def _losses_in_turn(self, views: list[Tensor], y: Tensor, *, moves: Callable[[int], bool]) -> list[Tensor]:
        """The 0-d loss of each prepared view, each with negatives of its own.

        In train mode the memory moves, with the batches of all ranks, as soon as a view is scored that ``moves`` says;
        then the next draw. Z is from the first view.
        """
        z = self._normaliser(0, lambda: self._score(views[0][None], y, None)[1])
        losses: list[Tensor] = []
        all_y: Tensor | None = None
        for place, view in enumerate(views):
            losses.append(self._score(view[None], y, None, z=z, draw=place)[0].mean())
            if self.training and moves(place):
                all_y = gather_rows(y) if all_y is None else all_y
                self._update([gather_rows(view.detach())], all_y)
        if self.training:
            self._next_draw()
        return losses
