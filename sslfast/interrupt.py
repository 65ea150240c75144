"""SIGTERM and SIGINT as a wish that the training loop grants after the step it is in, and how a run may end."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_NOT_FINITE = 3
"""Exit code of a run whose loss became infinite or not a number."""
EXIT_INTERRUPTED = 75
"""Exit code of a run that saved a checkpoint on SIGTERM or SIGINT and can be resumed (EX_TEMPFAIL: try again)."""
EXIT_CODES = """\
exit codes:
  0    done
  1    unexpected failure, with a traceback
  2    wrong usage, configuration or data: one line with the remedy (SSLFAST_TRACEBACK=1 shows where)
  3    the loss became infinite or not a number
  75   stopped by SIGTERM or SIGINT with a checkpoint saved: the same command goes on from there
  130  stopped at once by a second SIGINT (Ctrl-C)"""


class RunInterruptedError(Exception):
    """A run that was asked to stop, and has saved a checkpoint."""


class Interrupts:
    """Context in which the first SIGTERM or SIGINT only sets :attr:`requested`; a second SIGINT stops at once.

    Outside the main thread, where Python takes no signal handlers, it changes nothing.
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
        # Loader workers are forked with this handler and get Ctrl-C too: they go on until their owner closes them.
        if os.getpid() != self._owner:
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = signal.Signals(number)
            line = f"sslfast: {self.requested.name}: finishing the step and saving; Ctrl-C stops at once\n"
            # print() may be in the middle of a write of its own; a plain write cannot re-enter it.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
