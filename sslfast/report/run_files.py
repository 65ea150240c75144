"""The files of a run directory that a report shows. None of them is trusted: what has another shape is left out, and a
note says so."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sslfast.config import load_json
from sslfast.data import BadImageError, decode_full, quiet_pillow, read_bytes
from sslfast.report.charts import drawable, number
from sslfast.runs import RunDirectory, read_log

_SCORES = {
    "top1": "top-1", "top5": "top-5", "mAP": "mAP", "mAP_11_point": "mAP (11 points)", "ap": "AP", "ap50": "AP50",
    "ap75": "AP75", "voc07_ap": "AP (VOC07)", "voc07_ap50": "AP50 (VOC07)", "voc07_ap75": "AP75 (VOC07)",
}  # fmt: skip
"""Scores in the rows of a result that are shares, with their headings; a row without any shows all of its numbers."""
_MOST_ROWS = 500
_MOST_NAMES = 100
_MOST_CHARACTERS = 200
_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A line of the table of evaluations."""

    protocol: str
    what: str
    """Encoder, layer, images."""
    scores: str


class Run:
    """What a run directory holds.

    Raises:
        FileNotFoundError, ValueError: the path is no run directory.
    """

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise ValueError(f"{path} is a file; a report needs run directories that sslfast pretrain wrote")
        directory = RunDirectory(path)
        self.path, self.name = path, path.resolve().name
        self.notes: list[str] = []
        """What was left out and why, a line each."""
        self.config = self._table(directory.config, "the configuration is left out; restore the file")
        self.records = self._records(directory.log)
        self.results = [row for file in self._inside("*.json") for row in self._rows(file)]
        if len(self.results) > _MOST_ROWS:
            self.notes.append(f"{path}: {_MOST_ROWS} of {len(self.results):,} results are shown")
            self.results = self.results[:_MOST_ROWS]
        self.pictures = [found for file in self._inside("detect*.png") for found in self._picture(file)]

    def word(self, *keys: str) -> str:
        """A value of the configuration, by the keys that lead to it; empty where it is missing."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, str | int | float):
            self.notes.append(f"{self.path / 'config.json'}: {'.'.join(keys)} is a {type(value).__name__}: left out")
        return _short(value)

    def settings(self) -> dict[str, str]:
        """Every value of the configuration by its dotted name."""
        return {name: _short(value) or json.dumps(value)[:_MOST_CHARACTERS] for name, value in _flat(self.config)}

    def _inside(self, pattern: str) -> list[Path]:
        return sorted((self.path / "evaluation").glob(pattern))

    def _table(self, path: Path, words: str) -> dict[str, Any]:
        try:
            return load_json(path)
        except FileNotFoundError:
            raise
        except ValueError as error:
            self.notes.append(f"{str(error).partition(';')[0]}: {words}")
            return {}

    def _records(self, path: Path) -> list[dict[str, float]]:
        """Numbers by dotted name; of each record, those that a curve can show."""
        try:
            records = read_log(path, report=self.notes.append)
        except ValueError as error:
            self.notes.append(str(error))
            return []
        flat = [dict(_flat(record)) for record in records]
        names = dict.fromkeys(name for record in flat for name in record)
        shown = set(list(names)[:_MOST_NAMES])
        if len(names) > len(shown):
            self.notes.append(f"{path}: {len(shown)} of its {len(names):,} values are shown")
        left_out: dict[str, int] = {}
        found = []
        for record in flat:
            values = {name: float(v) for name, v in record.items() if name in shown and _is_drawable(v)}
            for name in record.keys() & shown - values.keys():
                left_out[name] = left_out.get(name, 0) + 1
            if "epoch" in values:
                found.append(values)
            elif "epoch" not in record:
                left_out["epoch"] = left_out.get("epoch", 0) + 1
        for name, count in sorted(left_out.items()):
            words = "records without it are left out" if name == "epoch" else "left out"
            self.notes.append(f"{path}: {_short(name)} is no finite number in {count} of {len(flat)} records: {words}")
        return found

    def _rows(self, path: Path) -> Iterator[ResultRow]:
        try:
            result = self._table(path, "left out; evaluate again to replace it")
        except FileNotFoundError:  # deleted meanwhile, or a link to nothing
            return
        rows = result.get("results")
        if not isinstance(rows, list):
            if result:
                self.notes.append(f"{path} holds no list of results: left out; evaluate again to replace it")
            return
        wrong = []
        for row in rows:
            if not isinstance(row, Mapping):
                wrong.append("a row that is no table")
                continue
            wrong += [
                name for name in _SCORES if isinstance(row.get(name), float | int | str) and not _is_share(row[name])
            ]
            values = [_score(words, row, name) for name, words in _SCORES.items() if _is_share(row.get(name))]
            if not values and not wrong:
                values = [f"{_short(name)} {number(v)}" for name, v in row.items() if type(v) is float and drawable(v)]
            what = [_short(row[name]) for name in ("encoder", "layer", "images") if name in row]
            what += [f"{name}={_short(row[name])}" for name in ("k", "fraction") if name in row]
            protocol = _short(row.get("protocol", result.get("protocol")))
            yield ResultRow(protocol=protocol, what=", ".join(what), scores=", ".join(values[:_MOST_NAMES]))
        if wrong:
            self.notes.append(
                f"{path}: {', '.join(dict.fromkeys(wrong))} without a share in [0, 1]: left out; evaluate again to "
                "replace the file"
            )

    def _picture(self, path: Path) -> Iterator[tuple[str, Image.Image]]:
        try:
            with quiet_pillow():
                yield path.stem, Image.fromarray(decode_full(read_bytes(path)))
        except BadImageError as error:
            self.notes.append(f"{path} cannot be used ({error.reason}): left out")


def _flat(record: Mapping[str, Any], prefix: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and depth:
            yield from _flat(value, f"{prefix}{name}.", depth - 1)
        else:
            yield prefix + name, value


def _score(words: str, row: Mapping[str, Any], name: str) -> str:
    """A share in percent with what is known of its error: the binomial standard error, and the spread over seeds."""
    shares = {key: float(value) for key, value in row.items() if _is_share(value)}
    error, spread, seeds = (
        shares.get(f"{name}_standard_error"),
        shares.get(f"{name}_spread"),
        row.get(f"{name}_of_seeds"),
    )
    shown = f"{words} {100 * shares[name]:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"
    if spread is not None and isinstance(seeds, list) and len(seeds) > 1:
        shown += f" (spread of {len(seeds)} seeds {100 * spread:.1f})"
    return shown


def _is_drawable(value: Any) -> bool:
    return isinstance(value, int | float) and drawable(value)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _short(value: Any) -> str:
    """A value as text; empty for None and what is no plain value."""
    shown = str(value) if isinstance(value, str | int | float) else ""
    return shown if len(shown) <= _MOST_CHARACTERS else shown[:_MOST_CHARACTERS] + "..."
