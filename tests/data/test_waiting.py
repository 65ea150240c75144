"""Waits have a limit and can be broken off; threads that hang never keep a program alive."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sslfast.data import waiting
from sslfast.data.pool import map_processes
from sslfast.data.waiting import DaemonPool, LostBatchError, Patience, Reading, WaitInterruptedError


def hang(_task: int) -> None:
    time.sleep(3600)


def never(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def test_a_wait_ends_at_its_limit_with_the_seconds_and_the_reason() -> None:
    with pytest.raises(LostBatchError, match=r"^waited \d s for a batch: mount it$"):
        Patience(limit=0.3).wait(never, lambda: "a batch: mount it")


def test_a_wait_is_broken_off_by_a_stop() -> None:
    began = time.monotonic()
    with pytest.raises(WaitInterruptedError):
        Patience(is_stopped=lambda: True).wait(never, str)
    assert time.monotonic() - began < 2
    Patience(is_stopped=lambda: True).wait(lambda _seconds: True, str)  # what is there is taken


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5000.0, 5000.2, 5000.4])
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(clock))
    answers = iter([False, False, True])
    Patience(limit=60).wait(lambda _seconds: next(answers), str)


def test_results_and_errors_of_threads_come_in_order() -> None:
    with DaemonPool(3, "test") as pool:
        assert pool.map(lambda task: task * 2, range(20), Patience(), str) == [task * 2 for task in range(20)]
        with pytest.raises(ZeroDivisionError):
            pool.map(lambda task: 1 // task, [1, 0], Patience(), str)
    with pytest.raises(RuntimeError, match="was closed"):
        pool.submit(int)


def test_a_thread_that_hangs_is_named_and_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_CLOSE_SECONDS", 0.1)
    reading, release = Reading(), threading.Event()

    def read(row: int) -> None:
        reading(row)
        if row == 1:
            release.wait()

    with DaemonPool(2, "test") as pool, pytest.raises(LostBatchError, match="row 1"):
        pool.map(read, [0, 1, 2, 3], Patience(limit=0.3), lambda: f"row {reading.oldest()}")
    release.set()


def test_a_program_ends_although_a_thread_hangs_in_a_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    code = f"""
from sslfast.data import waiting
waiting._CLOSE_SECONDS = 0.1
pool = waiting.DaemonPool(1, "test")
try:
    waiting.Patience(limit=0.3).result(pool.submit(open, {str(tmp_path / "fifo")!r}), lambda: "the pipe")
except waiting.LostBatchError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" s for the pipe\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_that_hang_are_one_error_and_are_ended(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_CLOSE_SECONDS", 0.1)
    found = map_processes(
        hang, range(9), workers=workers, progress=False, title="decoding", patience=Patience(limit=0.5)
    )
    began = time.monotonic()
    with pytest.raises(LostBatchError, match=r"waited \d s for decoding: the storage does not answer; see that it is"):
        list(found)
    assert time.monotonic() - began < 20
