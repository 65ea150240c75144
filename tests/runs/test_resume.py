"""A run killed with SIGKILL and resumed ends bit-equal to an uninterrupted one.

The children come from a fork server that has imported torch once: real processes, killed by the kernel, that start
in a fraction of a second. Each computes with one thread, which fixes the order of every sum.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast
from sslfast.cli.main import main
from sslfast.config import resumable_fields
from sslfast.data.manifest import Manifest
from sslfast.loaders.pillow import PillowLoader
from sslfast.methods.pirl import PIRL
from sslfast.runs import checkpoint as checkpoint_module
from sslfast.runs import directory as rundir
from sslfast.runs.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints, load_checkpoint
from sslfast.runs.log import LogFile
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.tiny import Tiny, TinyConfig, fork_server, log_values, same, write_images

ROWS = 17
STEPS = 24


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(count: int, owner: Any, name: str, *, after: bool) -> None:
    """Kill this process at the ``count``-th call of ``owner.name``, before or after it has done its work."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            die()
        result = original(*args, **kwargs)
        if calls == count:
            die()
        return result

    setattr(owner, name, counted)


def half_a_line(self: LogFile, record: dict[str, Any]) -> None:
    self._file.write(b'{"step": 12, "loss"')
    die()


MOMENTS: dict[str, Callable[[], None]] = {
    "before the first checkpoint": lambda: die_at(3, Tiny, "after_step", after=True),
    "between optimizer step and bank update": lambda: die_at(8, Tiny, "after_step", after=False),
    "in the middle of a log line": lambda: setattr(LogFile, "write", half_a_line),
    "at the first bytes of a checkpoint": lambda: die_at(1, checkpoint_module._HashingWriter, "write", after=True),
    "in the middle of a checkpoint": lambda: die_at(60, checkpoint_module._HashingWriter, "write", after=True),
    "before a checkpoint is durable": lambda: die_at(1, os, "fsync", after=False),
    "between checksum and checkpoint": lambda: die_at(1, checkpoint_module.os, "replace", after=True),
    "before old checkpoints go": lambda: die_at(2, checkpoint_module, "fsync_directory", after=False),
    "between the two files of an old checkpoint": lambda: die_at(1, Path, "unlink", after=True),
    "after the last log record": lambda: die_at(8, LogFile, "write", after=True),
}


def train(output: str, moment: str | None) -> None:
    """The child."""
    torch.set_num_threads(1)
    trainer = Trainer(TinyConfig(), ROWS, output, report=lambda line: None)
    if moment is not None:
        run_begins = trainer._fit

        def fit() -> Any:
            MOMENTS[moment]()
            return run_begins()

        trainer._fit = fit  # type: ignore[method-assign]
    trainer.fit()


def command_line(data: str, output: str) -> None:
    """``sslfast pretrain`` with nothing replaced: PIRL with jigsaw on a narrow ResNet-18, images from files, a loader
    process.

    Crops of 16 and 24 px; 8 steps of 4 images with a checkpoint after 3 and 6.
    """
    torch.set_num_threads(1)
    # As outside of a fork server; a server of its own would import torch once more.
    multiprocessing.set_start_method("fork", force=True)
    values = {
        "recipe": "pirl-small",
        "batch-size": 4,
        "epochs": 2,
        "workers": 1,
        "log-every-steps": 2,
        "checkpoint-every-steps": 3,
        "model.width": 0.125,
        "method.num-negatives": 16,
        "method.loss": "nce",
        "method.image-view.crop.size": 16,
        "method.jigsaw-view.crop.size": 24,
        "method.jigsaw-view.jigsaw.patch-size": 8,
        "device": "cpu",
    }
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    sys.exit(main(["pretrain", data, "--output", output, "--no-tensorboard", *options]))


