"""NCEAverage: memory buffer, scoring, criterion and update in one module, for trainers of the lemniscate family.

In place of ``NCEAverage`` + ``NCECriterion`` (zhirongw/lemniscate.pytorch), of ``NCELossWithMemory``'s inner pair
(facebookresearch/vissl) and of ``RGBMem`` + cross-entropy (HobbitLong/PyContrast).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.models import initial_rows
from sslfast.ops import bank_nce, bank_update_, estimate_z


class NCEAverage(nn.Module):
    """``loss = module(x, y)``: NCE or InfoNCE of ``x`` against the memory, which is then updated with ``x``.

    With ``x_jig``, features of a transformed view (PIRL): ``weight * L(x_jig) + (1 - weight) * L(x)``; the memory
    is updated with ``x`` only. L is the mean over the batch of :func:`sslfast.ops.bank_nce`.

    Buffers: ``memory`` ``[outputSize, inputSize]``, the name in all three projects, ``z`` (NaN until the first batch),
    ``step``. ``load_state_dict`` also takes their checkpoints: it reads ``memory`` and, where there is a ``params``
    vector (K, T, Z, momentum), its Z if positive; the tables of their samplers are ignored.

    Differences from them:

    - ``forward`` returns the loss, not the ``[B, K + 1]`` scores, which are never stored: no criterion is needed.
    - Negatives are uniform Philox draws from (seed, step, y), not alias-table draws from the global generator, and
      one draw serves both views (VISSL: ``separate_draws=True``). ``idx`` gives the rows to use instead.
    - ``exclude_self=True`` leaves a sample's own row out of its negatives; all three include it (the default).
    - Memory starts normalised, as in VISSL and PyContrast; lemniscate's initial rows are only near unit length.
    - The memory is updated in ``forward`` after scoring, in train mode only (lemniscate: in ``backward``); of an index
      that occurs twice the last one counts.
    - lemniscate and VISSL add a small term inside the logarithms of NCE (1e-7, 2**-23), this does not.
    - No host synchronisation, and no assertion on ``y.max()``.

    Args:
        inputSize, outputSize: columns and rows of the memory (``n_dim``, ``n_data``).
        K: negatives per sample. T: temperature. momentum: weight of the OLD row.
        Z: normaliser of NCE. None, or negative as they write it: ``N * mean(exp(s))`` of the first batch, then frozen.
        loss: "nce" or "infonce" (their cross-entropy on the scores).
        weight: λ of ``x_jig``.
        z_from: "all" views of the first batch, or "x_jig" alone (VISSL scores the patches first).
        norm_embedding: L2-normalise the features here (VISSL); else they must be normalised.
        seed: of the initial memory and the draws.
        dtype: of the memory; bf16 or fp16 halves it, sums stay fp32.
    """

    memory: Tensor
    z: Tensor
    step: Tensor

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
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"NCEAverage: weight must be in [0, 1], got {weight=}")
        if z_from not in ("all", "x_jig"):
            raise ValueError(f'NCEAverage: z_from must be "all" or "x_jig", got {z_from!r}')
        self.K, self.T, self.momentum, self.loss, self.weight = K, T, momentum, loss, weight
        self.z_from, self.norm_embedding = z_from, norm_embedding
        self.exclude_self, self.separate_draws, self.seed = exclude_self, separate_draws, seed
        self.register_buffer("memory", initial_rows(outputSize, inputSize, seed=seed, dtype=dtype))
        self._z_is_set = Z is not None and Z > 0
        self.register_buffer("z", torch.tensor(Z if self._z_is_set else float("nan"), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_jig: Tensor | None = None,
        *,
        idx: Tensor | None = None,
        all_x: Tensor | None = None,
        all_y: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch; in train mode then the memory update and the next draw.

        Args:
            x: ``[B, inputSize]`` features. y: ``[B]`` int64 rows of the memory. x_jig: ``[B, inputSize]``.
            idx: ``[B, K + 1]`` int64 rows to score, column 0 the positive (skipped, y is used), or
                ``[2, B, K + 1]``: those of x_jig, those of x.
            all_x, all_y: features and rows of all ranks to update with, gathered by the caller.

        Returns:
            0-d loss, differentiable in x and x_jig.
        """
        views = [view for view in (x_jig, x) if view is not None]
        query = torch.stack([normalize(view, dim=1) if self.norm_embedding else view for view in views])
        if self.loss == "nce" and not self._z_is_set:
            self._set_z(self._score(query.detach(), y, idx, "infonce")[1])
        losses = self._score(query, y, idx, self.loss)[0].mean(dim=1)
        loss = losses[0] if x_jig is None else self.weight * losses[0] + (1 - self.weight) * losses[1]
        if self.training:
            self.step.add_(1)
            if all_x is None:
                self.update_memory(query[-1], y)
            else:
                self.update_memory(
                    normalize(all_x, dim=1) if self.norm_embedding else all_x, y if all_y is None else all_y
                )
        return loss

    @torch.no_grad()
    def update_memory(self, embedding: Tensor, y: Tensor) -> None:
        """``memory[y] = normalize(momentum * memory[y] + (1 - momentum) * embedding)``."""
        bank_update_(self.memory, y, embedding, momentum=self.momentum)

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        return f"memory={list(self.memory.shape)}, K={self.K}, T={self.T}, momentum={self.momentum}, loss={self.loss}"

    def _score(self, query: Tensor, y: Tensor, idx: Tensor | None, loss: Any) -> tuple[Tensor, Tensor]:
        """(losses ``[V, B]``, log-sum-exp of the scores ``[V, B]``)."""
        split = len(query) > 1 and (self.separate_draws if idx is None else idx.dim() == 3)
        parts = []
        for draw, part in enumerate(query.split(1) if split else [query]):
            rows = idx if idx is None or idx.dim() == 2 else idx[draw]
            parts.append(
                bank_nce(
                    part,
                    self.memory,
                    y,
                    temperature=self.T,
                    negatives="sampled" if rows is None else rows[:, 1:].contiguous(),
                    num_negatives=self.K,
                    loss=loss,
                    z=self.z if loss == "nce" else None,
                    exclude_self=self.exclude_self,
                    seed=self.seed + draw,
                    step=self.step,
                    return_lse=True,
                )
            )
        losses, lse = zip(*parts, strict=True)
        return torch.cat(losses), torch.cat(lse)

    @torch.no_grad()
    def _set_z(self, lse: Tensor) -> None:
        used = lse[:1] if self.z_from == "x_jig" else lse
        self.z.copy_(estimate_z(used, num_negatives=self.K, num_rows=len(self.memory)))
        self._z_is_set = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        foreign = prefix + "z" not in state_dict and prefix + "memory" in state_dict
        if foreign:
            params = state_dict.pop(prefix + "params", None)
            known = params is not None and params.numel() == 4 and float(params[2]) > 0
            state_dict[prefix + "z"] = params[2].double() if known else self.z.clone()
            state_dict[prefix + "step"] = self.step.clone()
            for name in [name for name in state_dict if name.startswith(prefix + "multinomial.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._z_is_set = not bool(self.z.isnan())  # host sync: once per load
