"""``sslfast report``: what is on the page. How it looks is test_browser.py."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.cli.main import main
from sslfast.config import save_json, to_dict
from sslfast.report.build import ReportConfig, report
from sslfast.report.charts import figure, json_text, line_chart, thin, tick_label, ticks
from sslfast.report.page import page, table
from sslfast.report.published import PUBLISHED
from sslfast.report.sections import _heat_map, confusion_matrix, embed_in_plane
from sslfast.runs.directory import RunDirectory
from tests.weights.test_load import config_of, trained_trunk, write_run

CLASSES = ("cat & dog", "<b>bird", "fish")
_VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}


class Balanced(HTMLParser):
    """Every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _VOID or tag in ("circle", "polyline", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write_folder(folder: Path) -> Path:
    """Three classes of plain colours that any encoder tells apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 40, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 200
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def make_run(folder: Path, steps: int = 6) -> Path:
    config = config_of("resnet18", "small")
    config.method.bank_momentum = 0.5 if steps == 6 else 0.25
    config.method.image_view.crop.size = 16
    write_run(folder, trained_trunk("resnet18", "small"), config)
    run = RunDirectory(folder)
    save_json(run.config, to_dict(config))
    with run.log.open("w") as log:
        for step in range(1, steps + 1):
            record = {"step": step, "epoch": step / 3, "lr": 0.1, "loss": 5.0 / step**2, "knn_top1": step / 10}
            log.write(json.dumps({**record, "time": {"samples_per_second": 50.0, "loader_wait_share": 0.1}}) + "\n")
    (folder / "evaluation").mkdir()
    result = {"protocol": "knn-test", "results": [{"encoder": "trained", "k": 5, "top1": 0.625, "top5": 0.875}]}
    save_json(folder / "evaluation" / "knn.json", result)
    seeds = {"top1": 0.5, "top1_standard_error": 0.05, "top1_spread": 0.02, "top1_of_seeds": [0.48, 0.52], "top5": 0.75}
    save_json(folder / "evaluation" / "linear.json", {"protocol": "linear-test", "results": [seeds]})
    result = {"protocol": "svm-test", "results": [{"layer": "res5", "images": "all", "mAP": 0.5, "ap": {"cat": 0.5}}]}
    save_json(folder / "evaluation" / "lowshot.json", result)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    runs = (make_run(folder / "a" / "run"), make_run(folder / "b" / "run", steps=3))
    output = report(
        runs,
        ReportConfig(points=9, queries=3),
        output=folder / "out" / "r.html",
        data=write_folder(folder / "data"),
    )
    return output.read_text(encoding="utf-8"), folder


def test_page_is_complete_and_self_contained(pages: tuple[str, Path]) -> None:
    text, _ = pages
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert text.startswith("<!doctype html>")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "@import" not in text


def test_every_section_is_there(pages: tuple[str, Path]) -> None:
    text, folder = pages
    for heading in ("Runs", "Curves", "Evaluations", "Accuracy by class, a/run", "Nearest neighbours, b/run",
                    "Embedding map, a/run", "Published results on ImageNet"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text
    assert "Detections" not in text
    for words in (
        "knn-test",
        "top-1 62.5 %, top-5 87.5 %",
        "trained, k=5",
        "res5, all",
        "mAP 50.0 %",
        "kNN top-1 of the bank, leave-one-out, %",
        "top-1 50.0 ± 5.0 % (spread of 2 seeds 2.0), top-5 75.0 %",
        "<h3>Settings that differ</h3>",
        "<td>method.bank_momentum</td><td>0.5</td><td>0.25</td>",
        "loss <small>logarithmic</small>",
        "samples/s",
        "learning rate",
    ):
        assert words in text
    # Names of folders are text, not markup.
    assert "&lt;b&gt;bird" in text
    assert "cat &amp; dog" in text
    assert str(folder) not in text


def test_colours_are_distinguishable(pages: tuple[str, Path]) -> None:
    text, _ = pages
    assert text.count("100.0 % of 15 validation images") == 2
    maps = [json.loads(m) for m in re.findall(r'data-kind="map".*?application/json">(.*?)</script>', text, re.S)]
    assert [len(m["points"]) for m in maps] == [9, 9]
    assert maps[0]["classes"] == sorted(CLASSES)
    assert all(0 <= p[0] <= 1 and 0 <= p[1] <= 1 for p in maps[0]["points"])


def test_a_run_without_log_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    RunDirectory(run).log.write_text("")
    for result in (run / "evaluation").iterdir():
        result.unlink()
    Image.new("RGB", (8, 8)).save(run / "evaluation" / "detect-examples.png")
    text = report((run,), output=tmp_path / "r.html").read_text()
    for words in ("No log record was written yet", "sslfast evaluate knn RUN DATA", "<h2>Detections</h2>"):
        assert words in text


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none"), "-o", str(tmp_path / "r.html")]) == 2
    assert "does not exist; give a run directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no run to report on"):
        report(())
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"step_00000007\.pt is a file; a report needs run directories"):
        report((run / "checkpoints" / "step_00000007.pt",))
    with pytest.raises(ValueError, match=r"output must end in \.html, got 'r\.pdf'"):
        report((run,), output=Path("r.pdf"))
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        ReportConfig(points=0)
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["r.html"]


def test_the_confusion_has_names_and_counts(pages: tuple[str, Path]) -> None:
    text, _ = pages
    matrix = re.findall(r'<svg [^>]*aria-label="confusion matrix">(.*?)</svg>', text, re.S)[0]
    for name in ("&lt;b&gt;bird", "cat &amp; dog"):
        assert f">{name}" in matrix
        assert re.search(rf"<title>{name}\S* taken for {name}\S*: 5 of 5</title>", matrix)
    assert matrix.count('class="cell"') == len(CLASSES)


def test_a_confusion_of_many_classes_is_a_picture_that_the_page_shines_through() -> None:
    html = _heat_map(torch.eye(60, dtype=torch.float64), [f"class {i}" for i in range(60)])
    picture = Image.open(io.BytesIO(base64.b64decode(html.partition("base64,")[2].partition('"')[0])))
    assert picture.mode == "RGBA"
    assert picture.size == (360, 360)
    assert picture.getpixel((3, 3)) == (59, 130, 246, 255)
    assert picture.getpixel((10, 3)) == (59, 130, 246, 0)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (12345, "12,345"),
        (-2.5e6, "-2.5 M"),
        (1234567890, "1235 M"),
        (1e-9, "1e-09"),
        (3e12, "3e+12"),
    ],
)
def test_labels_of_an_axis_are_short(value: float, label: str) -> None:
    assert tick_label(value) == label
    assert len(label) <= 7


def test_a_logarithmic_axis_only_where_it_helps() -> None:
    far, near, negative = ([(float(i), value) for i, value in enumerate(values)] for values in
                           ([1.0, 0.1, 0.01], [1.0, 0.9, 0.5], [-1.0, 0.001, 1.0]))  # fmt: skip
    assert "logarithmic" in line_chart("x", {"run": far}, x_label="epoch", log_y=True)
    for points, log_y in ((far, False), (near, True), (negative, True)):
        assert "logarithmic" not in line_chart("x", {"run": points}, x_label="epoch", log_y=log_y)
    marks = re.findall(r'text-anchor="end">([^<]*)<', line_chart("x", {"run": far}, x_label="epoch", log_y=True))
    assert marks == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]


def test_confusion_matrix() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_map_keeps_clusters_and_is_deterministic() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 16).repeat_interleave(12, 0)
    features = centres + 0.05 * torch.randn(36, 16, generator=generator)
    positions = embed_in_plane(features)
    assert torch.equal(positions, embed_in_plane(features))
    groups = positions.reshape(3, 12, 2)
    spread = (groups - groups.mean(1, keepdim=True)).norm(dim=2).max()
    apart = torch.pdist(groups.mean(1)).min()
    assert spread < apart
    assert positions.amin() == 0
    assert positions.amax() == 1
    assert embed_in_plane(features[:3]).shape == (3, 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.13, 0.42, [0.2, 0.3, 0.4]), (-3.0, 47.0, [0, 10, 20, 30, 40])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
    assert ticks(2.0, 2.0) == [2.0]


def test_thin_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin([], 5) == []


def test_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart("t", {"a": [(0, 1.0), (1, float("nan")), (2, 3.0)], "b": [(1, 2.0)]}, x_label="x")
    assert "nan" not in chart
    assert "<polyline" in chart
    assert "<circle" in chart
    assert line_chart("t", {"a": []}, x_label="x") == ""


def test_text_is_escaped() -> None:
    assert "</script>" not in json_text({"name": "</script><script>alert(1)"})
    assert "<i>" not in figure("<i>", "")
    assert "<i>" not in table(["<i>"], [["<i>"]])
    assert "<i>" not in page("<i>", "<i>", [("<i>", "x")])


def test_published_points_are_those_of_the_reference() -> None:
    by_name = {p.method: p for p in PUBLISHED}
    assert by_name["PIRL"].top1 == 63.6
    assert by_name["NPID++"].top1 == 59.0
    assert by_name["CPC-Huge"].parameters == 305.0