def train_slowly(output: str) -> None:
    """A child that is interrupted at a random time: steps of 5 ms, a checkpoint after each."""
    torch.set_num_threads(1)
    after_step = Tiny.after_step

    def slow(self: Tiny) -> None:
        after_step(self)
        time.sleep(0.005)

    Tiny.after_step = slow  # type: ignore[method-assign]
    Trainer(TinyConfig(checkpoint_every_steps=1), ROWS, output, report=lambda line: None).fit()


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def whole(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert start(server, train, output, None).exitcode == 0
    return output


def start(server: ForkServerContext, target: Callable[..., None], *args: Any, wait: bool = True) -> Any:
    child = server.Process(target=target, args=tuple(str(a) if isinstance(a, Path) else a for a in args))
    child.start()
    if wait:
        child.join()
    return child


def final_state(output: Path) -> dict[str, Any]:
    return load_checkpoint(checkpoint_path(output / "checkpoints", STEPS))


def assert_equal(output: Path, whole: Path) -> None:
    """Weights, BatchNorm, bank, momentum, log interval, configuration: the same bits; and the same log."""
    assert same(final_state(output), final_state(whole))
    assert log_values(output) == log_values(whole)
    assert [record["step"] for record in log_values(output)] == [3, 6, 9, 12, 15, 18, 21, 24]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(moment: str, server: ForkServerContext, whole: Path, tmp_path: Path) -> None:
    assert start(server, train, tmp_path, moment).exitcode == -signal.SIGKILL
    assert start(server, train, tmp_path, None).exitcode == 0
    assert_equal(tmp_path, whole)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2
    left = {path.suffix for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {".pt", ".sha256"}


KILLS = 50


def train_long(output: str, pause: float, checkpoint_every_steps: int) -> None:
    """A child of 240 steps; ``pause``: seconds that a step takes longer."""
    torch.set_num_threads(1)
    after_step = Tiny.after_step

    def slow(self: Tiny) -> None:
        after_step(self)
        time.sleep(pause)

    Tiny.after_step = slow  # type: ignore[method-assign]
    rundir.git_state = lambda _folder: None  # three processes of git at every start
    config = TinyConfig(epochs=60, checkpoint_every_steps=checkpoint_every_steps)
    Trainer(config, ROWS, output, report=lambda line: None).fit()


def test_killed_fifty_times_at_random_moments(server: ForkServerContext, tmp_path: Path) -> None:
    """After the first checkpoint of a start anything may be in progress: a step, a checkpoint or log being written, old
    checkpoints being deleted. Every start gets a little further, and none runs long enough to finish."""
    output, whole = tmp_path / "killed", tmp_path / "whole"
    uninterrupted = start(server, train_long, whole, 0.0, 100, wait=False)
    rng, partial = random.Random(0), 0
    for number in range(KILLS):
        known = {path.name for path in list_checkpoints(output / "checkpoints")}
        child = start(server, train_long, output, 0.01, 1, wait=False)
        while child.is_alive() and {path.name for path in list_checkpoints(output / "checkpoints")} <= known:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if number % 5 == 0:  # in the middle of the next checkpoint
            while child.is_alive() and not any((output / "checkpoints").glob(".step_*.tmp")):
                pass
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        partial += any((output / "checkpoints").glob(".step_*.tmp"))
    assert partial >= 1  # some died while they wrote a checkpoint
    assert KILLS <= checkpoint_step(list_checkpoints(output / "checkpoints")[-1]) < 240
    assert start(server, train_long, output, 0.0, 100).exitcode == 0
    uninterrupted.join()
    states = [load_checkpoint(checkpoint_path(path / "checkpoints", 240)) for path in (output, whole)]
    # Another checkpoint interval is in the saved configuration, and nowhere else.
    assert same(states[0] | {"config": None}, states[1] | {"config": None})
    assert log_values(output) == log_values(whole)


def test_terminated_child_leaves_a_checkpoint_at_its_step(
    server: ForkServerContext, whole: Path, tmp_path: Path
) -> None:
    child = start(server, train_slowly, tmp_path, wait=False)
    while not list_checkpoints(tmp_path / "checkpoints"):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 1  # multiprocessing's code for the exception; the command exits with 75
    assert start(server, train_slowly, tmp_path).exitcode == 0
    assert log_values(tmp_path) == log_values(whole)


def test_command_line_killed_terminated_and_resumed(server: ForkServerContext, tmp_path: Path) -> None:
    data, uninterrupted, output = tmp_path / "data", tmp_path / "uninterrupted", tmp_path / "output"
    write_images(data, 18)
    assert start(server, command_line, data, uninterrupted).exitcode == 0

    child = start(server, command_line, data, output, wait=False)
    wait_for(child, output, count=1)
    time.sleep(random.Random(1).uniform(0, 0.5))
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    child = start(server, command_line, data, output, wait=False)
    wait_for(child, output, count=2)
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 75
    assert start(server, command_line, data, output).exitcode == 0

    states = [load_checkpoint(checkpoint_path(path / "checkpoints", 8)) for path in (output, uninterrupted)]
    assert {"trunk.conv1.weight", "bank.vectors", "z"} <= states[0]["method"].keys()
    assert same(states[0], states[1])
    assert log_values(output) == log_values(uninterrupted)
    assert [record["step"] for record in log_values(output)] == [2, 4, 6, 8]


def load_and_hang(data: str, method: str, pids: str) -> None:
    """A child in the middle of an epoch, with a loader process whose pid it writes down."""
    multiprocessing.set_start_method(method, force=True)
    loader = PillowLoader(Manifest.scan(data), Tiny.Config().views(), batch_size=4, seed=0, workers=1)
    next(loader.epoch(0))
    Path(pids).write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
    time.sleep(600)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_loader_processes_end_with_a_killed_run(method: str, server: ForkServerContext, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 16)
    pids = tmp_path / "pids"
    child = start(server, load_and_hang, tmp_path / "data", method, pids, wait=False)
    while child.is_alive() and not (pids.exists() and pids.read_text()):
        time.sleep(0.01)
    child.kill()
    child.join()
    workers = [int(pid) for pid in pids.read_text().split()]
    assert workers
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < end, "loader processes outlive the run"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(child: Any, output: Path, *, count: int) -> None:
    while child.is_alive() and len(list_checkpoints(output / "checkpoints")) < count:
        time.sleep(0.002)


def test_fields_that_may_change_at_a_resume() -> None:
    """Everything else decides what a step computes; epochs too: the rate of the steps already done depends on it."""
    assert resumable_fields(TrainConfig(method=PIRL.Config())) == {
        "recipe",
        "device",
        "compile",
        "on_nonfinite",
        "on_collapse",
        "nonfinite_limit",
        "log_every_steps",
        "knn_every_epochs",
        "probe_data",
        "probe_every_epochs",
        "pictures_every_epochs",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "keep_every_steps",
        "checkpoint_store",
        "tensorboard",
        "rank_timeout",
        "loggers",
        "loader.timeout",
        "progress",
        "method.bank_layout",
        "loader.workers",
        "loader.on_bad_image",
        "loader.max_pixels",
    }


def test_another_recipe_is_named_as_such(tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 8, "model.width": 0.125, "device": "cpu", "tensorboard": False}
    sslfast.pretrain(17, "rotation-small", tmp_path, **train, **{"method.image_view.crop.size": 16})
    with pytest.raises(ValueError, match=r"it is of recipe rotation-small \(method rotation\), not of simclr-small"):
        sslfast.pretrain(17, "simclr-small", tmp_path, **train)
