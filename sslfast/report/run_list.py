"""The runs below a folder as a table: state, progress, the settings that differ, best numbers."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sslfast.config import load_json, nearest
from sslfast.evaluation import TRAINED
from sslfast.runs import RunDirectory, read_log
from sslfast.text import csv_lines, printable

_PARTS = ("checkpoints", "tensorboard", "evaluation", "wandb", "mlflow")
"""Folders of a run directory, in which no run is looked for."""
_SCORES = ("top1", "mAP", "ap")
_ONLINE = ("knn_top1", "val_knn_top1", "val_linear_top1")
_MACHINE = ("recipe", "device", "progress", "loggers", "tensorboard", "log_every_steps", "checkpoint_every_steps")
"""Fields of a configuration that do not change what is learned, or that have a column."""


@dataclass(kw_only=True)
class RunSummary:
    """One run."""

    name: str
    """Path of its directory, from the folder that was searched."""
    recipe: str = ""
    state: Literal["running", "finished", "interrupted", "unreadable"] = "interrupted"
    """running: a process holds its lock. unreadable: its configuration or log is missing or damaged."""
    epochs: float = 0.0
    """Done, of ``epochs`` of its configuration."""
    of_epochs: int | None = None
    loss: float | None = None
    """Of the last log record."""
    scores: dict[str, float] = field(default_factory=dict)
    """Best value of each online accuracy (``knn_top1``, ...) and evaluation (by the name of its file), as a share."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Whole configuration by dotted names."""
    shown: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from those of another listed run of the recipe."""
    note: str = ""
    """What could not be read."""

    def value(self, column: str) -> Any:
        """Of a column: a field, a score or a setting; None where the run has none."""
        if column in ("name", "recipe", "state", "epochs", "loss"):
            return getattr(self, column)
        return self.scores.get(column, self.settings.get(column))

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        plain = {name: getattr(self, name) for name in ("name", "recipe", "state", "epochs", "of_epochs", "loss")}
        return {**plain, "scores": self.scores, "settings": self.shown, "note": self.note}


def list_runs(folder: Path) -> list[RunSummary]:
    """Summaries of all runs in and below a folder, by name. One that cannot be read is listed too, with a note.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name one that holds run directories of sslfast pretrain")
    found = [_summary(path, folder) for path in sorted(_find(folder))]
    if not found:
        raise ValueError(f"{folder} holds no run of sslfast pretrain; name another folder")
    for recipe in {run.recipe for run in found}:
        runs = [run for run in found if run.recipe == recipe and run.settings]
        names = dict.fromkeys(name for run in runs for name in run.settings if name not in _MACHINE)
        different = [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
        for run in runs:
            run.shown = {name: run.settings.get(name) for name in different}
    return found


def sort_runs(runs: Sequence[RunSummary], column: str) -> list[RunSummary]:
    """By a column: scores from the best on, else from the smallest; runs without a value come last.

    Raises:
        ValueError: no run has such a column.
    """
    _check(runs, [column])
    has_score = any(column in run.scores for run in runs)

    def key(run: RunSummary) -> tuple[bool, bool, float, str]:
        value = run.value(column)
        if isinstance(value, int | float) and value == value:
            return False, False, -value if has_score else float(value), ""
        return value is None or value != value, True, 0.0, str(value)

    return sorted(runs, key=key)


def render_runs(runs: Sequence[RunSummary], columns: Sequence[str] = ()) -> str:
    """A line for each run; without ``columns`` those that say something, with the settings that differ at the end."""
    _check(runs, columns)
    scores = list(dict.fromkeys(name for run in runs for name in run.scores))
    shown = list(columns) or ["name", "recipe", "state", "epochs", "loss", *scores]
    table = [shown, *([_cell(run, column) for column in shown] for run in runs)]
    widths = [max(len(row[i]) for row in table) for i in range(len(shown))]
    numbers = [all(_is_number(run.value(column)) for run in runs) for column in shown]
    lines = []
    for row, run in zip(table, [None, *runs], strict=True):
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numbers, strict=True)
        ]
        if not columns:
            cells.append(_settings(run))
        lines.append("  ".join(cells).rstrip())
    lines += [f"{printable(run.name)}: {run.note}" for run in runs if run.note]
    return "\n".join(lines)


