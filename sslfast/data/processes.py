"""What every worker process needs: a quiet start, no signals of the terminal, an end together with its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection

from sslfast.data.waiting import LostBatchError

STOP_SIGNALS = tuple(
    signal.Signals(number)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if (number := getattr(signal, name, None)) is not None
)
"""Signals by which a user, a terminal or a scheduler stops a run: the main process handles them, workers never."""

_PR_SET_PDEATHSIG = 1
_NO_GUARD = 79  # exit code of a worker that ran the script that was starting it


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that arrive in this block wait until its end, in a process started here until :func:`ignore_signals`.

    A new process is not interrupted before it can ignore them, which would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(numbers: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
    """In a worker process: leave the signals to the process that started it."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def exit_with_parent(*, started_by_main_thread: bool = False) -> None:
    """In a worker process: exit as soon as the process that started it is gone.

    A killed main process collects no results, and its workers would wait for their next task forever.

    Args:
        started_by_main_thread: the kernel may kill this process too, even where it is stopped. It does so when the
            thread ends that started the process.
    """
    if started_by_main_thread and multiprocessing.get_start_method() != "forkserver":
        with suppress(OSError, AttributeError):  # Linux alone
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    handles: list[int] = [parent.sentinel]
    try:
        # Workers forked later hold the other end of this pipe too: the sentinel alone would wait for them.
        handles.append(os.pidfd_open(parent.pid or 0))
    except ProcessLookupError:
        os._exit(1)
    except (OSError, AttributeError):  # kernels without it
        pass
    connection.wait(handles)
    os._exit(1)


def refuse_in_bootstrap() -> None:
    """Exit where a worker process runs the script that is starting it, which has no main guard.

    Under the start methods spawn and forkserver a new process imports the script again; without a guard it would train
    too. The process that started it reports the exit code (:func:`why_ended`).
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_NO_GUARD)  # at once: what its parent sees is this code, under every start method


def why_ended(code: int | None, remedy: str) -> str:
    """Why a worker process ended, and what helps.

    Args:
        code: its exit code; None: unknown, the start server of forkserver ended.
        remedy: against too little memory.
    """
    if code == _NO_GUARD or code is None:
        method = multiprocessing.get_start_method()
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        return (
            f"under the start method {method} every process imports {script} again: put what it runs under "
            "`if __name__ == '__main__':`"
        )
    if code == -signal.SIGKILL:
        return f"it was killed (SIGKILL): usually memory ran out; {remedy}"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it crashed ({name}): {remedy}"
    return f"it ended with exit code {code}; what it printed says why, else {remedy}"


def cannot_start(error: OSError | EOFError, what: str, remedy: str) -> LostBatchError:
    """The error of a process that the system refuses to start."""
    if isinstance(error, EOFError | ConnectionError):
        return LostBatchError(f"cannot start {what}: {why_ended(None, remedy)}")
    return LostBatchError(
        f"cannot start {what} ({error.strerror or error}): {remedy}, or raise the limits of this machine on processes "
        "(ulimit -u), open files (ulimit -n) and memory"
    )
