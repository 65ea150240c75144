"""``log.jsonl``: one JSON record per line, appended while training and truncated when a run is resumed."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LogFile:
    """``log.jsonl``: one JSON object per log record, in the order of steps; what depends on the clock is under "time".

    Opening it removes everything after step ``last_step`` (and an incomplete line that a kill has left), so that the
    log of a resumed run equals that of an uninterrupted one.
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
        self._file = path.open("ab", buffering=0)  # unbuffered: nothing is left for close, which could fail too

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; other processes can read it at once.

        Raises:
            OSError: names the file, the reason and the remedy.
        """
        line = f"{json.dumps(record)}\n".encode()
        with self._explained():
            if self._file.write(line) != len(line):  # a partial line, which the next start removes
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Make all records durable, before a checkpoint that relies on them. Raises as :meth:`write` does."""
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write {self._path} ({error.strerror}); free some space or correct the disk, "
                "the same command then resumes from the last checkpoint"
            ) from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a ``log.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _record_step(line: bytes) -> int | None:
    """Step of a complete log line; None if the line is incomplete or no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None
