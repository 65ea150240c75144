"""The end of a run between two steps: all ranks agree on it, so that all save the same state."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import NoReturn

import torch

from sslfast import distributed
from sslfast.data import LostBatchError
from sslfast.runs import CheckpointWriteError
from sslfast.training.signals import GracefulShutdown, RunInterruptedError


@dataclass(frozen=True)
class Stop:
    """Why the training loop ends before its last step: a signal, else an error of the loader."""

    signal: Signals | None
    error: Exception | None

    def leave(self, save: Callable[[], Path], *, done: str, is_new: bool) -> NoReturn:
        """Save the state and raise.

        Args:
            save: saves it, and returns where.
            done: steps, in words.
            is_new: whether there is anything to save after an error.

        Raises:
            RunInterruptedError: after a signal.
            Exception: the loader's error, which also says what was saved.
        """
        if self.error is not None and not is_new:
            raise self.error
        try:
            saved = f"saved {save()}; the same command resumes from there"
        except CheckpointWriteError as problem:
            raise problem if self.error is None else CheckpointWriteError(f"{self.error}; {problem}") from None
        if self.signal is not None:
            raise RunInterruptedError(f"stopped by {self.signal.name} after {done}, {saved}")
        assert self.error is not None
        if type(self.error) in (LostBatchError, ValueError):
            raise type(self.error)(f"{self.error}; after {done} {saved}") from None
        self.error.add_note(f"after {done} {saved}")
        raise self.error


def agree(shutdown: GracefulShutdown, error: Exception | None = None) -> Stop | None:
    """Whether any rank has received a signal or has no batch; the same on every rank.

    Called before every step, with the batch in hand: a rank that waits for its batch keeps the others here, where their
    state is whole, and not in the middle of a step.

    Args:
        shutdown: of this rank.
        error: what this rank's loader raised.
    """
    own = torch.tensor(int(error is not None or shutdown.is_requested()))  # on the host: waits for no device
    if not int(distributed.max_over_ranks(own)):
        return None
    line = None if error is None else f"{error or type(error).__name__}"
    found = distributed.gather_objects((shutdown.requested, line))
    number = next((requested for requested, _ in found if requested is not None), None)
    if number is not None or error is not None:
        return Stop(number, None if number is not None else error)
    rank, text = next((rank, text) for rank, (_, text) in enumerate(found) if text is not None)
    return Stop(None, LostBatchError(f"rank {rank}: {text}"))
