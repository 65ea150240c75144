"""Charts of measurements, drawn with matplotlib: ``pip install 'sslfast[bench]'``.

Where matplotlib is missing, the functions say so on standard error and draw nothing: numbers and tables do not wait for
a chart. Only ``Figure`` objects are used, never pyplot, so nothing global is set and no display is needed.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslfast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name of a line -> its (x, y) points."""

_DPI = 120
_INK, _FAINT, _GRID, _BAR = "#1f2933", "#6b7785", "#e4e8ec", "#2563eb"


def draw_bars(values: Mapping[str, float], output: Path, *, title: str, unit: str, highlight: str = "") -> None:
    """Write a picture of horizontal bars with their values, from 0, in the order given.

    Args:
        values: name -> value of at least 0.
        output: picture file.
        title: over the bars.
        unit: after every value.
        highlight: prefix of the names whose bars are coloured, the others are grey; empty: all are coloured.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("draw_bars: there is no value to draw")
    figure = _figure(8.4, 0.9 + 0.28 * len(values), output)
    if figure is None:
        return
    axes = figure.add_subplot()
    colors = [_BAR if name.startswith(highlight) else _FAINT for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colors, height=0.64)
    axes.bar_label(
        bars, [f"{_three_digits(value)} {unit}" for value in values.values()], padding=4, color=_INK, fontsize=9
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * (max(values.values()) or 1.0))
    axes.set_xticks([])
    axes.tick_params(length=0, labelcolor=_INK, labelsize=9)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, color=_INK, fontsize=12)
    with replacing(output, remedy="name another file with --chart") as temporary:
        figure.savefig(temporary, dpi=_DPI, format=output.suffix[1:] or None)


def draw_panels(
    panels: Mapping[str, Series],
    output: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    styles: Mapping[str, tuple[str, float]],
) -> None:
    """Write a picture of log-log line charts side by side, with the same axes and one legend.

    Args:
        panels: heading of a panel -> its lines, all values positive; a line may lack points or be empty.
        output: picture file.
        title: over the panels.
        x_label: under every panel.
        y_label: left of the first panel.
        styles: name of a line -> (color, width); their order is that of the legend.

    Raises:
        ValueError: there are no points.
    """
    points = [point for series in panels.values() for line in series.values() for point in line]
    if not points:
        raise ValueError("draw_panels: there is no point to draw; every measurement was skipped")
    names = [name for name in styles if any(series.get(name) for series in panels.values())]
    legend_columns = len(panels) + 1
    legend_rows = -(-len(names) // legend_columns)
    figure = _figure(1.2 + 3.6 * max(len(panels), 2), 4.4 + 0.2 * legend_rows, output)
    if figure is None:
        return
    row: Any = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (heading, series) in zip(row, panels.items(), strict=True):
        for name in sorted(series, key=lambda name: styles[name][1]):  # wide lines on top
            color, width = styles[name]
            x, y = zip(*sorted(series[name]), strict=True) if series[name] else ((), ())
            (handles[name],) = axes.plot(x, y, color=color, linewidth=0.6 * width, marker="o", markersize=width)
        axes.set(xscale="log", yscale="log", xlabel=x_label)
        axes.set_title(heading, color=_INK, fontsize=10)
        ticks = sorted({x for line in series.values() for x, _ in line})
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(color=_GRID)
        axes.tick_params(labelcolor=_FAINT, labelsize=8)
    row[0].set_ylabel(y_label)
    figure.suptitle(title, color=_INK, fontsize=12)
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=legend_columns, fontsize=8,
        frameon=False,
    )  # fmt: skip
    with replacing(output, remedy="name another file with --chart") as temporary:
        figure.savefig(temporary, dpi=_DPI, format=output.suffix[1:] or None)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure(width: float, height: float, output: Path) -> "Figure | None":
    """An empty figure of ``width`` x ``height`` inches; None, with a line on standard error, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no chart {output}: matplotlib is not installed; pip install 'sslfast[bench]'", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")
