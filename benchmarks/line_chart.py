"""Log-log line charts side by side with one legend, drawn with Pillow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Series = Mapping[str, Sequence[tuple[float, float]]]

_SCALE = 2  # drawn larger, then reduced: smooth lines
_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = (_SCALE * pixels for pixels in (420, 420, 72, 76, 56, 28))
_ENTRY = _SCALE * 24  # height of a line of the legend
_PAPER, _INK, _FAINT, _GRID = "#ffffff", "#1f2933", "#6b7785", "#e4e8ec"


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside, or of two where there are fewer than two."""
    for base in (10.0, 2.0):
        ticks = [
            base**e for e in range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
            if low * 0.999 <= base**e <= high * 1.001
        ]  # fmt: skip
        if len(ticks) >= 2:
            return ticks
    return sorted({low, high})


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def draw_panels(
    panels: Mapping[str, Series],
    output: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    styles: Mapping[str, tuple[str, int]],
) -> None:
    """Write a picture: one panel for every entry, the same axes in all, names in one legend under them.

    Args:
        panels: heading -> name of the line -> (x, y) points, all positive; a line may miss points or be empty.
        output: picture file.
        styles: name of the line -> (color, width); their order is that of the legend.
    """
    points = [point for series in panels.values() for line in series.values() for point in line]
    if not points:
        raise ValueError("draw_panels: there is no point to draw; every measurement was skipped")
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x_high, y_low, y_high = max(x_high, x_low * 2), y_low / 1.3, max(y_high, y_low * 2) * 1.3
    names = [name for name in styles if any(series.get(name) for series in panels.values())]
    legend_columns = len(panels) + 1
    legend = math.ceil(len(names) / legend_columns) * _ENTRY
    width, height = _LEFT + len(panels) * (_PANEL + _GAP), _TOP + _HEIGHT + _BOTTOM + legend + _SCALE * 16
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    large, medium, small = (ImageFont.load_default(_SCALE * points) for points in (20, 14, 12))
    draw.text((_LEFT, _SCALE * 14), title, fill=_INK, font=large)
    draw.text((_SCALE * 12, _SCALE * 48), y_label, fill=_FAINT, font=small)
    bottom = _TOP + _HEIGHT

    def y_of(y: float) -> float:
        return bottom - math.log(y / y_low) / math.log(y_high / y_low) * _HEIGHT

    for position, (heading, series) in enumerate(panels.items()):
        left = _LEFT + position * (_PANEL + _GAP)

        def x_of(x: float, left: int = left) -> float:
            return left + math.log(x / x_low) / math.log(x_high / x_low) * _PANEL

        draw.text((left + _PANEL / 2, _TOP - _SCALE * 8), heading, fill=_INK, font=medium, anchor="mb")
        for tick in _ticks(y_low, y_high):
            draw.line((left, y_of(tick), left + _PANEL, y_of(tick)), fill=_GRID, width=_SCALE)
            if position == 0:
                draw.text((left - _SCALE * 6, y_of(tick)), _label(tick), fill=_FAINT, font=small, anchor="rm")
        for tick in sorted({x for line in series.values() for x, _ in line}):
            draw.line((x_of(tick), _TOP, x_of(tick), bottom), fill=_GRID, width=_SCALE)
            draw.text((x_of(tick), bottom + _SCALE * 6), _label(tick), fill=_FAINT, font=small, anchor="mt")
        draw.text((left + _PANEL / 2, bottom + _SCALE * 26), x_label, fill=_FAINT, font=small, anchor="mt")
        draw.rectangle((left, _TOP, left + _PANEL, bottom), outline=_FAINT, width=_SCALE)
        for name in sorted(series, key=lambda name: styles[name][1]):  # wide lines on top
            color, thickness = styles[name]
            places, radius = [(x_of(x), y_of(y)) for x, y in sorted(series[name])], _SCALE * (thickness + 1)
            draw.line(places, fill=color, width=_SCALE * thickness, joint="curve")
            for x, y in places:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    for i, name in enumerate(names):
        color, thickness = styles[name]
        row, column = divmod(i, legend_columns)
        x = _LEFT + column * (width - _LEFT) / legend_columns
        y = bottom + _BOTTOM + row * _ENTRY + _SCALE * 8
        draw.line((x, y, x + _SCALE * 24, y), fill=color, width=_SCALE * thickness)
        draw.text((x + _SCALE * 32, y), name, fill=_INK, font=small, anchor="lm")
    image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS).save(output)
