"""Result files: their paths, what they record, and how they are written."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sslfast.config import save_json
from sslfast.data import Manifest
from sslfast.distributed import is_main
from sslfast.evaluation.encoders import TRAINED, RunEncoders
from sslfast.evaluation.preprocessing import Preprocessing, describe
from sslfast.files import OUTPUT, WriteError
from sslfast.runs import is_sharded


def evaluation_folder(run: Path | str) -> Path:
    """Folder of the results: ``evaluation`` in a run directory, ``FILE.evaluation`` beside a file of weights or a
    sharded checkpoint."""
    path = Path(run)
    beside = path.is_file() or is_sharded(path)
    return path.with_name(f"{path.name}.evaluation") if beside else path / "evaluation"


def cache_folder(run: Path | str) -> Path:
    """Folder of the cached features of a run or of a file of weights."""
    return evaluation_folder(run) / "features"


def run_facts(
    run: Path | str,
    loaded: RunEncoders,
    size: int,
    seen: Preprocessing | None = None,
    readers: Sequence[str] = ("pillow",),
) -> dict[str, Any]:
    """The weights that a result is about (run, checkpoint, model, hash), and what was seen of an image, of which
    ``readers`` are the loaders."""
    return {
        "run": str(Path(run)),
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        **loaded.facts,
        "weights": loaded.encoders[TRAINED].identity()["weights"],
        "size": size,
        **({} if seen is None else {"preprocessing": describe(seen, size, readers)}),
    }


def departures(published: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """How settings depart from the published ones: ``["epochs: 10, published 28"]``; empty for the protocol itself."""
    plain = {name: (used[name], value) for name, value in published.items() if name in used}
    return [f"{name}: {now}, published {then}" for name, (now, then) in plain.items() if now != then]


def data_facts(data: Path | str, manifests: Sequence[Manifest], counts: Sequence[int]) -> dict[str, Any]:
    """The images that a result is about: of ``train`` and ``val`` the number used, the number left out, the hash."""
    return {
        "root": str(Path(data)),
        "classes": len(manifests[0].classes),
        **{name: value for name, value in asdict(manifests[0].source.decoding).items() if value is not None},
        **{
            split: {
                "images": count,
                "left_out": len(manifest.excluded) + len(manifest) - count,
                "digest": manifest.digest(),
            }
            for split, manifest, count in zip(("train", "val"), manifests, counts, strict=True)
        },
    }


def standard_error(share: float, count: int) -> float:
    """Binomial standard error of a share of ``count`` independent trials: ``sqrt(p (1 - p) / n)``."""
    return float((share * (1 - share) / count) ** 0.5)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard deviation of a sample (divisor n - 1; 0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy_row(pairs: Sequence[tuple[float, float]], count: int) -> dict[str, Any]:
    """Mean top-1 and top-5 over seeds, their spread and the binomial standard error on ``count`` images."""
    top1, spread1 = mean_and_spread([pair[0] for pair in pairs])
    top5, spread5 = mean_and_spread([pair[1] for pair in pairs])
    return {
        "top1": top1,
        "top1_standard_error": standard_error(top1, count),
        "top1_spread": spread1,
        "top5": top5,
        "top5_standard_error": standard_error(top5, count),
        "top5_spread": spread5,
        "top1_of_seeds": [pair[0] for pair in pairs],
        "top5_of_seeds": [pair[1] for pair in pairs],
    }


class ResultNotWritten(WriteError):
    """The file of a result could not be written. The command prints the result all the same."""

    result: dict[str, Any]
    """As :func:`write_result` got it."""


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, atomically, on the first rank.

    Raises:
        ResultNotWritten: it could not be written; the exception holds it.
    """
    if is_main():
        try:
            save_json(path, result)
        except OSError as error:
            failed = ResultNotWritten(error, path, remedy=OUTPUT)
            failed.result = result
            raise failed from None
