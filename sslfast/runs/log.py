"""``log.jsonl``: one JSON record per line, appended while training and truncated when a run is resumed."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sslfast.files import AppendFile, open_regular, write_file


def print_error(line: str) -> None:
    """Print one line for the user on standard error."""
    print(f"sslfast: {line}", file=sys.stderr, flush=True)


class LogFile:
    """``log.jsonl``: one JSON object per log record, in the order of steps; what depends on the clock is under "time".

    Opening it removes the records after step ``last_step``, so that the log of a resumed run equals that of an
    uninterrupted one, and lines that are no records. Every record before that step is kept.

    Args:
        path: created if it does not exist.
        last_step: of the checkpoint that the run resumes from; 0: a new run.
        report: takes one line about lines in the middle of the file that are no records.
    """

    def __init__(self, path: Path, *, last_step: int, report: Callable[[str], None] = print_error) -> None:
        try:
            with open_regular(path) as file:
                before = file.read()
        except FileNotFoundError:
            before = b""
        kept = b"".join(line for record, line in _records(path, before, report) if record["step"] <= last_step)
        if not before.startswith(kept):
            write_file(path, kept)
        elif kept != before:
            os.truncate(path, len(kept))  # needs no space
        self._file = AppendFile(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; other processes can read it at once.

        Raises:
            OSError: nothing of it was written; it may be tried again.
        """
        self._file.write(f"{json.dumps(record)}\n".encode())

    def sync(self) -> None:
        """Make all records durable, before a checkpoint that relies on them. Raises OSError."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path, *, report: Callable[[str], None] = print_error) -> list[dict[str, Any]]:
    """Records of a ``log.jsonl``, also of a run that is writing it: a last line that is not complete is left out.

    Other lines that are no records are left out too, with one line for ``report``. No file: no records.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct that, or move it away") from None
    return [record for record, _line in _records(path, content, report)]


def _records(path: Path, content: bytes, report: Callable[[str], None]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Records with their lines. What a kill leaves, a last line that is not complete, is not worth a word."""
    lines = content.split(b"\n")
    damaged = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            yield record
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        count = f"{len(damaged)} line{'s' * (len(damaged) > 1)}"
        report(f"{path}: left out {count} that are no log records: {shown}; every other record is kept")


def _record(line: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The record of a line, and the line without what a crash may have left before it; None where there is none."""
    line = line.strip(b"\0 \t\r")
    for start in (0, max(line.rfind(b'{"step"'), 0)):
        try:
            record = json.loads(line[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            return record, line[start:] + b"\n"
    return None
