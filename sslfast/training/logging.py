"""Logs of a run: the interface of a log, the table of logs, and the recorder that the trainer reports to."""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sslfast.runs import LogFile, RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.training.progress import Progress

T = TypeVar("T")


class Logger(Protocol):
    """Receives the log records of a run, in the order of steps, on rank 0 only. A subclass inherits ``sync`` and
    ``close``, which do nothing, if it needs none."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Log a record: ``step``, ``epoch``, ``lr``, ``loss``, the method's values, and under ``time`` a table of what
        depends on the clock (``unix_seconds``, ``samples_per_second``, ``loader_wait_share``)."""

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


LOGGERS: dict[str, str] = {
    "tensorboard": "sslfast.training.tensorboard_log:TensorBoardLog",
    "csv": "sslfast.training.csv_log:CSVLog",
}
"""Logs that a run can write besides ``log.jsonl``: name -> ``module:factory``, a callable that takes a
:class:`LogContext` and returns a :class:`Logger`. To add a log: its module and a line here; or, without a line here,
``loggers=("module:factory",)``."""


def find_loggers(config: TrainConfig) -> list[Callable[[LogContext], Logger]]:
    """Factories of the logs that ``config`` names, each once.

    Raises:
        ValueError: a log is unknown, or a package that it needs is missing.
    """
    names = dict.fromkeys([*(("tensorboard",) if config.tensorboard else ()), *config.loggers])
    return [_factory(name) for name in names]


def _factory(name: str) -> Callable[[LogContext], Logger]:
    module, colon, attribute = LOGGERS.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"loggers must be of {', '.join(LOGGERS)}, or module:factory, got {name!r}")
    try:
        factory: Callable[[LogContext], Logger] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        remedy = "" if name in LOGGERS else "; correct it or leave it out of loggers"
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


class Recorder:
    """Composes the log records of a run and hands them to its loggers.

    Args:
        config: of the run.
        run: its directory.
        first_step: steps that were finished before this start.
        total_steps: of the whole run.
        is_main: whether this process writes; others only keep time.
    """

    def __init__(
        self, config: TrainConfig, run: RunDirectory, *, first_step: int, total_steps: int, is_main: bool
    ) -> None:
        self.timer = LoaderTimer(first_step)
        self.last: dict[str, Any] = {}
        """The last record."""
        self.loggers: list[Logger] = []
        self._batch_size = config.batch_size
        self._progress = Progress(
            config.progress if is_main else "off",
            total_steps=total_steps,
            first_step=first_step,
            batch_size=config.batch_size,
        )
        if is_main:
            context = LogContext(config=config, run=run, first_step=first_step, total_steps=total_steps)
            self.loggers.append(LogFile(run.log, last_step=first_step))
            self.loggers += [factory(context) for factory in find_loggers(config)]
            self.loggers.append(self._progress)

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
        for logger in self.loggers:
            logger.write(self.last)

    def sync(self) -> None:
        """Make all records durable."""
        for logger in self.loggers:
            logger.sync()

    def close(self) -> None:
        """Close every logger, also where one of them fails."""
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)
