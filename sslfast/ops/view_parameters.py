"""View parameters: the numbers that say what ``render_views`` does to the pixels of one picture.

Declared here once, for Python, C++ and CUDA. ``csrc/view_parameters.h`` is generated from this table and committed;
after an edit run::

    python sslfast/ops/view_parameters.py > csrc/view_parameters.h

How a parameter is drawn is a row of ``sslfast/views/augment.py``, what it does to a pixel a function of
``csrc/render_views.h`` and, as the specification, of ``sslfast/ops/pixels.py``.
"""

from enum import IntEnum

_FLOAT_MAX = 3.4028234663852886e38
_ANY = (-_FLOAT_MAX, _FLOAT_MAX)  # every finite float32
_FACTOR = (0.0, 100.0)  # far beyond any augmentation; float32 keeps levels to 0.1 up to there


class ViewParameter(IntEnum):
    """Index of each parameter in the last dimension of ``parameters`` ``[B, M, len(ViewParameter)]`` float32.

    A member is declared as (neutral value, (lowest, highest) allowed value, meaning). Add a new one at the end: the
    order is that of the numbers in memory.
    """

    neutral: float
    """Value at which the operation changes nothing."""
    lowest: float
    """Smallest value that ``render_views`` accepts."""
    highest: float
    """Largest value that ``render_views`` accepts."""
    meaning: str

    def __new__(cls, neutral: float, allowed: tuple[float, float], meaning: str) -> "ViewParameter":
        index = len(cls.__members__)
        member = int.__new__(cls, index)
        member._value_ = index
        member.neutral, (member.lowest, member.highest), member.meaning = neutral, allowed, meaning
        return member

    FLIP = 0.0, _ANY, "gate (0 off, else on): mirror left to right"
    JITTER = 0.0, _ANY, "gate of the four jitters"
    JITTER_ORDER = 0.0, (0.0, 23.0), "of the four jitters: index into pixels.ORDERS"
    BRIGHTNESS = 1.0, _FACTOR, "factor of the levels"
    CONTRAST = 1.0, _FACTOR, "factor of the distance to the mean luminance"
    SATURATION = 1.0, _FACTOR, "factor of the distance to the luminance"
    HUE = 0.0, (-1.0, 1.0), "shift in turns"
    PHOTOMETRIC = 0.0, _ANY, "gate of posterize, sharpness, solarize and autocontrast"
    POSTERIZE_BITS = 8.0, (0.0, 8.0), "upper bits kept of every level, rounded down"
    SHARPNESS = 1.0, _ANY, "factor: 0 smoothed, above 1 sharpened"
    SOLARIZE_THRESHOLD = 256.0, _ANY, "levels at or above it are inverted"
    GRAYSCALE = 0.0, _ANY, "gate: the luminance in all three channels"
    BLUR_SIGMA = 0.0, (0.0, 5.0), "of the Gaussian blur, in pixels; 0 no blur"
    LAST_SOLARIZE_THRESHOLD = 256.0, _ANY, "levels at or above it are inverted behind the blur"


def neutral_parameters() -> list[float]:
    """The parameters of a picture that stays as it is, ordered as :class:`ViewParameter`."""
    return [parameter.neutral for parameter in ViewParameter]


def cpp_header() -> str:
    """The text of ``csrc/view_parameters.h``."""

    def number(value: float) -> str:
        return {_FLOAT_MAX: "FLT_MAX", -_FLOAT_MAX: "-FLT_MAX"}.get(value, f"{value}f")

    constants = {p: "k" + p.name.title().replace("_", "") + "," for p in ViewParameter}
    width = max(map(len, constants.values()))
    indices = [f"  {constant:<{width}}  // {p.meaning}" for p, constant in constants.items()]
    infos = [
        f'      {{"{p.name.lower()}", {number(p.neutral)}, {number(p.lowest)}, {number(p.highest)}}},'
        for p in ViewParameter
    ]
    return "\n".join([_HEAD, *indices, "};", f"constexpr int kViewParameters = {len(infos)};", _TABLE, *infos, _TAIL])


_HEAD = """\
// The numbers that say what render_views does to the pixels of one picture. Generated; edit the table in
// sslfast/ops/view_parameters.py, then run
//   python sslfast/ops/view_parameters.py > csrc/view_parameters.h
#pragma once

#include <cfloat>

#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Index of each in the kViewParameters fp32 numbers of a picture.
enum ViewParameter : int {"""
_TABLE = """
struct ViewParameterInfo {
  const char* name;
  float neutral;          // the operation changes nothing
  float lowest, highest;  // allowed
};

// The compiler folds this away where the index is a constant.
SSLFAST_HD constexpr ViewParameterInfo view_parameter(int index) {
  constexpr ViewParameterInfo table[] = {"""
_TAIL = """\
  };
  return table[index];
}

}  // namespace sslfast"""


if __name__ == "__main__":
    print(cpp_header())
