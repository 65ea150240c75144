"""What a run writes while it trains: log records, TensorBoard, progress on the terminal, and the clock."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from sslfast.runs import LogFile, RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.training.metrics import T


class TensorBoardLog:
    """Scalars as TensorBoard event files; needs the package tensorboard."""

    def __init__(self, directory: Path, *, last_step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier process wrote after the checkpoint that this one goes on from.
        self._writer = SummaryWriter(str(directory), purge_step=last_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        for name, value in [*record.items(), *((f"time/{k}", v) for k, v in record["time"].items())]:
            if isinstance(value, int | float) and name not in ("step", "time/unix_seconds"):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises ValueError where TensorBoard files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard=True needs the package tensorboard ({error}); "
            "pip install tensorboard, or pass --no-tensorboard"
        ) from None


class Progress:
    """Progress on the terminal: a bar, one line per log record, or nothing.

    Args:
        mode: ``auto`` (bar on a terminal with rich installed, else lines), ``bar``, ``plain`` or ``off``.
        total_steps: steps of the whole run.
        first_step: steps that were finished before this process.
    """

    def __init__(self, mode: str, *, total_steps: int, first_step: int, stream: TextIO | None = None) -> None:
        self._total, self._step = total_steps, first_step
        self._stream = stream or sys.stderr
        self._steps_per_second = 0.0
        self._bar: Any = None
        self._mode = mode
        if mode == "bar" or (mode == "auto" and self._stream.isatty()):
            self._start_bar(required=mode == "bar")

    def step(self) -> None:
        """One step is done (or on its way on the device)."""
        self._step += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step)

    def record(self, record: Mapping[str, Any], *, steps_per_second: float) -> None:
        """Show a log record."""
        smoothed = self._steps_per_second or steps_per_second
        self._steps_per_second = 0.5 * smoothed + 0.5 * steps_per_second
        clock = record["time"]
        words = (
            f"loss {record['loss']:.4f}  {clock['samples_per_second']:.0f} samples/s  "
            f"waiting for data {clock['loader_wait_share']:.0%}  left {self._left(record['step'])}"
        )
        if "knn_top1" in record:
            words = f"kNN {record['knn_top1']:.1%}  {words}"
        if self._bar is not None:
            self._bar.update(self._task, words=words)
        elif self._mode != "off":
            self.say(
                f"step {record['step']}/{self._total}  epoch {record['epoch']:.2f}  lr {record['lr']:.4g}  {words}"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        seconds = round((self._total - step) / self._steps_per_second) if self._steps_per_second else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _start_bar(self, *, required: bool) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar
        except ImportError:
            if required:
                raise ValueError("progress=bar needs the package rich; pip install rich, or --progress plain") from None
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[words]}"))
        self._bar = Bar(*columns, console=Console(file=self._stream), refresh_per_second=4)
        self._task = self._bar.add_task("", total=self._total, completed=self._step, words="starting")
        self._bar.start()


class LoaderTimer:
    """Wall time and time spent waiting for the loader, in total and since the last lap."""

    def __init__(self, step: int) -> None:
        self.total_waited = 0.0
        self.is_waiting = False
        self._lap_step, self._lap_start, self._lap_waited = step, time.perf_counter(), 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time they take to come is counted."""
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
    """Log file, TensorBoard, progress and clock.

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
        self._batch_size = config.batch_size
        self._log = LogFile(run.log, last_step=first_step) if is_main else None
        self._board = TensorBoardLog(run.tensorboard, last_step=first_step) if is_main and config.tensorboard else None
        progress = config.progress if is_main else "off"
        self._progress = Progress(progress, total_steps=total_steps, first_step=first_step)

    def step(self) -> None:
        """One step is done (or on its way on the device)."""
        self._progress.step()

    def write(self, *, step: int, epoch: float, lr: float, values: Mapping[str, float]) -> None:
        """One record of the steps since the last."""
        steps, seconds, waited = self.timer.lap(step)
        if self._log is None:
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
        self._log.write(self.last)
        if self._board is not None:
            self._board.write(self.last)
        self._progress.record(self.last, steps_per_second=steps / seconds)

    def sync(self) -> None:
        """Make all records durable."""
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()
