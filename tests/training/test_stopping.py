"""A run ends between two steps, with its state saved: after a signal, also while it waits, and when no batch comes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sslfast.data.waiting import LostBatchError
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.training.signals import GracefulShutdown, RunInterruptedError, stopping_at_once
from sslfast.training.trainer import Trainer
from sslfast.views.types import Batch
from tests.tiny import TinyConfig, same, write_images

ROWS, STEPS = 17, 24
OTHERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.fixture(autouse=True)
def as_in_a_fresh_process() -> Iterator[None]:
    """Default handlers: under nohup, or behind an & of a script, some signals are ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in OTHERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make(output: Path, data: Path | int = ROWS, **options: Any) -> Trainer:
    return Trainer(TinyConfig(**options), data, output, report=lambda _line: None)


def final(output: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(output / "checkpoints")[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Last state of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    make(output).fit()
    return final(output)


def replace_batch(trainer: Trainer, step: int, act: Callable[[], Any]) -> None:
    """Call ``act`` in place of reading the batch of a step (0-based, of the first epoch)."""
    epoch = trainer.loader.epoch

    def acting(number: int, start_step: int = 0) -> Iterator[Batch]:
        for position, batch in enumerate(epoch(number, start_step), start_step):
            if (number, position) == divmod(step, trainer.steps_per_epoch):
                act()
            yield batch

    trainer.loader.epoch = acting  # type: ignore[method-assign]


def hang(trainer: Trainer, then: Callable[[], Any] = lambda: None) -> Callable[[], None]:
    """What a loader does whose storage does not answer: it waits, with the loader's patience."""

    def wait() -> None:
        then()
        trainer.loader.patience.wait(lambda seconds: bool(time.sleep(seconds)), lambda: "a batch: mount it")

    return wait


@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_signal_while_waiting_saves_and_the_run_resumes_bit_equal(
    tmp_path: Path, whole: dict[str, Any], step: int
) -> None:
    """Step 4 begins an epoch."""
    trainer = make(tmp_path)
    replace_batch(trainer, step, hang(trainer, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    began = time.monotonic()
    with pytest.raises(RunInterruptedError, match=rf"stopped by SIGTERM after step {step}/24, saved .*; the same"):
        trainer.fit()
    assert time.monotonic() - began < 20
    make(tmp_path).fit()
    assert same(final(tmp_path), whole)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            None,
            LostBatchError,
            r"waited \d s for a batch: mount it; after step 6/24 saved .*; the same command resumes",
        ),
        (LostBatchError("a process died"), LostBatchError, r"^a process died; after step 6/24 saved .*step_00000006"),
        (ValueError("cannot train on x.jpg"), ValueError, r"^cannot train on x\.jpg; after step 6/24 saved "),
        (OSError(5, "Input/output error"), OSError, "Input/output error"),
    ],
)
def test_a_batch_that_does_not_come_costs_no_step(
    tmp_path: Path, whole: dict[str, Any], error: Exception | None, kind: type[Exception], message: str
) -> None:
    trainer = make(tmp_path)
    trainer.loader.patience.limit = 0.3

    def fail() -> None:
        assert error is not None
        raise error

    replace_batch(trainer, 6, hang(trainer) if error is None else fail)
    with pytest.raises(kind, match=message):
        trainer.fit()
    assert final(tmp_path)["step"] == 6
    make(tmp_path).fit()
    assert same(final(tmp_path), whole)


def test_where_nothing_was_trained_nothing_is_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.loader.patience.limit = 0.3
    replace_batch(trainer, 0, hang(trainer))
    with pytest.raises(LostBatchError, match=r"^waited \d s for a batch: mount it$"):
        trainer.fit()
    assert list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("number", OTHERS)
def test_signals_of_terminals_and_schedulers_stop_like_sigterm(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with GracefulShutdown() as shutdown:
        for _ in range(20):  # a burst
            os.kill(os.getpid(), number)
        assert shutdown.requested == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert shutdown.requested == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("is_torchrun", [False, True])
def test_a_hangup_that_is_ignored_stays_so_but_under_torchrun(
    monkeypatch: pytest.MonkeyPatch, is_torchrun: bool
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if is_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown() as shutdown:
            os.kill(os.getpid(), signal.SIGHUP)
            assert shutdown.is_requested() == is_torchrun
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_of_the_program_itself_is_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    try:
        with GracefulShutdown() as shutdown:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not shutdown.is_requested()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_signal_before_the_first_step_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer, "_resume", lambda: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(RunInterruptedError, match="stopped by SIGHUP before the first step, nothing was to be saved"):
        trainer.fit()
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_during_the_last_checkpoint_does_not_break_it_off(tmp_path: Path, whole: dict[str, Any]) -> None:
    trainer = make(tmp_path)
    save = trainer.store.save

    def interrupted(state: dict[str, Any], step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, step)

    trainer.store.save = interrupted  # type: ignore[method-assign]
    trainer.config.checkpoint_every_steps = STEPS
    assert trainer.fit().step == STEPS
    assert same(final(tmp_path)["method"], whole["method"])


def test_check_starts_the_loader_and_leaves_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "data", ROWS)
    trainer = make(tmp_path / "run", tmp_path / "data")
    trainer.config.loader.workers = 1
    started: list[int] = []
    trainer.loader.check = lambda: started.append(1)  # type: ignore[method-assign]
    trainer.check()
    trainer.close()
    assert started == [1]
    assert not (tmp_path / "run").exists()


def test_the_command_in_one_line_with_processes_that_stop(tmp_path: Path) -> None:
    """The whole way: a stopped loader process, a limit, exit code 4, a checkpoint, no process left."""
    write_images(tmp_path / "data", ROWS)
    code = f"""
import os, signal, sys
from sslfast.cli.main import main
from sslfast.recipes import RECIPES
from tests.tiny import Tiny, TinyConfig
RECIPES["tiny"] = lambda: TinyConfig(recipe="tiny")
after_step, steps = Tiny.after_step, []
def stop(self):
    after_step(self)
    steps.append(1)
    if len(steps) == 5:
        import multiprocessing
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)
Tiny.after_step = stop
sys.exit(main(["pretrain", {str(tmp_path / "data")!r}, "--recipe", "tiny", "--output", {str(tmp_path / "run")!r},
    "--loader.workers", "1", "--loader.timeout", "0.5", "--epochs", "100"]))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 4, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("sslfast: error: waited ")
    assert "loader process 1 of 1" in line
    assert "raise --loader.timeout; after step " in line
    assert "Traceback" not in done.stderr
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) >= 1
