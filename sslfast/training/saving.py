"""The checkpoints of a run: which store, what it gets, what happens where a write fails."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.distributed import split_evenly, world_size
from sslfast.methods import Method
from sslfast.runs import (
    CheckpointStore,
    CheckpointWriteError,
    HashedFileStore,
    RunDirectory,
    ShardedStore,
    SplitCheckpointStore,
    prune,
    restored,
    stored_bytes,
)
from sslfast.training.config import TrainConfig

_GATHERED_BYTES = 1 << 32
"""Up to this size, rank 0 writes checkpoints alone with ``checkpoint_store=auto``."""


def choose_store(config: TrainConfig, size: int) -> tuple[Literal["file", "sharded"], str]:
    """The kind of checkpoints that a run writes, and why, in words.

    Args:
        config: of the run.
        size: of a whole checkpoint, bytes.
    """
    if config.checkpoint_store != "auto":
        return config.checkpoint_store, "as asked for"
    ranks, limit = world_size(), _GATHERED_BYTES / 1e9
    if ranks == 1:
        return "file", "one process"
    if size <= _GATHERED_BYTES:
        return "file", f"{size / 1e9:.2f} GB, at most {limit:.1f} GB"
    return "sharded", f"{size / 1e9:.2f} GB, more than {limit:.1f} GB, and {ranks} processes"


class Saver:
    """Writes the checkpoints of a run.

    Args:
        config: of the run.
        run: its directory, which may be moved meanwhile.
        open_store: the store in a directory; None: the one that ``config.checkpoint_store`` says.
        report: receives single lines for the user.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        open_store: Callable[[Path], CheckpointStore] | None,
        *,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.run, self.report = config, run, report
        self._place, self._is_chosen = run.path, open_store is not None
        self.open_store = open_store or HashedFileStore  # either of ours reads both kinds
        self.store = self.open_store(run.checkpoints)
        self.kind = "of another store"
        """Of checkpoints, in words."""

    def choose(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        """Choose the store by the size of the state, which is known by now."""
        self._method, self._optimizer = method, optimizer
        if self._is_chosen:
            return
        kind, why = choose_store(self.config, self.checkpoint_bytes())
        self.kind = f"{'a file a process' if kind == 'sharded' else 'one file each'} ({why})"
        if kind == "sharded":
            self.open_store = ShardedStore
            self.store = self.open_store(self.run.checkpoints)
            if self.config.checkpoint_store == "auto":
                self.report(f"checkpoints: {self.kind}; --checkpoint-store file writes one file each")

    def state(self) -> dict[str, Any]:
        """State of method and optimizer, as the store takes it. Every rank calls it."""
        if isinstance(self.store, SplitCheckpointStore):
            return {"method": self._method.own_state_dict(), "optimizer": _split(self._optimizer.state_dict())}
        return {"method": self._method.full_state_dict(), "optimizer": self._optimizer.state_dict()}

    def restored(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """States of method and optimizer in a checkpoint for their ``load_state_dict``: what both have is read into the
        tensors that are there."""
        rows = {name: first for name, (first, _) in self._method.split_rows().items()}
        method = restored(state["method"], self._method.state_dict(), rows)
        return method, restored(state["optimizer"], self._optimizer.state_dict())

    def follow(self) -> None:
        """Go on where the run directory is now. Every rank calls it."""
        if (place := self.run.follow_together()) != self._place:
            self.report(f"{self._place} is now {place}; the run goes on there")
            self._place, self.store = place, self.open_store(self.run.checkpoints)

    def save(self, state: dict[str, Any], step: int, *, must: bool) -> Path:
        """Write a checkpoint, or begin to, and delete old ones. Every rank calls it.

        Args:
            state: :meth:`state` and more.
            step: finished steps.
            must: be written when this returns, or raise; else a failure is a line, and training continues.

        Raises:
            CheckpointWriteError: it ``must`` be and is not.
        """
        store = self.store
        try:
            if isinstance(store, SplitCheckpointStore) and not must:
                self._prune()  # the one before is complete
                store.start(state, step)
                return store.path(step)
            store.save(state, step)
        except CheckpointWriteError as error:
            last = self.last()
            line = f"{error}; {'there is none before it' if last is None else f'the last good one is {last.name}'}"
            if must:
                raise CheckpointWriteError(line) from None
            self.report(f"{line}; {self._continues()}")
        else:
            self._prune()
        return store.path(step)

    def _continues(self) -> str:
        return f"training continues, the next one is due in {self.config.checkpoint_every_steps} steps"

    def _prune(self) -> None:
        config = self.config
        prune(self.store, keep=config.keep_checkpoints, keep_every_steps=config.keep_every_steps, report=self.report)

    def settle(self, *, wait: bool) -> None:
        """Say where a write that :meth:`save` began has failed; exchanges nothing with other ranks.

        Args:
            wait: for one that is under way.
        """
        if isinstance(self.store, SplitCheckpointStore) and (wait or self.store.has_failed()):
            try:
                self.store.finish()
            except CheckpointWriteError as error:
                self.report(f"{error}; {self._continues()}")

    def last(self) -> Path | None:
        """The newest checkpoint; waits for one that is being written."""
        self.settle(wait=True)
        with suppress(OSError):  # the disk may answer nothing now
            return next((self.store.path(step) for step in reversed(self.store.list())), None)
        return None

    def check_space(self, total_steps: int) -> None:
        """Raises ValueError unless the checkpoints of the whole run fit on the disk."""
        self.run.check_space(self.disk_bytes(total_steps) - stored_bytes(self.store))

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: the method's state and the optimizer's."""
        state = [v for values in self._optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        return self._method.full_state_bytes() + sum(tensor.nbytes for tensor in state)

    def disk_bytes(self, total_steps: int) -> int:
        """Largest disk space that the checkpoints of a run of so many steps occupy at a time."""
        config = self.config
        kept = min(config.keep_checkpoints, math.ceil(total_steps / config.checkpoint_every_steps)) + 1
        permanent = total_steps // config.keep_every_steps if config.keep_every_steps else 0
        return (kept + permanent) * self.checkpoint_bytes()


def _split(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with large tensors split: they are equal on all ranks, as the parameters are."""
    moments = {
        number: {name: split_evenly(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
