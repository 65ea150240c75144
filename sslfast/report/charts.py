"""Charts as SVG text: colours come from the page's CSS, so that they follow light and dark mode; the numbers are
embedded as JSON for the page's script."""

import json
import math
import sys
from collections.abc import Mapping, Sequence

from sslfast.report.page import text
from sslfast.text import printable

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 30
SERIES = 8
"""Colours that the page's CSS has for lines: ``s0`` to ``s7``."""
_MOST_POINTS = 400


def number(value: float) -> str:
    """A value with four significant digits, large ones with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def tick_label(value: float) -> str:
    """A value short enough for the space beside an axis."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g} M" if size < 1e10 else f"{value:.2g}"
    return f"{value:,.0f}" if size >= 1e4 else f"{value:.4g}"


def drawable(value: float) -> bool:
    """Whether a value has a place on an axis: differences and means of such values do not overflow."""
    return abs(value) < 1e100


def thin(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means over groups of neighbouring points."""
    size = -(-len(points) // most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values in ``[low, high]``."""
    rough = (high - low) / count
    if not sys.float_info.min < rough < math.inf:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Maps values to pixels along one axis."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.0):
        self.log = log
        low, high = (math.log10(v) if log else v for v in (min(values), max(values)))
        if low == high:
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
        span = high - low
        self.low, self.high = low - margin * span, high + margin * span
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        if self.log:
            marks = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            nice = [m * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for m in marks]
            return [t for t in nice if self.low <= math.log10(t) <= self.high]
        return ticks(self.low, self.high)


def _axes(x: _Scale, y: _Scale, x_label: str) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}"/>']
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 3.5}" text-anchor="end">{tick_label(tick)}</text>'
        )
    for tick in x.ticks():
        parts.append(
            f'<text class="tick" x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{text(x_label)}</text>')
    return parts


def line_chart(title: str, series: Mapping[str, Points], *, x_label: str, log_y: bool = False, note: str = "") -> str:
    """One figure: a line for every entry; the page's script shows values under the pointer.

    Args:
        title: heading.
        series: name -> points, in the order of their colours; values that are not :func:`drawable` are left out.
        x_label: under the axis.
        log_y: take a logarithmic axis where all values are positive and the largest is over ten times the smallest.
        note: small text after the heading.
    """
    lines = {name: thin([p for p in points if all(map(drawable, p))]) for name, points in series.items()}
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    x = _Scale([p[0] for p in every], _LEFT, _WIDTH - _RIGHT)
    values = [p[1] for p in every]
    log_y = log_y and 0 < 10 * min(values) < max(values)
    y = _Scale(values, _HEIGHT - _BOTTOM, _TOP, log=log_y, margin=0.05)
    note = note or ("logarithmic" if log_y else "")
    parts = _axes(x, y, x_label)
    for position, (name, points) in enumerate(lines.items()):
        css, label = f"line s{position % SERIES}", f"<title>{text(name)}</title>"
        if len(points) == 1:
            parts.append(f'<circle class="{css}" cx="{x(points[0][0])}" cy="{y(points[0][1])}" r="3">{label}</circle>')
        else:
            path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
            parts.append(f'<polyline class="{css}" points="{path}">{label}</polyline>')
    data = {
        "box": [_LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM],
        "size": [_WIDTH, _HEIGHT],
        "series": [
            {"name": printable(name), "at": [[x(a), y(b), number(a), number(b)] for a, b in points]}
            for name, points in lines.items()
        ],
    }
    return figure(title, _svg(parts, title), note=note, data=data, kind="lines")


def scatter_chart(
    title: str, points: Sequence[tuple[float, float, str, str]], *, x_label: str, log_x: bool, note: str = ""
) -> str:
    """One figure: a labelled dot for every ``(x, y, label, css class)``; labels alternate sides where dots crowd."""
    x = _Scale([p[0] for p in points], _LEFT, _WIDTH - _RIGHT, log=log_x, margin=0.14)
    y = _Scale([p[1] for p in points], _HEIGHT - _BOTTOM, _TOP, margin=0.08)
    parts = _axes(x, y, x_label)
    taken: list[tuple[float, float]] = []
    for a, b, label, css in sorted(points, key=lambda p: p[1]):
        left, top = x(a), y(b)
        crowded = any(abs(left - u) < 60 and abs(top - v) < 9 for u, v in taken)
        taken.append((left, top))
        anchor, shift = ("end", -7) if crowded else ("start", 7)
        parts.append(
            f'<circle class="dot {css}" cx="{left}" cy="{top}" r="4"><title>{text(label)}: {number(b)}</title>'
            f'</circle><text class="label" x="{left + shift}" y="{top + 3.5}" text-anchor="{anchor}">'
            f"{text(label)}</text>"
        )
    return figure(title, _svg(parts, title), note=note)


def figure(title: str, body: str, *, note: str = "", data: object = None, kind: str = "") -> str:
    """A figure element with its heading and, for the page's script, its numbers."""
    extra = f' data-kind="{kind}"' if kind else ""
    numbers = "" if data is None else f'<script type="application/json">{json_text(data)}</script>'
    small = f" <small>{text(note)}</small>" if note else ""
    return f"<figure{extra}><figcaption>{text(title)}{small}</figcaption>{body}{numbers}</figure>"


def json_text(data: object) -> str:
    """ASCII JSON without the characters that mean something to HTML, so that no name in it ends its script element or
    begins a comment there."""
    encoded = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return encoded.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})


def _svg(parts: Sequence[str], title: str) -> str:
    label = text(title)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
