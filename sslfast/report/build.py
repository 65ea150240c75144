"""``sslfast report``: one self-contained HTML page about one or several runs.

A run directory provides its configuration, curves and evaluation results. With labelled images (``--data``) the page
also shows what each run's encoder makes of them: per-class accuracy and confusion matrix of a linear probe, nearest
neighbours, and a map of the embeddings (t-SNE of scikit-learn; van der Maaten & Hinton 2008) with thumbnails.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslfast.config import load_json
from sslfast.data import ImageLocation, decode_full, quiet_pillow
from sslfast.evaluation import (
    L2_STRENGTHS,
    TRAINED,
    EvaluationSet,
    FeatureConfig,
    load_evaluation_set,
    nearest_neighbours,
    train_probe,
)
from sslfast.files import OUTPUT, write_file
from sslfast.report.charts import figure, line_chart, number, scatter_chart
from sslfast.report.neighbours import choose_queries
from sslfast.report.page import legend, page, table
from sslfast.report.published import PUBLISHED
from sslfast.runs import RunDirectory, read_log

_FIRST = ("loss", "time.samples_per_second", "time.loader_wait_share", "lr")
_WORDS = {
    "time.samples_per_second": "samples/s",
    "time.loader_wait_share": "share of time waiting for data",
    "lr": "learning rate",
}
_SCORES = {
    "top1": "top-1", "top5": "top-5", "mAP": "mAP", "mAP_11_point": "mAP (11 points)", "ap": "AP", "ap50": "AP50",
    "ap75": "AP75", "voc07_ap": "AP (VOC07)", "voc07_ap50": "AP50 (VOC07)", "voc07_ap75": "AP75 (VOC07)",
}  # fmt: skip
"""Scores in the rows of a result that are shares, with their headings; a row without any shows all of its numbers."""
_TILE = 48  # pixels of a picture in the map's sprite
_MOST_CLASSES = 30  # rows of the per-class table; of more classes, the best and the worst


@dataclass(frozen=True, kw_only=True)
class ReportConfig(FeatureConfig):
    """Settings of :func:`report`."""

    points: int = 1000
    """Validation images on the embedding map."""
    queries: int = 10
    """Rows of the nearest-neighbour section."""
    neighbours: int = 8
    """Images in each of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("points", "queries", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)}")


class Run:
    """The files of a run directory that a report shows."""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            raise ValueError(f"{path} is a file; a report needs run directories that sslfast pretrain wrote")
        directory = RunDirectory(path)
        self.path, self.name = path, path.resolve().name
        self.config = load_json(directory.config)
        self.records = [_flat(record) for record in read_log(directory.log)] if directory.log.exists() else []
        self.results = [load_json(file) for file in sorted((path / "evaluation").glob("*.json"))]
        self.pictures = sorted((path / "evaluation").glob("detect*.png"))


def report(
    runs: tuple[Path, ...],
    /,
    config: ReportConfig = ReportConfig(),
    *,
    output: Path = Path("report.html"),
    data: Path | None = None,
) -> Path:
    """One self-contained HTML page about one or more runs.

    Args:
        runs: run directories that sslfast pretrain wrote.
        config: of the sections that need data.
        output: file to write.
        data: folder with train/<class>/ and val/<class>/: adds accuracy by class, nearest neighbours and the embedding
            map.

    Raises:
        ValueError, FileNotFoundError: no run, or one of them is no run directory.
    """
    if not runs:
        raise ValueError("there is no run to report on; give at least one run directory")
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"output must end in .html, got {str(output)!r}")
    found = [Run(Path(path)) for path in runs]
    _name_apart(found)
    sections = [
        ("Runs", _summary(found)),
        ("Curves", _curves(found)),
        ("Evaluations", _evaluations(found)),
    ]
    for run in found:
        if data is None:
            break
        evaluation = load_evaluation_set(run.path, data, config)
        suffix = f", {run.name}" if len(found) > 1 else ""
        sections += [
            (f"Accuracy by class{suffix}", _by_class(evaluation)),
            (f"Nearest neighbours{suffix}", _neighbour_rows(evaluation, queries=config.queries, k=config.neighbours)),
            (f"Embedding map{suffix}", _embedding_map(evaluation, most=config.points)),
        ]
    sections += [
        ("Detections", "".join(_picture(path) for run in found for path in run.pictures)),
        ("Published results on ImageNet", _published()),
    ]
    title = f"sslfast: {', '.join(run.name for run in found)}"
    subtitle = ", ".join(sorted({str(run.config.get("recipe", "")) for run in found}))
    write_file(output, page(title, f"recipe {subtitle}", sections), remedy=OUTPUT)
    return output


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat


