"""Graceful shutdown on SIGTERM and SIGINT: the training loop finishes its step, saves a checkpoint and stops."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class RunInterruptedError(Exception):
    """The run was stopped by a signal and has saved a checkpoint."""


class Interrupts:
    """Context in which the first SIGTERM or SIGINT only sets :attr:`requested`; a second SIGINT stops at once.

    Outside the main thread, where Python accepts no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Loader workers are forked with this handler and get Ctrl-C too: they continue until their owner closes them.
        if os.getpid() != self._owner:
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)
            line = f"sslfast: {self.requested.name}: finishing the step and saving; Ctrl-C stops at once\n"
            # print() may be in the middle of a write; os.write does not re-enter it.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
