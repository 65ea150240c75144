"""What a run reports: device-side means, the JSON-lines log, TensorBoard, and the line or bar on the terminal."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor

from sslfast.distributed import max_over_ranks, mean_over_ranks, world_size

T = TypeVar("T")


class DeviceMeans:
    """Means of 0-d tensors over many steps, kept on the device and read in one transfer.

    Sums are float64. The first step whose ``loss`` was not finite is kept too, so the check needs no sync of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, values: Mapping[str, Tensor], *, step: Tensor) -> None:
        """Add one step's values; ``step``: 0-d int64 on the device. No host sync."""
        for name, value in values.items():
            value = value.detach().to(torch.float64, copy=True)  # a captured graph writes over its own in the next step
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        is_first_bad = (self._bad_step < 0) & ~torch.isfinite(values["loss"].detach())
        self._bad_step = torch.where(is_first_bad, step, self._bad_step)
        self.count += 1

    def read(self) -> tuple[dict[str, float], int | None]:
        """``(means, first step with a loss that is not finite or None)`` of all ranks since the last :meth:`reset`."""
        self._merge_ranks()
        names = list(self.sums)
        packed = torch.stack([self._bad_step.to(torch.float64), *(self.sums[name] for name in names)])
        bad_step, *sums = packed.tolist()  # host sync: the only one of a log interval
        means = {name: total / max(self.count, 1) for name, total in zip(names, sums, strict=True)}
        return means, None if bad_step < 0 else int(bad_step)

    def _merge_ranks(self) -> None:
        """Makes sums the means over ranks: the same on each, and what the interval goes on from."""
        if world_size() == 1 or not self.sums:
            return
        merged = mean_over_ranks(torch.stack(list(self.sums.values())))
        self.sums = dict(zip(self.sums, merged.unbind(), strict=True))
        self._bad_step = max_over_ranks(self._bad_step)

    def reset(self) -> None:
        """Start the next interval."""
        self.sums, self.count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint inside an interval needs."""
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an interval."""
        self.count = int(state["count"])
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}


class LogFile:
    """``log.jsonl``: one JSON table per log record, in the order of steps; what depends on the clock is under "time".

    Opening it cuts off everything after step ``last_step`` (and a line cut short by a kill), so that the log of a
    resumed run equals that of an uninterrupted one.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        keep = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    step = _record_step(line)
                    if step is None or step > last_step:
                        break
                    keep += len(line)
            os.truncate(path, keep)
        self._path = path
        self._file = path.open("ab", buffering=0)  # nothing is left for close, which could fail anew

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, readable by others at once.

        Raises:
            OSError: names the file, the reason and the remedy.
        """
        line = f"{json.dumps(record)}\n".encode()
        with self._explained():
            if self._file.write(line) != len(line):  # what there was room for; the next start cuts it off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Make all records durable; called before a checkpoint that counts on them. Raises as :meth:`write` does."""
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write {self._path} ({error.strerror}); free some space or correct the disk, "
                "the same command then goes on from the last checkpoint"
            ) from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a ``log.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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


def _record_step(line: bytes) -> int | None:
    """Step of a complete log line, None where the line is cut short or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