def _name_apart(runs: Sequence[Run]) -> None:
    """Runs in folders of one name get the folder above in front."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"


def _summary(runs: Sequence[Run]) -> str:
    rows: list[list[str | float]] = []
    for run in runs:
        last = run.records[-1] if run.records else {}
        model, method = run.config.get("model", {}), run.config.get("method", {})
        rates = [r["time.samples_per_second"] for r in run.records if "time.samples_per_second" in r]
        rows.append(
            [
                run.name,
                str(run.config.get("recipe", "")),
                str(method.get("name", "")),
                f"{model.get('name', '')} ({model.get('stem', '')})",
                f"{last.get('epoch', 0):g} of {run.config.get('epochs', '?')}",
                f"{last.get('step', 0):,.0f}",
                str(run.config.get("batch_size", "")),
                number(last["loss"]) if "loss" in last else "",
                number(float(np.median(rates))) if rates else "",
            ]
        )
    header = ["run", "recipe", "method", "trunk", "epochs", "steps", "batch", "loss", "samples/s (median)"]
    return table(header, rows)


def _curves(runs: Sequence[Run]) -> str:
    names = {name: None for run in runs for record in run.records for name in record}
    others = [name for name in names if name not in (*_FIRST, "step", "epoch") and not name.startswith("time.")]
    charts = []
    for name in [*(n for n in _FIRST if n in names), *others]:
        series = {
            run.name: [(record["epoch"], record[name]) for record in run.records if name in record] for run in runs
        }
        charts.append(line_chart(_WORDS.get(name, name), series, x_label="epoch"))
    if not any(charts):
        return "<p>No log record was written yet.</p>"
    names_of_runs = legend([run.name for run in runs]) if len(runs) > 1 else ""
    return f'{names_of_runs}<div class="grid2">{"".join(charts)}</div>'


def _evaluations(runs: Sequence[Run]) -> str:
    rows: list[list[str | float]] = []
    for run in runs:
        for result in run.results:
            for row in result.get("results", []):
                found = {words: row.get(name) for name, words in _SCORES.items()}
                values = [f"{words} {100 * v:.1f} %" for words, v in found.items() if isinstance(v, float)]
                values = values or [f"{name} {number(v)}" for name, v in row.items() if isinstance(v, float)]
                which = [str(row[name]) for name in ("encoder", "layer", "images") if name in row]
                which += [f"{name}={row[name]}" for name in ("k", "fraction") if name in row]
                protocol = str(row.get("protocol", result.get("protocol", "")))
                rows.append([run.name, protocol, ", ".join(which), ", ".join(values)])
    if not rows:
        return "<p>None yet: <code>sslfast evaluate knn RUN DATA</code> makes one.</p>"
    return table(["run", "protocol", "what", "result"], rows)


def _by_class(evaluation: EvaluationSet) -> str:
    """Accuracy of the linear probe for every class, its confusion matrix and the pairs most often confused."""
    classes = len(evaluation.classes)
    probe = train_probe(
        evaluation.train[TRAINED], evaluation.train_labels, classes=classes, strengths=L2_STRENGTHS[1:4]
    )
    predicted = probe(evaluation.val[TRAINED]).argmax(1)
    confusion = confusion_matrix(predicted, evaluation.val_labels, classes)
    counts = confusion.sum(1)
    share = confusion.diagonal() / counts.clamp(min=1)
    overall = confusion.diagonal().sum() / counts.sum()
    order = [i for i in share.argsort(descending=True).tolist() if counts[i] > 0]
    shown = order if len(order) <= _MOST_CLASSES else [*order[: _MOST_CLASSES // 2], *order[-_MOST_CLASSES // 2 :]]
    rows: list[list[str | float]] = [
        [
            escape(evaluation.classes[i]),
            f'<span class="bar" style="width:{160 * float(share[i]):.0f}px"></span> {100 * float(share[i]):.0f} %',
            int(counts[i]),
        ]
        for i in shown
    ]
    off = confusion - confusion.diagonal().diag()
    worst = [divmod(k, classes) for k in off.flatten().argsort(descending=True, stable=True)[:10].tolist()]
    pairs: list[list[str | float]] = [
        [evaluation.classes[a], evaluation.classes[b], int(off[a, b])] for a, b in worst if off[a, b] > 0
    ]
    words = (
        f"Linear probe on the frozen trunk: {100 * float(overall):.1f} % of {int(counts.sum()):,} validation images."
    )
    if len(order) > len(shown):
        words += f" Best and worst {_MOST_CLASSES // 2} of {len(order)} classes."
    return (
        f'<p>{words}</p><div class="grid2"><div>{table(["class", "right", "images"], rows, html=True)}</div><div>'
        f"<h3>Confusion</h3><p class='faint'>Rows: true class, columns: predicted, in the order of the folders; darker "
        f"is more often.</p>{_heat_map(confusion)}<h3>Most often confused</h3>"
        f"{table(['true', 'predicted', 'images'], pairs)}</div></div>"
    )


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``[classes, classes]`` float64 counts: true class down, predicted class across."""
    flat = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).double()


