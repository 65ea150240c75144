"""A run on a disk that is full or fails: it goes on, and what could not be written follows when it can be."""

import csv
import errno
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sslfast.config import load_json
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.runs.outbox import Outbox, surviving
from sslfast.training.logging import LogContext
from sslfast.training.trainer import Trainer
from tests.tiny import TinyConfig, log_values, same, write_images

ROWS = 17
STEPS = 24


def trainer(output: Path, lines: list[str], data: Path | int = ROWS, **changes: Any) -> Trainer:
    return Trainer(TinyConfig(**changes), data, output, report=lines.append)


def at_steps(trainer: Trainer, actions: Mapping[int, Callable[[], None]]) -> Trainer:
    """The trainer, which does an action after a step of its own."""
    after_step = trainer.method.after_step

    def hook() -> None:
        after_step()
        actions.get(trainer.step, lambda: None)()

    trainer.method.after_step = hook  # type: ignore[method-assign]
    return trainer


def limit_files(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    trainer(output, []).fit()
    return output


def test_a_full_disk_stops_no_log_and_every_record_follows_when_it_is_freed(
    tmp_path: Path, whole: Path, limits: None
) -> None:
    """Files cannot grow beyond 300 bytes from step 5 to 17: every log and the checkpoints of 10 and 15 fail."""
    run, lines = tmp_path / "run", []
    begun = trainer(run, lines, loggers=("csv",), tensorboard=True, log_every_steps=1)
    result = at_steps(begun, {6: limit_files(300), 17: limit_files(resource.RLIM_INFINITY)}).fit()
    assert result.step == STEPS
    assert [line.partition(" (")[0] for line in lines] == [
        "cannot write log.jsonl, tensorboard, csv",
        *(f"cannot write checkpoint {run}/checkpoints/step_000000{step}.pt" for step in (10, 15)),
    ]
    assert all("File too large" in line and "training continues" in line and "\n" not in line for line in lines)
    steps = [*range(1, STEPS + 1)]
    assert [record["step"] for record in log_values(run)] == steps
    with (run / "log.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == steps
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == steps
    states = [load_checkpoint(list_checkpoints(path / "checkpoints")[-1]) for path in (run, whole)]
    assert same(states[0]["method"], states[1]["method"])
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000020.pt", "step_00000024.pt"]


class Unsteady:
    """A log of a user that fails for some records."""

    error: Exception = OSError(errno.EDQUOT, "Disk quota exceeded")
    seen: list[int]
    failing: range

    def __init__(self, context: LogContext) -> None:
        Unsteady.seen = []

    def write(self, record: Mapping[str, Any]) -> None:
        if len(log_values(self.run)) in self.failing:
            raise self.error
        self.seen.append(record["step"])

    run: Path

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "line", "lost"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "(Disk quota exceeded); training continues; this is kept", 0),
        (ConnectionError("no route"), "(ConnectionError: no route); training continues; this is kept", 0),
        (KeyError("loss"), "(KeyError: 'loss'); training continues", 3),
    ],
)
def test_a_log_of_a_user_that_fails_costs_one_line(
    tmp_path: Path, error: Exception, line: str, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests.runs.test_disk:Unsteady"
    for key, value in {"error": error, "failing": range(2, 5), "run": tmp_path}.items():
        monkeypatch.setattr(Unsteady, key, value, raising=False)
    lines: list[str] = []
    assert trainer(tmp_path, lines, loggers=(name,)).fit().step == STEPS
    assert lines[0].startswith(f"cannot write {name} {line}")
    steps = [3, 6, 9, 12, 15, 18, 21, 24]
    assert Unsteady.seen == (steps if not lost else [3, *steps[4:]])
    assert lines[1:] == ([f"lost, because they could not be written: {lost} of {name}"] if lost else [])


@pytest.mark.parametrize("target", ["config.json", "versions.json", "manifest.tsv", "bad_images.txt"])
def test_what_a_start_cannot_record_is_recorded_later(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "data", 16)
    (tmp_path / "data" / "class0" / "bad.png").write_bytes(b"junk")
    replace, is_full = os.replace, [True]

    def refuse(source: Any, to: Any) -> None:
        if Path(to).name == target and is_full[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        replace(source, to)

    monkeypatch.setattr(os, "replace", refuse)
    lines: list[str] = []
    config = TinyConfig()
    config.loader.on_bad_image = "skip"
    begun = Trainer(config, tmp_path / "data", tmp_path / "run", report=lines.append)
    result = at_steps(begun, {12: lambda: is_full.__setitem__(0, False)}).fit()
    assert lines == [
        f"cannot write {target} (No space left on device); training continues; this is kept and tried again; "
        "free some space"
    ]
    assert (tmp_path / "run" / target).stat().st_size > 0
    assert result.bad_images == 1
    assert load_json(tmp_path / "run" / "config.json")["epochs"] == 6
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_the_outbox_is_bounded_and_counts_what_it_loses() -> None:
    lines: list[str] = []
    outbox, done = Outbox(lines.append, limit=3), []

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    for _ in range(5):
        outbox.write({"log": fail})
    outbox.write({"other": lambda: done.append(1)})
    outbox.close({})
    assert done == [1]
    assert lines == [
        "cannot write log (Input/output error); training continues; this is kept and tried again; correct the disk",
        "lost, because they could not be written: 5 of log",
    ]


def test_a_screen_that_fails_ends_nothing() -> None:
    def full(_line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ascii_only(line: str) -> None:
        seen.append(line.encode("ascii").decode())

    seen: list[str] = []
    surviving(full)("line")
    surviving(ascii_only)("caf\u00e9 \udcff")
    assert seen == ["caf\\xe9 \\udcff"]
