"""Signals that stop a run, and the exception of a run that has stopped so."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from sslfast.data import STOP_SIGNALS

_Handler = Callable[[int, FrameType | None], None]


class RunInterruptedError(Exception):
    """The run was stopped by a signal, after saving a checkpoint if there was anything to save."""


class GracefulShutdown:
    """Context in which the first stop signal only sets :attr:`requested`; a second SIGINT raises at once.

    Stop signals are SIGTERM and SIGINT, SIGHUP (the terminal or the connection is gone), SIGUSR1 and SIGUSR2 (Slurm's
    ``--signal``), SIGXCPU (a batch system's limit). All but the first two only where nobody handles them otherwise: a
    program under ``nohup`` ignores SIGHUP.

    The training loop reads :attr:`requested` before every step and while it waits. Outside the main thread, where
    Python accepts no signal handlers, the context changes nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "GracefulShutdown":
        self._previous = _install(STOP_SIGNALS, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _restore(self._previous)

    def is_requested(self) -> bool:
        """Whether a stop signal has arrived."""
        return self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Forked processes inherit this handler: they run until their owner ends them.
        if os.getpid() != self._owner:
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)
            line = f"sslfast: {self.requested.name}: finishing the step and saving; Ctrl-C stops at once\n"
            # A handler may run inside print(), which is not reentrant; os.write is. Nobody may be there to read.
            with suppress(OSError, ValueError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Context of what comes before the first step: SIGINT raises KeyboardInterrupt, other stop signals
    RunInterruptedError."""
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise RunInterruptedError(
                f"stopped by {signal.Signals(number).name} before the first step, nothing was to be saved; "
                "the same command starts again"
            )

    previous = _install([number for number in STOP_SIGNALS if number != signal.SIGINT], stop)
    try:
        yield
    finally:
        _restore(previous)


def _install(numbers: "list[signal.Signals] | tuple[signal.Signals, ...]", handler: _Handler) -> dict[Any, Any]:
    """Handle signals from now on; what handled them before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers if _is_ours(number)}


def _restore(previous: dict[Any, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)


def _is_ours(number: signal.Signals) -> bool:
    if number in (signal.SIGTERM, signal.SIGINT):
        return True
    handler = signal.getsignal(number)
    # torchrun hands SIGHUP on although nohup has it ignored, and kills what is still there after 30 seconds.
    is_torchrun = number == signal.SIGHUP and "TORCHELASTIC_RUN_ID" in os.environ
    return handler == signal.SIG_DFL or (handler == signal.SIG_IGN and is_torchrun)
