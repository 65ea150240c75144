"""What one start of a run writes for people: log records, TensorBoard, the progress on the terminal."""

import time
from collections.abc import Mapping
from typing import Any

from sslfast.metrics import LoaderTimer, LogFile, Progress, TensorBoardLog
from sslfast.rundir import RunDirectory
from sslfast.train_config import TrainConfig


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
