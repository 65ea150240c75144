"""NCELossWithMemory: VISSL's loss of NPID, NPID++ and PIRL (facebookresearch/vissl, commit 09270ed,
``vissl/losses/nce_loss.py``), with its configuration, call form and checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sslfast.adapters.checks import check_counts
from sslfast.adapters.nce_average import NCEAverage
from sslfast.distributed import gather_rows

_LOSSES: dict[str, Literal["nce", "infonce"]] = {"nce": "nce", "cross_entropy": "infonce"}


class NCELossWithMemory(nn.Module):
    """``loss = module(output, target)``: ``sum_v loss_weights[v] * L(output[v])`` of the views of a batch.

    L is NCE or InfoNCE against the memory, see :class:`~sslfast.adapters.NCEAverage`. To train VISSL's configurations
    with it, register it in place of VISSL's class before the trainer is built::

        from classy_vision.losses import LOSS_REGISTRY, ClassyLoss
        from sslfast.adapters import NCELossWithMemory

        class Loss(NCELossWithMemory, ClassyLoss):
            pass

        LOSS_REGISTRY["nce_loss_with_memory"] = Loss

    As in VISSL: every view draws negatives of its own from all rows; Z is that of the first view of the first batch,
    the mean over ranks, then frozen, unless ``norm_constant`` is positive; the memory moves to the view
    ``update_mem_with_emb_index``, or with ``update_mem_on_forward`` to every view in turn, as soon as that view is
    scored, with the batches of all ranks, of one size; samples with target ``ignore_index`` take no part.

    State: that of ``nce_average``, an :class:`~sslfast.adapters.NCEAverage`, so the keys of VISSL's checkpoints load.
    Differences from VISSL: those that :class:`~sslfast.adapters.NCEAverage` lists; the loss is 0-d; initial rows are
    drawn from ``seed``, the same on every rank, so none are averaged over ranks at the beginning. It waits for the
    device once a batch, where ignored samples are dropped.

    Args:
        loss_config: VISSL's ``LOSS.nce_loss_with_memory``, a mapping: ``loss_type`` (nce or cross_entropy),
            ``norm_embedding``, ``temperature``, ``loss_weights``, ``norm_constant``, ``update_mem_with_emb_index``,
            ``num_train_samples``, ``negative_sampling_params`` (``num_negatives``, ``type``), ``memory_params``
            (``embedding_dim``, ``momentum``, ``norm_init``, ``update_mem_on_forward``), ``ignore_index`` (default -1).
        seed: of the initial rows and the draws.
        dtype: of the memory.

    Raises:
        ValueError: an entry is missing or out of range.
    """

    def __init__(self, loss_config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        config = _Entries("loss_config", loss_config)
        memory, sampling = config.table("memory_params"), config.table("negative_sampling_params")
        rows = config["num_train_samples"]
        check_counts(type(self).__name__, 2, **{"loss_config.num_train_samples": rows})
        if config["loss_type"] not in _LOSSES:
            raise ValueError(
                f"NCELossWithMemory: loss_config.loss_type must be nce or cross_entropy, got {config['loss_type']!r}"
            )
        if sampling["type"] not in ("random", "debug"):
            raise ValueError(
                "NCELossWithMemory: loss_config.negative_sampling_params.type must be random or debug, "
                f"got {sampling['type']!r}"
            )
        if not memory["norm_init"]:
            raise ValueError("NCELossWithMemory: loss_config.memory_params.norm_init must be True, got False")
        self.loss_config = loss_config
        self.loss_type, self.normalize_embedding = config["loss_type"], bool(config["norm_embedding"])
        self.loss_weights, self.ignore_index = list(config["loss_weights"]), loss_config.get("ignore_index", -1)
        self.update_memory_on_forward = bool(memory["update_mem_on_forward"])
        self.update_memory_emb_index = config["update_mem_with_emb_index"]
        if not self.update_memory_on_forward and not 0 <= self.update_memory_emb_index < len(self.loss_weights):
            raise ValueError(
                "NCELossWithMemory: loss_config.update_mem_with_emb_index must name one of the "
                f"{len(self.loss_weights)} views of loss_weights with memory_params.update_mem_on_forward=False, "
                f"got {self.update_memory_emb_index}"
            )
        self.nce_average = NCEAverage(
            memory["embedding_dim"], rows, sampling["num_negatives"], config["temperature"], memory["momentum"],
            config["norm_constant"], loss=_LOSSES[self.loss_type], norm_embedding=self.normalize_embedding,
            seed=seed, dtype=dtype,
        )  # fmt: skip
        self.nce_average._name = type(self).__name__  # errors name the module that is called

    @classmethod
    def from_config(cls, loss_config: Mapping[str, Any]) -> Self:
        """The module of a configuration."""
        return cls(loss_config)

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss of one batch; in train mode then the memory has moved, and the next batch draws other negatives.

        Args:
            output: ``[B, embedding_dim]`` features, or a list of those of each view.
            target: ``[B]`` int64 rows of the memory, or ``[B, 1]``.

        Returns:
            0-d loss, differentiable once in the output.

        Raises:
            ValueError: more views than ``loss_weights``, or fewer than the one that the memory moves to; no sample
                that is not ignored.
            TypeError, ValueError, RuntimeError: as :meth:`sslfast.adapters.NCEAverage.forward`.
        """
        if not isinstance(output, Tensor | Sequence) or isinstance(output, str):
            raise TypeError(f"{type(self).__name__}: output must be a tensor or a list, got {type(output).__name__}")
        views = [output] if isinstance(output, Tensor) else list(output)
        least = 1 if self.update_memory_on_forward else self.update_memory_emb_index + 1
        if not least <= len(views) <= len(self.loss_weights):
            raise ValueError(
                f"NCELossWithMemory: output must be {least} to {len(self.loss_weights)} views, as loss_weights and "
                f"update_mem_with_emb_index say, got {len(views)}"
            )
        named = {f"output[{place}]": view for place, view in enumerate(views)}
        target = self._checked("target", target, **named)
        kept = target != self.ignore_index
        rows, features = self.nce_average._prepare(target[kept], **{name: view[kept] for name, view in named.items()})
        losses = self.nce_average._losses_in_turn(features, rows, moves=self._moves)
        return torch.stack([weight * loss for weight, loss in zip(self.loss_weights, losses, strict=False)]).sum()

    def update_memory(self, embedding: Tensor, y: Tensor) -> None:
        """``memory[y] = normalize(momentum * memory[y] + (1 - momentum) * embedding)``, with those of all ranks."""
        y = self._checked("y", y, embedding=embedding)
        self.nce_average.update_memory(gather_rows(embedding.detach()), gather_rows(y))

    def extra_repr(self) -> str:
        """Options shown by ``print(module)``."""
        return (
            f"loss_type={self.loss_type}, loss_weights={self.loss_weights}, "
            f"update_emb_index={self.update_memory_emb_index}"
        )

    def _checked(self, name: str, rows: Any, **views: Any) -> Tensor:
        """The rows as ``[B]``; raises unless there is one for each sample of the views."""
        flat = rows.flatten() if isinstance(rows, Tensor) else rows
        self.nce_average._check_batch(name, flat, views)
        assert isinstance(flat, Tensor)
        return flat

    def _moves(self, place: int) -> bool:
        """Whether the memory moves to the view of this number."""
        return self.update_memory_on_forward or place == self.update_memory_emb_index


class _Entries:
    """Entries of a table; ValueError with its name for a missing one."""

    def __init__(self, name: str, table: Any) -> None:
        if not isinstance(table, Mapping):
            raise ValueError(f"NCELossWithMemory: {name} must be a mapping, got {type(table).__name__}")
        self.name, self.entries = name, table

    def __getitem__(self, key: str) -> Any:
        if key not in self.entries:
            raise ValueError(f"NCELossWithMemory: {self.name}.{key} is missing; give it, as VISSL's defaults.yaml does")
        return self.entries[key]

    def table(self, key: str) -> "_Entries":
        """A table inside."""
        return _Entries(f"{self.name}.{key}", self[key])
