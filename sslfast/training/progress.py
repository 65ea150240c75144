"""Progress of a run on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

_SCORES = {"knn_top1": "kNN", "val_knn_top1": "val kNN", "val_linear_top1": "val linear"}
"""Accuracies in a record, with their words on the screen."""


class Progress:
    """A bar, one line per log record, or nothing. A :class:`~sslfast.training.logging.Logger`.

    Args:
        mode: ``auto`` (bar on a terminal with rich installed, else lines), ``bar``, ``plain`` or ``off``.
        total_steps: steps of the whole run.
        first_step: steps that were finished before this process.
        batch_size: samples of a step.
        stream: standard error by default.
    """

    def __init__(
        self, mode: str, *, total_steps: int, first_step: int, batch_size: int, stream: TextIO | None = None
    ) -> None:
        self._total, self._step, self._batch_size = total_steps, first_step, batch_size
        self._stream = stream or sys.stderr
        self._steps_per_second = 0.0
        self._bar: Any = None
        self._mode = mode
        if mode == "bar" or (mode == "auto" and self._stream.isatty()):
            self._start_bar(required=mode == "bar")

    def step(self) -> None:
        """One step is done (or queued on the device)."""
        self._step += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Show a log record."""
        clock = record["time"]
        steps_per_second = clock["samples_per_second"] / self._batch_size
        smoothed = self._steps_per_second or steps_per_second
        self._steps_per_second = 0.5 * smoothed + 0.5 * steps_per_second
        status = (
            f"loss {record['loss']:.4f}  {clock['samples_per_second']:.0f} samples/s  "
            f"waiting for data {clock['loader_wait_share']:.0%}  left {self._left(record['step'])}"
        )
        scores = [f"{words} {record[name]:.1%}" for name, words in _SCORES.items() if name in record]
        epoch = f"epoch {record['epoch']:.2f}"
        if self._bar is not None:
            if scores:  # a line of their own: the next record replaces what the bar says
                self._bar.console.print("  ".join([epoch, *scores]), highlight=False)
            self._bar.update(self._task, status=status)
        elif self._mode != "off":
            step = f"step {record['step']}/{self._total}"
            line = "  ".join([step, epoch, f"lr {record['lr']:.4g}", *scores, status])
            print(line, file=self._stream, flush=True)

    def sync(self) -> None:
        """Nothing to make durable."""

    def close(self) -> None:
        """Leave the bar as it is."""
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
            from rich.table import Column
        except ImportError:
            if required:
                raise ValueError("progress=bar needs the package rich; pip install rich, or --progress plain") from None
            return
        # On a narrow terminal first the bar is short, then the status takes a second line.
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=False)),
        )
        self._bar = Bar(*columns, console=Console(file=self._stream), refresh_per_second=4, expand=True)
        self._task = self._bar.add_task("", total=self._total, completed=self._step, status="starting")
        self._bar.start()
