"""Charts show the numbers, leave no global state, and are optional."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslfast.bench.charts import draw_bars, draw_panels

LINE = [(1.0, 1.0), (10.0, 10.0), (100.0, 100.0)]
STYLES = {"rising": ("#ff0000", 5), "missing": ("#00ff00", 2)}


def pixels(path: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """``[n, 2]`` (row, column) of the pixels of a colour."""
    with Image.open(path) as picture:
        return np.argwhere((np.asarray(picture.convert("RGB")) == colour).all(-1))


def test_lines_are_where_the_numbers_are(tmp_path: Path) -> None:
    draw_panels({"one": {"rising": LINE}}, tmp_path / "c.png", title="t", x_label="x", y_label="y", styles=STYLES)
    red = pixels(tmp_path / "c.png", (255, 0, 0))
    with Image.open(tmp_path / "c.png") as picture:
        red = red[red[:, 0] < 0.8 * picture.height]  # the legend is under the panel
    rows, columns = red.T
    assert np.corrcoef(rows, columns)[0, 1] < -0.99  # on logarithmic axes y = x is a straight line
    middle = (red.min(axis=0) + red.max(axis=0)) / 2
    assert np.abs(red - middle).sum(1).min() < 3  # the point (10, 10) is half way
    assert len(pixels(tmp_path / "c.png", (0, 255, 0))) == 0
    with pytest.raises(ValueError, match="there is no point to draw"):
        draw_panels({"one": {}}, tmp_path / "d.png", title="t", x_label="x", y_label="y", styles=STYLES)


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    values = {"sslfast a": 30.0, "plain": 20.0, "sslfast b": 10.0}
    draw_bars(values, tmp_path / "b.png", title="rates", unit="/s", highlight="sslfast")
    lengths = []
    for colour in ((0x25, 0x63, 0xEB), (0x6B, 0x77, 0x85)):
        rows, columns = pixels(tmp_path / "b.png", colour).T
        lengths.append(sorted({int((rows == row).sum()) for row in rows if (rows == row).sum() > 50}))
        assert columns.size > 0
    (short, long), (grey,) = ([group[0], group[-1]] if len(group) > 1 else group for group in lengths)
    assert long / short == pytest.approx(3, rel=0.03)
    assert grey / short == pytest.approx(2, rel=0.03)
    with pytest.raises(ValueError, match="there is no value to draw"):
        draw_bars({}, tmp_path / "e.png", title="t", unit="")


def test_pyplot_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # by another test's library
    draw_bars({"a": 0.0}, tmp_path / "a.png", title="zero is drawn too", unit="ms")
    assert "matplotlib.pyplot" not in sys.modules
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_without_matplotlib_there_is_a_line_in_place_of_the_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw_bars({"a": 1.0}, tmp_path / "a.png", title="t", unit="ms")
    draw_panels({"one": {"rising": LINE}}, tmp_path / "c.png", title="t", x_label="x", y_label="y", styles=STYLES)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"no chart {tmp_path / name}: matplotlib is not installed; pip install 'sslfast[bench]'"
        for name in ("a.png", "c.png")
    ]
    assert list(tmp_path.iterdir()) == []
