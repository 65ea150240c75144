"""Horizontal bars with their values, drawn with Pillow."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn larger, then reduced: smooth edges
_NAMES, _BARS, _VALUES, _ROW, _TOP = (_SCALE * pixels for pixels in (260, 420, 110, 30, 56))
_PAPER, _INK, _FAINT, _BAR = "#ffffff", "#1f2933", "#6b7785", "#2563eb"


def draw_bars(values: Mapping[str, float], output: Path, *, title: str, unit: str, highlight: str = "") -> None:
    """Write a picture: one bar for every entry, from 0, in the order given.

    Args:
        values: name -> value of at least 0.
        output: picture file.
        title: first line.
        unit: after every value.
        highlight: start of the names whose bars are coloured; the others are grey. Empty: all are coloured.

    Raises:
        ValueError: nothing to draw.
    """
    if not values:
        raise ValueError("draw_bars: there is no value to draw")
    largest = max(values.values()) or 1.0
    width, height = _NAMES + _BARS + _VALUES, _TOP + _ROW * len(values) + _SCALE * 16
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(_SCALE * 16), ImageFont.load_default(_SCALE * 12)
    draw.text((_SCALE * 16, _SCALE * 14), title, fill=_INK, font=large)
    for position, (name, value) in enumerate(values.items()):
        middle = _TOP + _ROW * position + _ROW // 2
        end = _NAMES + value / largest * _BARS
        color = _BAR if name.startswith(highlight) else _FAINT
        draw.text((_NAMES - _SCALE * 10, middle), name, fill=_INK, font=small, anchor="rm")
        draw.rectangle((_NAMES, middle - _ROW * 0.32, end, middle + _ROW * 0.32), fill=color)
        draw.text((end + _SCALE * 8, middle), f"{value:,.3g} {unit}", fill=_INK, font=small, anchor="lm")
    image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS).save(output)
