"""CMC's NCEAverage: two modalities, each scored against the other's memory (HobbitLong/CMC, commit 7b227be)."""

import torch
from torch import Tensor

from sslfast.adapters.nce_memory import NCEMemory


class NCEAverage(NCEMemory):
    """``loss_l, loss_ab = module(l, ab, y)``: l against the memory of ab and ab against that of l (Tian et al. 2020,
    section 3.2), then both memories are updated.

    Before, in CMC's ``train_CMC.py``, and after::

        out_l, out_ab = contrast(feat_l, feat_ab, index)
        loss = criterion_l(out_l) + criterion_ab(out_ab)       # NCESoftmaxLoss or NCECriterion
        loss_l, loss_ab = contrast(feat_l, feat_ab, index)     # this class
        loss = loss_l + loss_ab

    ``use_softmax=True`` is InfoNCE (NCESoftmaxLoss), False is NCE (NCECriterion) with one normaliser for each
    modality. One draw of negatives serves both.

    Buffers: ``memory_l``, ``memory_ab`` ``[outputSize, inputSize]``, ``z_l``, ``z_ab`` (NaN until the first training
    batch), ``step``. ``load_state_dict`` also takes CMC's checkpoints (``params``, ``memory_l``, ``memory_ab``).

    Differences from CMC: losses are returned and the ``[B, K + 1, 1]`` scores never stored, so the trainer's
    ``out_l[:, 0].mean()`` for its log goes; otherwise those that :class:`sslfast.adapters.NCEAverage` lists: draws,
    update in train mode only, no 1e-7 inside the logarithms, initial rows of unit length.

    Args:
        inputSize, outputSize, K, T, momentum: as in :class:`sslfast.adapters.NCEAverage`.
        use_softmax: see above.
        exclude_self, gather_distributed, seed, dtype: as there.

    Raises:
        ValueError: an option out of range.
    """

    _memories = ("memory_l", "memory_ab")
    _normalisers = ("z_ab", "z_l")  # by the memory that is scored: that of l by ab
    _params = ("K", "T", "Z_l", "Z_ab", "momentum")

    memory_l: Tensor
    memory_ab: Tensor
    z_l: Tensor
    z_ab: Tensor

    def __init__(
        self,
        inputSize: int,
        outputSize: int,
        K: int,
        T: float = 0.07,
        momentum: float = 0.5,
        use_softmax: bool = False,
        *,
        exclude_self: bool = False,
        gather_distributed: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            inputSize, outputSize, K, T, momentum, None, loss="infonce" if use_softmax else "nce",
            norm_embedding=False, exclude_self=exclude_self, gather_distributed=gather_distributed, seed=seed,
            dtype=dtype,
        )  # fmt: skip
        self.use_softmax = use_softmax

    def forward(self, l: Tensor, ab: Tensor, y: Tensor, idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The losses of one batch; in train mode then the update of both memories and the next draw.

        Args:
            l, ab: ``[B, inputSize]`` floating features, normalised.
            y: ``[B]`` int64 rows of the memories.
            idx: ``[B, K + 1]`` int64 rows to score, column 0 the positive (skipped, y is used). None: drawn.

        Returns:
            ``(loss_l, loss_ab)``, 0-d, means over the batch.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`sslfast.adapters.NCEAverage.forward`.
        """
        y, (of_l, of_ab) = self._prepare(y, l=l, ab=ab)
        self._check_idx(idx, y)
        (losses_l, _), (losses_ab, _) = self._score_crosswise(of_l[None], of_ab[None], y, idx)
        self._advance(y, [of_l, of_ab])
        return losses_l.mean(), losses_ab.mean()
