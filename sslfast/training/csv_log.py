"""The log as a table for spreadsheets."""

import csv
from collections.abc import Mapping
from contextlib import suppress
from io import StringIO
from typing import Any

from sslfast.files import AppendFile, open_regular, write_file
from sslfast.runs import read_log
from sslfast.training.logging import LogContext, Logger


class CSVLog(Logger):
    """``log.csv`` in the run directory: a row for each record, ``time/`` before what depends on the clock.

    A value that first appears in a later record becomes a new column, empty in the rows before. At a resume, records
    after the step of the checkpoint and lines that are no rows are removed; rows that are missing or damaged are taken
    from ``log.jsonl``.
    """

    def __init__(self, context: LogContext) -> None:
        self._run = context.run
        rows: dict[int, dict[str, Any]] = {}
        with suppress(ValueError):  # log.jsonl has spoken of its own damage
            rows = {record["step"]: _row(record) for record in read_log(context.run.log, report=lambda _line: None)}
        own, damaged = self._read()
        if damaged:
            context.report(f"{self._run.path / 'log.csv'}: left out {damaged} lines that are no rows of the log")
        kept = [row for step, row in sorted((rows | own).items()) if step <= context.first_step]
        self._replace(list(dict.fromkeys(name for row in kept for name in row)), kept)

    def write(self, record: Mapping[str, Any]) -> None:
        row = _row(record)
        if not row.keys() <= set(self._columns):
            old = self._file
            self._replace(list(dict.fromkeys([*self._columns, *row])), [*self._read()[0].values()])
            old.close()
        text = StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        self._file.write(text.getvalue().encode())

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> tuple[dict[int, dict[str, Any]], int]:
        """Whole rows of the file by step, and how many lines are none; values that a row does not have are left out."""
        content = b""
        with suppress(FileNotFoundError), open_regular(self._run.path / "log.csv") as file:
            content = file.read()
        rows: dict[int, dict[str, Any]] = {}
        columns: list[str] = []
        damaged = 0
        for line in content.decode("utf-8", "replace").split("\n")[:-1]:  # the last is empty, or not complete
            values = _cells(line)
            if not columns and "step" in values:
                columns = values
                continue
            row = {name: value for name, value in zip(columns, values, strict=False) if value}
            step = row.get("step", "")
            if len(values) == len(columns) and step.isdecimal() and len(step) < 20:
                rows[int(step)] = row
            else:
                damaged += bool(line.strip())
        return rows, damaged

    def _replace(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        if columns:
            table.writeheader()
        table.writerows(rows)
        self._run.follow()
        path = self._run.path / "log.csv"
        write_file(path, text.getvalue())
        self._file, self._columns = AppendFile(path), columns


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r")]), [])
    except csv.Error:
        return []


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    clock = record.get("time")
    row = {**record, **{f"time/{name}": value for name, value in (clock or {}).items()}}
    row.pop("time", None)
    return row