def csv_of_runs(runs: Sequence[RunSummary], columns: Sequence[str] = ()) -> str:
    """A row for each run; without ``columns`` every field, score and differing setting has a column."""
    _check(runs, columns)
    named = [name for run in runs for name in (*run.scores, *run.shown)]
    shown = list(columns) or list(dict.fromkeys(["name", "recipe", "state", "epochs", "loss", *named]))
    table = ([run.value(column) for column in shown] for run in runs)
    plain = (
        ["" if v is None else v if isinstance(v, str | int | float) else json.dumps(v) for v in row] for row in table
    )
    return "".join(csv_lines([shown, *plain]))


def _find(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()  # folders that are linked to each other
    for place, folders, files in os.walk(folder, followlinks=True):
        try:
            status = os.stat(place)
        except OSError:  # deleted meanwhile
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        marks = {"versions.json", "log.jsonl", ".lock"} & set(files)
        if (
            "log.jsonl" in marks
            or (marks and "config.json" in files)
            or (".lock" in marks and "checkpoints" in folders)
        ):
            yield Path(place)
            folders[:] = [name for name in folders if name not in _PARTS]
        folders[:] = [name for name in folders if not name.startswith(".")]


def _summary(path: Path, folder: Path) -> RunSummary:
    name = str(path.relative_to(folder)) if path != folder else path.resolve().name
    run, directory, notes = RunSummary(name=name), RunDirectory(path), list[str]()
    config = _or_note(lambda: load_json(directory.config), notes) or {}
    run.settings = dict(_flat(config))
    run.recipe = str(config.get("recipe") or "")
    epochs = config.get("epochs")
    run.of_epochs = epochs if isinstance(epochs, int) else None
    records = _or_note(lambda: read_log(directory.log, report=lambda line: notes.append(line)), notes) or []
    numbers = [{k: float(v) for k, v in record.items() if _is_number(v)} for record in records]
    if numbers:
        run.epochs, run.loss = numbers[-1].get("epoch", 0.0), numbers[-1].get("loss")
    for score in _ONLINE:
        if values := [record[score] for record in numbers if record.get(score, -1.0) >= 0]:
            run.scores[score] = max(values)
    for file in sorted((path / "evaluation").glob("*.json")):
        result = _or_note(lambda file=file: load_json(file), notes)  # type: ignore[misc]
        if (best := _best(result)) is not None:
            run.scores[file.stem] = best
    is_locked = False
    with suppress(OSError):
        is_locked = directory.is_locked()
    if is_locked:
        run.state = "running"
    elif not config:
        run.state = "unreadable"
    elif run.of_epochs is not None and run.epochs >= run.of_epochs - 1e-6:
        run.state = "finished"
    run.note = "; ".join(notes)
    return run


def _best(result: Any) -> float | None:
    """Highest main score of the trained encoder among the rows of a result."""
    rows = result.get("results") if isinstance(result, Mapping) else None
    values = []
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and row.get("encoder", TRAINED) == TRAINED:
            values += [row[name] for name in _SCORES if _is_number(row.get(name)) and 0 <= row[name] <= 1][:1]
    return max(values, default=None)


def _or_note(read: Callable[[], Any], notes: list[str]) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:
        notes.append(" ".join(str(error).split()).partition(";")[0])
        return None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _check(runs: Sequence[RunSummary], columns: Sequence[str]) -> None:
    known = dict.fromkeys(["name", "recipe", "state", "epochs", "loss"])
    known |= dict.fromkeys(name for run in runs for name in run.scores)
    settings = dict.fromkeys(name for run in runs for name in run.settings)
    for column in columns:
        if column not in known and column not in settings:
            near = nearest(column, [*known, *settings])
            hint = near if near.startswith("did") else f"known: {', '.join(known)}, and every setting"
            raise ValueError(f"no run has a column {column!r}; {hint}")


def _cell(run: RunSummary, column: str) -> str:
    value = run.value(column)
    if column == "epochs":
        return f"{run.epochs:g}/{'?' if run.of_epochs is None else run.of_epochs}"
    if column in run.scores:
        return f"{100 * run.scores[column]:.1f} %"
    if value is None:
        return "-"
    return printable(f"{value:.4g}" if isinstance(value, float) else str(value))


def _settings(run: RunSummary | None) -> str:
    if run is None:
        return "settings that differ"
    return " ".join(f"{name}={printable(_text(value))}" for name, value in run.shown.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
