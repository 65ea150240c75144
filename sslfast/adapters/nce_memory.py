"""What the adapters of per-sample memories share: buffers, normaliser, scoring, update, checkpoints of the owners."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.adapters.checks import check_counts, check_features, check_precision, check_temperature
from sslfast.distributed import gather_rows, mean_over_ranks
from sslfast.models import first_derivative_only, initial_rows, snapshot
from sslfast.ops import bank_nce, bank_update_, estimate_z

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NCEMemory(nn.Module):
    """One memory, or one for each of two modalities: ``[rows, columns]``, a row for each sample of the data set.

    A subclass names its buffers as the owner's class does, so that the owner's checkpoints load. ``step`` counts the
    training batches and fixes the draw of negatives; a normaliser is fp64 whatever ``.half()`` and its like do to the
    memories: it leaves their range.
    """

    _memories: ClassVar[tuple[str, ...]] = ("memory",)
    _normalisers: ClassVar[tuple[str, ...]] = ("z",)
    _params: ClassVar[tuple[str, ...]] = ("K", "T", "Z", "momentum")
    """Entries of the vector ``params`` in the owner's checkpoints."""

    step: Tensor

    def __init__(
        self,
        columns: int,
        rows: int,
        K: int,
        T: float,
        momentum: float,
        Z: float | None,
        *,
        loss: Literal["nce", "infonce"],
        norm_embedding: bool,
        exclude_self: bool,
        gather_distributed: bool,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        name = self._name = type(self).__name__
        check_counts(name, 1, **{"columns of the memory": columns, "K (negatives)": K})
        check_counts(name, 2, **{"rows of the memory": rows})
        check_temperature(name, T)
        if not 0 <= momentum <= 1:
            raise ValueError(f"{name}: momentum must be in [0, 1], got {momentum=}")
        if loss not in ("nce", "infonce"):
            raise ValueError(f'{name}: loss must be "nce" or "infonce", got {loss!r}')
        if isinstance(Z, bool):
            loss = "infonce" if Z else "nce"
            raise ValueError(f"{name}: Z must be a number or None, got {Z}; for use_softmax={Z} pass {loss=!r}")
        if Z is not None and not (Z < 0 or 0 < Z < math.inf):
            raise ValueError(f"{name}: Z must be positive and finite, or None: measured on the first batch, got {Z=}")
        if dtype not in _DTYPES:
            raise ValueError(f"{name}: dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        self.K, self.T, self.momentum, self.loss = K, T, momentum, loss
        self.norm_embedding, self.exclude_self, self.seed = norm_embedding, exclude_self, seed
        self.gather_distributed = gather_distributed
        for place, memory in enumerate(self._memories):
            self.register_buffer(memory, initial_rows(rows, columns, seed=seed, dtype=dtype, first_row=place * rows))
        self._z_is_set = Z is not None and Z > 0
        for normaliser in self._normalisers:
            self.register_buffer(normaliser, torch.tensor(Z if self._z_is_set else math.nan, dtype=torch.float64))
        self._looked_at: tuple[Tensor, ...] = ()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        memory = getattr(self, self._memories[0])
        return f"memory={list(memory.shape)}, K={self.K}, T={self.T}, momentum={self.momentum}, loss={self.loss}"

    def _prepare(self, y: Tensor, **views: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Checked rows, and views in the precision that they are scored in, normalised if asked for."""
        self._check_batch("y", y, views)
        # Scored once in training, where the memory changes: a second run would score others.
        y = snapshot(y, self._name, once=self.training)
        return y, [self._ready(view) for view in views.values()]

    def _ready(self, view: Tensor) -> Tensor:
        view = view.to(torch.float64 if getattr(self, self._memories[0]).dtype == torch.float64 else torch.float32)
        return normalize(view, dim=1) if self.norm_embedding else view

    def _check_batch(self, name: str, rows: Any, features: Mapping[str, Any]) -> None:
        """Raises unless the features fit the memory, and there is a row of it for each sample of them."""
        memory = getattr(self, self._memories[0])
        check_features(self._name, memory.shape[1], memory.device, **features)
        check_precision(self._name, memory, *features.values())
        self._check_rows(name, rows, features)

    def _check_rows(
        self, name: str, rows: Any, samples: Mapping[str, Tensor], shape: tuple[int, ...] | None = None
    ) -> None:
        """Rows of ``shape``, by default one for each of the ``samples``, of which the first is named."""
        like, first = next(iter(samples.items()))
        shape = (len(first),) if shape is None else shape
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.shape != shape:
            received = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"{self._name}: {name} must be int64 rows of the memory, {list(shape)}, got {received}; "
                f"{like} has {list(first.shape)}"
            )

    def _check_idx(self, idx: Tensor | None, y: Tensor, *, draws: int = 1) -> None:
        """``[B, K + 1]``, or for several draws ``[draws, B, K + 1]``."""
        if idx is not None:
            leading = (draws,) if draws > 1 and isinstance(idx, Tensor) and idx.dim() == 3 else ()
            self._check_rows("idx", idx, {"y": y}, (*leading, len(y), self.K + 1))

    def _score(
        self, query: Tensor, y: Tensor, rows: Tensor | None, *, memory: int = 0, z: Tensor | None = None, draw: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(losses ``[V, B]``, log-sum-exp of the scores ``[V, B]``) of ``[V, B, columns]``; NCE if z is given."""
        scored = bank_nce(
            first_derivative_only(query, self._name),
            getattr(self, self._memories[memory]),
            y,
            temperature=self.T,
            negatives="sampled" if rows is None else rows[:, 1:].contiguous(),
            num_negatives=self.K,
            loss="infonce" if z is None else "nce",
            z=z,
            exclude_self=self.exclude_self,
            seed=self.seed + draw,
            step=self.step,
            return_lse=True,
        )
        assert isinstance(scored, tuple)
        return scored

    def _score_crosswise(self, first: Tensor, second: Tensor, y: Tensor, rows: Tensor | None) -> list[Any]:
        """:meth:`_score` of queries of the first modality against the memory of the second, and the reverse."""

        def score(query: Tensor, memory: int) -> tuple[Tensor, Tensor]:
            z = self._normaliser(memory, lambda: self._score(query, y, rows, memory=memory)[1])
            return self._score(query, y, rows, memory=memory, z=z)

        return [score(first, 1), score(second, 0)]

    def _normaliser(self, place: int, scores: Callable[[], Tensor]) -> Tensor | None:
        """Z for NCE: frozen at the first training batch, from its log-sum-exps (of all ranks); None for InfoNCE."""
        if self.loss == "infonce":
            return None
        z: Tensor = getattr(self, self._normalisers[place])
        if self._has_normaliser():
            return z
        with torch.no_grad():
            rows = len(getattr(self, self._memories[place]))
            estimate = estimate_z(scores(), num_negatives=self.K, num_rows=rows)
            if not self.training:
                return estimate
            return z.copy_(mean_over_ranks(estimate))

    def _has_normaliser(self) -> bool:
        """Whether Z is set, in the buffers that the module has now: torch.func.functional_call lends it others."""
        if not torch.compiler.is_compiling():
            buffers = tuple(getattr(self, name) for name in self._normalisers)
            if len(self._looked_at) != len(buffers) or any(map(operator.is_not, self._looked_at, buffers)):
                self._looked_at = buffers
                self._z_is_set = not any(bool(z.isnan()) for z in buffers)  # host sync: once for each set of buffers
        return self._z_is_set

    def _check_gathered(self, all_y: Tensor | None, **all_features: Tensor | None) -> None:
        """What the caller gathered from all ranks; before anything is scored, so that an error changes no state."""
        given = {name: x for name, x in all_features.items() if x is not None}
        if len(given) not in (0, len(all_features)) or (all_y is None) != (not given):
            raise ValueError(
                f"{self._name}: give the features and the rows (all_y) of all ranks together, or none of them; got "
                f"{', '.join([*given, *(['all_y'] if all_y is not None else [])])}"
            )
        if given:
            self._check_batch("all_y", all_y, given)

    @torch.no_grad()
    def _advance(
        self, y: Tensor, features: list[Tensor], all_y: Tensor | None = None, *all_features: Tensor | None
    ) -> None:
        """In train mode: the memories updated with the features, or with those of all ranks, and the next draw."""
        if not self.training:
            return
        if all_y is not None:
            features, y = [self._ready(x) for x in all_features if x is not None], all_y
        elif self.gather_distributed:
            features, y = [gather_rows(x) for x in features], gather_rows(y)
        self._update(features, y)
        self._next_draw()

    def _next_draw(self) -> None:
        """Behind a training batch: the next one draws other negatives, and Z stays."""
        if self.loss == "nce" and not self._z_is_set:
            self._z_is_set = True
        self.step.add_(1)

    @torch.no_grad()
    def _update(self, features: list[Tensor], y: Tensor) -> None:
        for memory, x in zip(self._memories, features, strict=True):
            bank_update_(getattr(self, memory), y, x, momentum=self.momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NCEMemory":
        before = {name: getattr(self, name) for name in self._normalisers}
        super()._apply(fn, recurse)
        for name, z in before.items():
            moved = getattr(self, name)
            if moved.dtype != z.dtype:
                setattr(self, name, z.to(moved.device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: Any, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        own = prefix + "step" in state_dict
        if not own and prefix + self._memories[0] in state_dict:  # the owner's
            params = state_dict.pop(prefix + "params", None)
            known = {} if params is None or params.numel() != len(self._params) else dict(
                zip(self._params, params.double().tolist(), strict=True)
            )  # fmt: skip
            for option in ("K", "T", "momentum"):
                value = getattr(self, option)
                if option in known and not math.isclose(known[option], value, rel_tol=1e-5):
                    errors.append(
                        f"{self._name}: the checkpoint has {option}={known[option]:g} and the module "
                        f"{option}={value:g}: build it with that of the checkpoint, or delete params there"
                    )
            for name in self._normalisers:
                z = known.get("Z" + name[1:], -1.0)
                buffer = getattr(self, name)
                state_dict[prefix + name] = buffer.new_tensor(z) if z > 0 else buffer.clone()
            state_dict[prefix + "step"] = self.step.clone()
            for name in [name for name in state_dict if name.startswith(prefix + "multinomial.")]:
                del state_dict[name]  # tables of the sampler
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        # host sync: once per load
        self._z_is_set = not any(bool(getattr(self, name).isnan()) for name in self._normalisers)
