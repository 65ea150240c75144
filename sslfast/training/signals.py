"""Graceful shutdown on SIGTERM and SIGINT, and the exception of a run that has stopped so."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class RunInterruptedError(Exception):
    """The run was stopped by a signal, after saving a checkpoint."""


class GracefulShutdown:
    """Context in which the first SIGTERM or SIGINT only sets :attr:`requested`; a second SIGINT raises at once.

    The training loop reads :attr:`requested` after every step. Outside the main thread, where Python accepts no signal
    handlers, the context changes nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "GracefulShutdown":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Forked loader workers inherit this handler and receive Ctrl-C too: they run until their owner closes them.
        if os.getpid() != self._owner:
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)
            line = f"sslfast: {self.requested.name}: finishing the step and saving; Ctrl-C stops at once\n"
            # A handler may run inside print(), which is not reentrant; os.write is.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
