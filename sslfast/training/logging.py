"""Logs of a run: the interface of a log, the table of logs, and the recorder that the trainer reports to."""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sslfast.plugins import PluginDict
from sslfast.runs import LogFile, Outbox, RunDirectory, print_error
from sslfast.training.config import TrainConfig
from sslfast.training.progress import Progress

T = TypeVar("T")


class Logger(Protocol):
    """Receives the log records of a run, in the order of steps, on rank 0 only. A subclass inherits ``sync`` and
    ``close``, which do nothing, if it needs none. A method ``write_picture(name: str, path: Path, step: int)``, where a
    log has one, is given the pictures of a run, PNG files."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Log a record: ``step``, ``epoch``, ``lr``, ``loss``, the method's values, and under ``time`` a table of what
        depends on the clock (``unix_seconds``, ``samples_per_second``, ``loader_wait_share``).

        A log that fails does not end the run: it costs one line on the screen. After an OSError (a full disk) the
        record is kept in memory and given again, before later ones; after another error it is lost.
        """

    def sync(self) -> None:
        """Make all records durable. Called before each checkpoint: a run resumed from it does not write them again."""

    def close(self) -> None:
        """Close files. Called when the run ends or is interrupted."""


@dataclass(frozen=True, kw_only=True)
class LogContext:
    """Argument of a logger's factory."""

    config: TrainConfig
    run: RunDirectory
    first_step: int
    """Steps done before this start of the run. A log removes later records, which an interrupted start may have left:
    they are written again."""
    total_steps: int
    """Of the whole run."""
    report: Callable[[str], None] = print_error
    """Takes one line for the user."""


LOGGERS: dict[str, str] = PluginDict(
    {
        "tensorboard": "sslfast.training.tensorboard_log:TensorBoardLog",
        "csv": "sslfast.training.csv_log:CSVLog",
        "wandb": "sslfast.training.wandb_log:WandbLog",
        "mlflow": "sslfast.training.mlflow_log:MLflowLog",
    }
)
"""Logs that a run can write besides ``log.jsonl``: name -> ``module:factory``, a callable that takes a
:class:`LogContext` and returns a :class:`Logger`. To add a log: its module and a line here; or, without a line here,
``loggers=("module:factory",)``."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by the names that dashboards show them under: ``time/`` before those of the clock. Step
    and time of day, which a dashboard has of its own, are left out."""
    named = [*record.items(), *((f"time/{name}", value) for name, value in record["time"].items())]
    without = ("step", "time/unix_seconds")
    return {name: value for name, value in named if isinstance(value, int | float) and name not in without}


def find_loggers(config: TrainConfig) -> dict[str, Callable[[LogContext], Logger]]:
    """Factories of the logs that ``config`` names, each once, by name.

    Raises:
        ValueError: a log is unknown, or a package that it needs is missing.
    """
    names = dict.fromkeys([*(("tensorboard",) if config.tensorboard else ()), *config.loggers])
    return {name: _factory(name) for name in names}


def _factory(name: str) -> Callable[[LogContext], Logger]:
    is_own = ":" not in name and name in LOGGERS
    module, colon, attribute = (LOGGERS[name] if is_own else name).partition(":")
    if not colon:
        raise ValueError(f"loggers must be of {', '.join(LOGGERS)}, or module:factory, got {name!r}")
    try:
        factory: Callable[[LogContext], Logger] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        remedy = "" if is_own else "; correct it or leave it out of loggers"
        raise ValueError(f"logger {name} cannot be used: {error}{remedy}") from None
    return factory


