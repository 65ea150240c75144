"""The log as a table for spreadsheets."""

import csv
import os
from collections.abc import Mapping
from io import StringIO
from itertools import takewhile
from typing import Any

from sslfast.files import replacing
from sslfast.training.logging import LogContext, Logger


class CSVLog(Logger):
    """``log.csv`` in the run directory: a row for each record, ``time/`` before what depends on the clock.

    A value that first appears in a later record becomes a new column, empty in the rows before. At a resume, records
    after the step of the checkpoint and a row that a kill has left incomplete are removed.
    """

    def __init__(self, context: LogContext) -> None:
        self._path = context.run.path / "log.csv"
        rows = [row for row in self._read() if int(row["step"]) <= context.first_step]
        self._replace(list(dict.fromkeys(name for row in rows for name in row)), rows)

    def write(self, record: Mapping[str, Any]) -> None:
        row = {**record, **{f"time/{name}": value for name, value in record["time"].items()}}
        del row["time"]
        if not row.keys() <= set(self._columns):
            rows = self._read()
            self._file.close()
            self._replace(list(dict.fromkeys([*self._columns, *row])), rows)
        text = StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        self._file.write(text.getvalue().encode())

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[dict[str, str]]:
        """Rows of the file up to one that a crash has damaged; values that a row does not have are left out."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        table = csv.DictReader(line for line in lines if line.endswith("\n"))
        rows = takewhile(lambda row: (row.get("step") or "").isdecimal(), table)
        return [{name: value for name, value in row.items() if value} for row in rows]

    def _replace(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        with replacing(self._path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            if columns:
                table.writeheader()
            table.writerows(rows)
        self._columns = columns
        self._file = self._path.open("ab", buffering=0)
