"""Logs beside log.jsonl: what they get, how they are found, what a resume leaves in them."""

import csv
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sslfast.config import from_dict, to_dict
from sslfast.runs.directory import RunDirectory
from sslfast.runs.log import read_log
from sslfast.training.csv_log import CSVLog
from sslfast.training.logging import LogContext
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from tests.tiny import TinyConfig, write_images

ROWS = 24  # six steps an epoch, 36 in all
EVENTS: list[Any] = []


class Listener:
    """A log of a user: a class that shares nothing with the library."""

    def __init__(self, context: LogContext) -> None:
        EVENTS.append((context.first_step, context.total_steps, context.run.path.name, context.config.batch_size))

    def write(self, record: Mapping[str, Any]) -> None:
        EVENTS.append(record["step"])

    def sync(self) -> None:
        EVENTS.append("sync")

    def close(self) -> None:
        EVENTS.append("close")


def trainer(data: Path | int, output: Path, *loggers: str, report: Any = lambda _line: None, **changes: Any) -> Trainer:
    config = TinyConfig(loggers=loggers, **{"log_every_steps": 5, "checkpoint_every_steps": 12, **changes})
    return Trainer(config, data, output, report=report)


def stop_at(trainer: Trainer, step: int) -> None:
    after_step = trainer.method.after_step

    def hook() -> None:
        after_step()
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.method.after_step = hook  # type: ignore[method-assign]


def test_a_log_of_a_user_gets_every_record_and_is_synced_before_each_checkpoint(tmp_path: Path) -> None:
    EVENTS.clear()
    name = "tests.training.test_logging:Listener"
    stopped = trainer(ROWS, tmp_path / "run", name, name)
    stop_at(stopped, 13)
    with pytest.raises(RunInterruptedError):
        stopped.fit()
    assert EVENTS == [(0, 36, "run", 4), 5, 10, "sync", "sync", "close"]
    EVENTS.clear()
    trainer(ROWS, tmp_path / "run", name, checkpoint_every_steps=100).fit()
    assert EVENTS == [(14, 36, "run", 4), 15, 20, 25, 30, 35, 36, "sync", "close"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cvs", r"loggers must be of tensorboard, .*or module:factory, got 'cvs'"),
        ("nowhere.at_all:Log", r"logger nowhere.at_all:Log cannot be used: No module named 'nowhere'; correct it or"),
        ("json:Log", r"logger json:Log cannot be used: module 'json' has no attribute 'Log'; correct it or leave it"),
    ],
)
def test_a_log_that_cannot_be_found_is_an_error_before_the_run(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(ROWS, tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_a_configuration_older_than_the_field_loads() -> None:
    old = to_dict(TinyConfig())
    del old["loggers"]
    assert from_dict(TinyConfig, old).loggers == ()


def test_every_logger_of_a_run_is_closed_where_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Listener) -> None:
        raise OSError("disk full")

    EVENTS.clear()
    monkeypatch.setattr(Listener, "close", fail)
    lines: list[str] = []
    name = "tests.training.test_logging:Listener"
    assert trainer(ROWS, tmp_path, "csv", name, report=lines.append).fit().step == 36
    assert lines == [f"cannot close {name} (OSError: disk full); training continues"]
    assert len(csv_rows(tmp_path)) == 8


def csv_rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plain(record: Mapping[str, Any]) -> dict[str, str]:
    clock = {f"time/{name}": value for name, value in record["time"].items()}
    return {name: str(value) for name, value in {**record, **clock}.items() if name != "time"}


def test_csv_has_the_values_of_the_log_also_after_a_resume(tmp_path: Path) -> None:
    """Accuracy is in the records of some epochs alone: a column that appears late."""
    write_images(tmp_path / "data", ROWS)
    stopped = trainer(tmp_path / "data", tmp_path / "run", "csv", knn_every_epochs=2)
    stop_at(stopped, 29)
    with pytest.raises(RunInterruptedError):
        stopped.fit()
    for path in (tmp_path / "run" / "checkpoints").glob("step_00000030.pt*"):
        path.unlink()  # the resumed run redoes the steps after 24
    with (tmp_path / "run" / "log.csv").open("a") as file:
        file.write("\0\0\0\n31,0.")
    trainer(tmp_path / "data", tmp_path / "run", "csv", knn_every_epochs=2).fit()
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [record["step"] for record in records] == [5, 10, 12, 15, 20, 24, 25, 30, 35, 36]
    rows = csv_rows(tmp_path / "run")
    assert [{name: value for name, value in row.items() if value} for row in rows] == list(map(plain, records))
    assert "knn_top1" in rows[0]


def test_csv_of_a_new_run_is_empty(tmp_path: Path) -> None:
    context = LogContext(config=TinyConfig(), run=RunDirectory(tmp_path), first_step=0, total_steps=9)
    CSVLog(context).close()
    assert (tmp_path / "log.csv").read_bytes() == b""