class LoaderTimer:
    """Wall time and time spent waiting for the loader, in total and since the last lap."""

    def __init__(self, step: int) -> None:
        self.total_waited = 0.0
        self.is_waiting = False
        self._lap_step, self._lap_start, self._lap_waited = step, time.perf_counter(), 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with the time to the arrival of each one counted."""
        while True:
            start = time.perf_counter()
            self.is_waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                self.is_waiting = False
                return
            self.is_waiting = False
            self.total_waited += time.perf_counter() - start
            yield batch

    def lap(self, step: int) -> tuple[int, float, float]:
        """``(steps, seconds, seconds waited)`` since the last lap."""
        now = time.perf_counter()
        lap = (step - self._lap_step, max(now - self._lap_start, 1e-9), self.total_waited - self._lap_waited)
        self._lap_step, self._lap_start, self._lap_waited = step, now, self.total_waited
        return lap


class _Opened(Logger):
    """A log that is opened at once, or where the disk is full with the first record that it can take. One that cannot
    be opened for another reason (a server does not answer) is not tried again: each of its records is that error."""

    def __init__(self, make: Callable[[], Logger]) -> None:
        self._make, self._log, self._error = make, None, None
        with suppress(Exception):
            self.open()

    _log: Logger | None
    _error: Exception | None

    def open(self) -> Logger:
        if self._error is not None:
            raise self._error
        if self._log is None:
            try:
                self._log = self._make()
            except OSError:
                raise
            except Exception as error:  # a logger may be anyone's
                self._error = error
                raise
        return self._log

    def write(self, record: Mapping[str, Any]) -> None:
        self.open().write(record)

    def write_picture(self, name: str, path: Path, step: int) -> None:
        write = getattr(self.open(), "write_picture", None)
        if write is not None:
            write(name, path, step)

    def sync(self) -> None:
        if self._error is None:
            self.open().sync()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


class Recorder:
    """Composes the log records of a run and hands them to its loggers.

    Args:
        config: of the run.
        run: its directory.
        outbox: takes what the logs write, and says what fails.
        first_step: steps that were finished before this start.
        total_steps: of the whole run.
        is_main: whether this process writes; others only keep time.
        report: takes one line for the user.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunDirectory,
        outbox: Outbox,
        *,
        first_step: int,
        total_steps: int,
        is_main: bool,
        report: Callable[[str], None] = print_error,
    ) -> None:
        self.timer = LoaderTimer(first_step)
        self.last: dict[str, Any] = {}
        """The last record."""
        self.loggers: dict[str, _Opened] = {}
        self._batch_size = config.batch_size
        self._outbox = outbox
        self._progress = Progress(
            config.progress if is_main else "off",
            total_steps=total_steps,
            first_step=first_step,
            batch_size=config.batch_size,
        )
        if is_main:
            context = LogContext(config=config, run=run, first_step=first_step, total_steps=total_steps, report=report)
            self.loggers[run.log.name] = _Opened(lambda: LogFile(run.log, last_step=first_step, report=report))
            for name, factory in find_loggers(config).items():
                self.loggers[name] = _Opened(partial(factory, context))

    def step(self) -> None:
        """One step is done (or queued on the device)."""
        self._progress.step()

    def write(self, *, step: int, epoch: float, lr: float, values: Mapping[str, float]) -> None:
        """One record of the steps since the last."""
        steps, seconds, waited = self.timer.lap(step)
        if not self.loggers:
            return
        self.last = {
            "step": step,
            "epoch": round(epoch, 6),
            "lr": lr,
            **values,
            "time": {
                "unix_seconds": round(time.time(), 3),
                "samples_per_second": round(steps * self._batch_size / seconds, 3),
                "loader_wait_share": round(waited / seconds, 4),
            },
        }
        self._outbox.write({name: partial(logger.write, self.last) for name, logger in self.loggers.items()})
        self._outbox.attempt("show", {"progress": partial(self._progress.write, self.last)})

    def write_pictures(self, draw: Callable[[], Mapping[str, Path]], step: int) -> None:
        """Draw pictures, PNG files by name, and hand them to the logs that take some."""
        drawn: dict[str, Path] = {}
        self._outbox.attempt("draw", {"pictures": lambda: drawn.update(draw())})
        for name, path in drawn.items():
            actions = {log: partial(logger.write_picture, name, path, step) for log, logger in self.loggers.items()}
            self._outbox.attempt("show pictures in", actions)

    def sync(self) -> None:
        """Make all records durable."""
        self._outbox.retry()
        self._outbox.attempt("sync", {name: logger.sync for name, logger in self.loggers.items()})

    def close(self) -> None:
        """Close every logger, also where one of them fails."""
        actions = {name: logger.close for name, logger in self.loggers.items()}
        self._outbox.close({**actions, "progress": self._progress.close})
