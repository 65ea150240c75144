"""``sslfast report``: one self-contained HTML page about one or several runs.

A run directory provides its configuration, curves and evaluation results. With labelled images (``--data``) the page
also shows what each run's encoder makes of them: per-class accuracy and confusion matrix of a linear probe, nearest
neighbours, and a map of the embeddings (t-SNE of scikit-learn; van der Maaten & Hinton 2008) with thumbnails.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sslfast.evaluation import TRAINED, FeatureConfig, UnsuitableError, load_evaluation_set, load_run
from sslfast.files import OUTPUT, write_file
from sslfast.report.charts import line_chart, number, scatter_chart
from sslfast.report.page import legend, page, table, text
from sslfast.report.published import PUBLISHED
from sslfast.report.run_files import Run
from sslfast.report.sections import by_class, data_url, embedding_map, neighbour_rows
from sslfast.runs import print_error
from sslfast.text import printable

_FIRST = ("loss", "time.samples_per_second", "time.loader_wait_share", "lr")
_WORDS = {
    "knn_top1": "kNN top-1 of the bank, leave-one-out",
    "val_knn_top1": "kNN top-1 on probe_data",
    "val_linear_top1": "linear top-1 on probe_data",
    "feature_std": "spread of features (0: collapsed)",
    "feature_rank": "effective rank of features",
    "feature_cosine": "mean cosine of features",
    "embedding_std": "spread of embeddings (0: collapsed)",
    "embedding_rank": "effective rank of embeddings",
    "embedding_cosine": "mean cosine of embeddings",
    "time.samples_per_second": "samples/s",
    "time.loader_wait_share": "share of time waiting for data",
    "lr": "learning rate",
}
_LOG = ("loss", "lr")
"""Drawn on a logarithmic axis where their values lie far apart."""
_MOST_SETTINGS = 100


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
    notes = [note for run in found for note in run.notes]
    sections = [
        ("Runs", _summary(found) + _differences(found)),
        ("Curves", _curves(found)),
        ("Evaluations", _evaluations(found)),
    ]
    for run in found:
        if data is None:
            break
        suffix = f", {run.name}" if len(found) > 1 else ""
        sections += [(f"{heading}{suffix}", html) for heading, html in _of_images(run, data, config, notes)]
    sections += [
        ("Detections", "".join(_picture(name, picture) for run in found for name, picture in run.pictures)),
        ("Published results on ImageNet", _published()),
    ]
    notes = list(dict.fromkeys([*notes, *(note for run in found for note in run.notes)]))
    for note in notes:
        print_error(printable(note))
    sections.insert(0, ("Left out", "".join(f"<p>{text(note)}</p>" for note in notes)))
    title = f"sslfast: {', '.join(run.name for run in found)}"
    subtitle = ", ".join(sorted({run.word("recipe") for run in found}))
    write_file(output, page(title, f"recipe {subtitle}", sections), remedy=OUTPUT)
    return output


def _of_images(run: Run, data: Path, config: ReportConfig, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Heading and HTML of what an encoder makes of labelled images. What cannot be made is left out, with a note."""
    try:
        loaded = load_run(run.path, patches=config.patches)
    except (ValueError, FileNotFoundError) as error:
        return notes.append(f"{_reason(error)}: what needs an encoder is left out")
    try:
        chosen = {TRAINED: loaded.encoders[TRAINED]}
        evaluation = load_evaluation_set(run.path, data, config, loaded=loaded, encoders=lambda _: chosen)
    except UnsuitableError as error:
        return notes.append(f"{_reason(error)}: what needs labelled images is left out")
    parts = {
        "Accuracy by class": lambda: by_class(evaluation),
        "Nearest neighbours": lambda: neighbour_rows(evaluation, queries=config.queries, k=config.neighbours),
        "Embedding map": lambda: embedding_map(evaluation, most=config.points),
    }
    for heading, make in parts.items():
        try:
            yield heading, make()
        except (UnsuitableError, ImportError) as error:
            notes.append(f"{heading.lower()} of {run.name}: left out: {_reason(error)}")


def _reason(error: Exception) -> str:
    """An error without its remedy, which is another command's."""
    return str(error).partition("; ")[0]


def _name_apart(runs: Sequence[Run]) -> None:
    """Runs in folders of one name get the folder above in front, and a number where that is the same too."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
    names = [run.name for run in runs]
    for position, run in enumerate(runs):
        if names.count(run.name) > 1:
            run.name += f" ({names[: position + 1].count(run.name)})"


def _summary(runs: Sequence[Run]) -> str:
    rows: list[list[str | float]] = []
    for run in runs:
        last = run.records[-1] if run.records else {}
        rates = [r["time.samples_per_second"] for r in run.records if "time.samples_per_second" in r]
        rows.append(
            [
                run.name,
                run.word("recipe"),
                run.word("method", "name"),
                f"{run.word('model', 'name')} ({run.word('model', 'stem')})".removesuffix(" ()"),
                f"{last.get('epoch', 0):g} of {run.word('epochs') or '?'}",
                f"{last.get('step', 0):,.0f}",
                run.word("batch_size"),
                number(last["loss"]) if "loss" in last else "",
                number(float(np.median(rates))) if rates else "",
            ]
        )
    header = ["run", "recipe", "method", "trunk", "epochs", "steps", "batch", "loss", "samples/s (median)"]
    return table(header, rows)


def _differences(runs: Sequence[Run]) -> str:
    """A row for every setting in which runs differ."""
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [
        [name, *(one.get(name, "") for one in settings)]
        for name in names
        if len({one.get(name) for one in settings}) > 1
    ]
    if not rows:
        return ""
    more = f"<p>The first {_MOST_SETTINGS} of {len(rows)}.</p>" if len(rows) > _MOST_SETTINGS else ""
    header = ["setting", *(run.name for run in runs)]
    return f"<h3>Settings that differ</h3>{table(header, rows[:_MOST_SETTINGS])}{more}"


def _curves(runs: Sequence[Run]) -> str:
    names = {name: None for run in runs for record in run.records for name in record}
    others = [name for name in names if name not in (*_FIRST, "step", "epoch") and not name.startswith("time.")]
    charts = []
    for name in [*(n for n in _FIRST if n in names), *others]:
        factor = 100 if name.endswith("_top1") else 1
        series = {
            run.name: [(record["epoch"], factor * record[name]) for record in run.records if name in record]
            for run in runs
        }
        title = _WORDS.get(name, name) + (", %" if factor == 100 else "")
        charts.append(line_chart(title, series, x_label="epoch", log_y=name in _LOG))
    if not any(charts):
        return "<p>No log record was written yet.</p>"
    names_of_runs = legend([run.name for run in runs]) if len(runs) > 1 else ""
    return f'{names_of_runs}<div class="grid2">{"".join(charts)}</div>'


def _evaluations(runs: Sequence[Run]) -> str:
    rows = [[run.name, row.protocol, row.what, row.scores] for run in runs for row in run.results]
    if not rows:
        return "<p>None yet: <code>sslfast evaluate knn RUN DATA</code> makes one.</p>"
    return table(["run", "protocol", "what", "result"], rows)


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


def _picture(name: str, picture: Image.Image) -> str:
    return f'<img class="picture" alt="{text(name)}" src="{data_url(picture, "PNG")}">'