def _heat_map(confusion: Tensor) -> str:
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    level = share.sqrt()[..., None].numpy()  # the root: rare confusions stay visible
    light, dark = np.array([245, 247, 249.0]), np.array([23, 58, 128.0])
    picture = Image.fromarray((light + level * (dark - light)).round().astype(np.uint8))
    factor = max(1, 400 // len(confusion))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return f'<img class="picture" alt="confusion matrix" src="{data_url(picture, "PNG")}">'


def _neighbour_rows(evaluation: EvaluationSet, *, queries: int, k: int) -> str:
    rows = choose_queries(evaluation.val_labels, queries)
    k = min(k, len(evaluation.train_labels))
    similarity, found = nearest_neighbours(evaluation.val[TRAINED][rows], evaluation.train[TRAINED], k)
    parts = []
    for position, row in enumerate(rows.tolist()):
        label = int(evaluation.val_labels[row])
        tiles = [_tile(evaluation.val_locations[row], evaluation.classes[label], "")]
        for value, neighbour in zip(similarity[position].tolist(), found[position].tolist(), strict=True):
            other = int(evaluation.train_labels[neighbour])
            words = f"{evaluation.classes[other]}, cosine {value:.3f}"
            tiles.append(_tile(evaluation.train_locations[neighbour], words, "same" if other == label else "other"))
        name = f'<span class="faint">{escape(evaluation.classes[label])}</span>'
        parts.append(f'<div class="tiles">{name}{"".join(tiles)}</div>')
    words = "A validation image, then the training images most similar to it: green, of its class; red, of another."
    return f"<p>{words}</p>{''.join(parts)}"


def _embedding_map(evaluation: EvaluationSet, *, most: int) -> str:
    total = len(evaluation.val_labels)
    rows = torch.arange(min(most, total)) * total // min(most, total)
    positions = embed_in_plane(evaluation.val[TRAINED][rows])
    columns = math.ceil(math.sqrt(len(rows)))
    sprite = Image.new("RGB", (columns * _TILE, -(-len(rows) // columns) * _TILE))
    points = []
    with quiet_pillow():
        for i, row in enumerate(rows.tolist()):
            location = evaluation.val_locations[row]
            sprite.paste(_thumbnail(location, _TILE), (i % columns * _TILE, i // columns * _TILE))
            x, y = (round(v, 4) for v in positions[i].tolist())
            points.append([x, y, int(evaluation.val_labels[row]), Path(str(location)).name])
    data = {
        "points": points,
        "classes": evaluation.classes,
        "columns": columns,
        "tile": _TILE,
        "sprite": data_url(sprite, "JPEG"),
    }
    body = (
        '<div class="map"><canvas width="1200" height="900" aria-label="embedding map"></canvas>'
        '<div class="shown"><div class="thumb"></div><div class="words faint">Point at a dot, or touch it.</div></div>'
        "</div>"
    )
    return figure(f"t-SNE of {len(rows):,} validation images", body, note="one colour a class", data=data, kind="map")


def embed_in_plane(features: Tensor) -> Tensor:
    """``[N, D]`` features to ``[N, 2]`` coordinates in the unit square: t-SNE on cosine distances, initialised by PCA
    and deterministic. Fewer than 5 images are set on a circle."""
    count = len(features)
    if count < 5:
        angle = torch.arange(count) * 2 * math.pi / max(count, 1)
        return torch.stack((angle.cos(), angle.sin()), 1) / 2 + 0.5
    from sklearn.manifold import TSNE

    unit = torch.nn.functional.normalize(features.float(), dim=1).numpy()
    perplexity = min(30.0, (count - 1) / 4)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=0, metric="cosine").fit_transform(unit)
    found = torch.from_numpy(np.ascontiguousarray(plane)).double()
    low, high = found.amin(0), found.amax(0)
    return (found - low) / (high - low).clamp(min=1e-12)


def _published() -> str:
    points = [(p.parameters, p.top1, p.method, "pirl" if p.is_pirl else "") for p in PUBLISHED]
    chart = scatter_chart(
        "Top-1 of a linear classifier on ImageNet, in percent",
        points,
        x_label="parameters, millions",
        log_x=True,
        note="as published",
    )
    words = (
        "Figure 2 of the PIRL paper. Results of other data sets do not belong on this scale, so no run is drawn here."
    )
    return f'<div class="grid2">{chart}<p class="faint">{words}</p></div>'


def _thumbnail(location: ImageLocation, side: int) -> Image.Image:
    """The centre square of a picture."""
    picture = Image.fromarray(decode_full(location.read(), location.source.decoding)).convert("RGB")
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))


def _tile(location: ImageLocation, words: str, css: str) -> str:
    with quiet_pillow():
        picture = _thumbnail(location, 96)
    text = escape(words, quote=True)
    return f'<img class="{css}" alt="{text}" title="{text}" src="{data_url(picture, "JPEG")}">'


def _picture(path: Path) -> str:
    with Image.open(path) as picture:
        return f'<img class="picture" alt="{escape(path.stem, quote=True)}" src="{data_url(picture, "PNG")}">'


def data_url(picture: Image.Image, kind: str) -> str:
    """The picture inside the page: ``data:image/...;base64,...``."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
