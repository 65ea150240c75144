"""A report on files that are hostile or broken: every name is shown, nothing of it is obeyed, no shape ends it."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sslfast.cli.main import main
from sslfast.report.build import ReportConfig, report
from sslfast.report.charts import json_text, line_chart, ticks
from sslfast.report.page import text
from sslfast.runs.directory import RunDirectory
from tests.evaluation.runs import write_data, write_run
from tests.report.test_build import Balanced, make_run

EVIL = "<!--<script>"
HOSTILE = (
    EVIL, "</script><script>document.title=1", "<img src=x onerror=alert(1)>", "\"'><svg onload=alert(1)>",
    "&lt;b&amp;", "]]>", "a\u2028b", "\u202egnp", "t\x1b[31m\n", "\udcff\udce9", "x" * 200, "猫 زرافة 😀",
)  # fmt: skip
CONFIG = f"{EVIL}recipe"


class Page(HTMLParser):
    """Elements, text and script contents."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.events: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.words += [value or "" for _, value in attrs]
        self.events += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags[-1:] == ["script"] else self.words).append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:50]}")


def hostile_run(folder: Path, name: str) -> Path:
    run = make_run(folder / name.replace("/", "|"))
    files = RunDirectory(run)
    config = json.loads(files.config.read_text())
    files.config.write_text(json.dumps(config | {"recipe": CONFIG, "batch_size": name}))
    with files.log.open("a") as log:
        log.write(json.dumps({"step": 9, "epoch": 3.0, name: 1.5, "other": EVIL}) + "\n")
    row = {"encoder": name, "layer": name, "protocol": name, "k": name, "top1": 0.5}
    (run / "evaluation" / "evil.json").write_text(json.dumps({"protocol": name, "results": [row]}))
    Image.new("RGB", (8, 8)).save(run / "evaluation" / f"detect{name[:100].replace('/', '|')}.png")
    return run


def test_hostile_names_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    runs = tuple(hostile_run(tmp_path / "runs", name) for name in HOSTILE)
    data = write_data(tmp_path / "data", train=2, val=1)
    for split in ("train", "val"):
        for name, old in zip((EVIL, HOSTILE[9], HOSTILE[11]), ("blue", "green", "red"), strict=True):
            (data / split / old).rename(data / split / name)
            image = next((data / split / name).iterdir())
            image.rename(image.with_name(f"{EVIL}{image.name}"))
    content = report(runs[:1] * 2 + runs, ReportConfig(device="cpu"), output=tmp_path / "r.html").read_bytes()
    with_images = report(runs[:1], ReportConfig(device="cpu"), output=tmp_path / "i.html", data=data).read_bytes()
    for written in (content, with_images):
        page, balanced = Page(written.decode("utf-8")), Balanced()
        balanced.feed(written.decode("utf-8"))
        assert balanced.open == []
        assert page.events == []
        assert page.tags.count("script") <= page.tags.count("figure") + 1
        ours = next(number for number, script in enumerate(page.scripts) if '"use strict"' in script)
        assert ours == page.tags.count("script") - 1  # the parser hands over the last one, ours, in parts
        for script in page.scripts[:ours]:
            json.loads(script)
            assert "<" not in script
        assert "Published results on ImageNet" in page.words
        assert any(CONFIG in words for words in page.words)
    words = "\n".join(Page(content.decode("utf-8")).words)
    for name in HOSTILE:
        shown = text(name)
        assert html_of(shown)[:190] in words
    names = json.loads(next(s for s in Page(with_images.decode("utf-8")).scripts if "sprite" in s))["classes"]
    assert sorted(names) == sorted([EVIL, r"\xff\xe9", HOSTILE[11]])


def html_of(escaped: str) -> str:
    """What a parser makes of it."""
    return "".join(Page(f"<p>{escaped}</p>").words)


def test_embedded_json() -> None:
    for name in HOSTILE:
        encoded = json_text({name: [name]})
        assert encoded.isascii()
        assert not set("<>&\u2028\u2029") & set(encoded)
        assert json.loads(encoded) == {name: [name]}


SHAPES: list[Any] = [
    None, 3, "text", [], {}, [None], float("nan"), float("inf"), 10**400, {"results": None}, {"results": {}},
    {"results": [None, 3, "x", []]}, {"results": [{"top1": float("nan")}]}, {"results": [{"top1": "0.5"}]},
    {"results": [{"top1": 62.5}]}, {"results": [{"top1": [0.5]}]}, {"results": [{"k": 10**400, "top1": 0.1}]},
    {"results": [{"loss": 1e300, "x": float("inf")}]}, {"protocol": {}, "results": [{"protocol": []}]},
    {"results": [{"encoder": {"a": [1] * 1000}, "top1": 0.5}] * 2000},
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:30])
@pytest.mark.parametrize("where", ["config", "log", "result"])
def test_any_shape(plain: Path, shape: Any, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = RunDirectory(plain)
    path = {"config": files.config, "log": files.log, "result": plain / "evaluation" / "knn.json"}[where]
    before, output = path.read_bytes(), plain.parent / "r.html"
    values = shape if isinstance(shape, dict) and shape else {"recipe": shape, "method": shape, "epoch": shape}
    try:
        for content in (json.dumps(shape), json.dumps(values | {"step": 99, "loss": shape})):
            path.write_text(content + "\n" if where != "log" else before.decode() + content + "\n")
            assert main(["report", str(plain), "-o", str(output)]) == 0
            page = output.read_text()
            assert "Published results" in page
            assert "nan %" not in page
            assert "6250.0 %" not in page
            assert len(page) < 1_000_000
            error = capsys.readouterr().err
            assert "Traceback" not in error
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100, None, "pipe", "folder", "loop"]
)
def test_any_bytes(plain: Path, content: bytes | str | None, capsys: pytest.CaptureFixture[str]) -> None:
    output = plain.parent / "r.html"
    for path in (plain / "evaluation" / "knn.json", plain / "log.jsonl", plain / "evaluation" / "detect-x.png"):
        before = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        try:
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda p: os.symlink(p, p)}[content](path)
            assert main(["report", str(plain), "-o", str(output)]) == 0
            assert "Published results" in output.read_text()
        finally:
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            if path.suffix != ".png":
                path.write_bytes(before)


@pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 1e-323], [1e16, 1e16 + 2], [1e-13, 2e-13], [0.0, 0.0]])
def test_extreme_values(values: list[float]) -> None:
    chart = line_chart("t", {"a": list(enumerate(values))}, x_label="x")
    assert "nan" not in chart
    assert len(set(ticks(1e-13, 2e-13))) > 2
    assert len(chart) < 20_000


@pytest.mark.parametrize(
    ("train", "val", "change", "note", "absent"),
    [
        (1, 1, "", "no class has 5 training images", "Accuracy by class"),
        (2, 2, "", "no class has 5 training images", "Accuracy by class"),
        (5, 1, "", "", "Left out"),
        (2, 1, "one class", "has one class, blue", "Embedding map"),
        (2, 1, "no test image of a class", "only in train: red", "Embedding map"),
        (2, 1, "no image", "no usable image in", "Embedding map"),
        (2, 1, "no checkpoint", "holds no checkpoint yet", "Embedding map"),
        (2, 1, "no log", "no class has 5", "Accuracy by class"),
    ],
)
def test_few_images(
    tmp_path: Path, train: int, val: int, change: str, note: str, absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_data(tmp_path / "data", train=train, val=val), write_run(tmp_path / "run")
    if change == "no test image of a class":
        next((data / "val" / "red").iterdir()).unlink()
    elif change in ("one class", "no image"):
        for path in data.rglob("*.png"):
            if change == "no image" or path.parent.name != "blue":
                path.unlink()
    elif change == "no checkpoint":
        for path in (run / "checkpoints").iterdir():
            path.unlink()
    assert main(["report", str(run), "--data", str(data), "--device", "cpu", "-o", str(tmp_path / "r.html")]) == 0
    error, page = capsys.readouterr().err, (tmp_path / "r.html").read_text()
    assert note in error
    assert note in page
    assert f"<h2>{absent}</h2>" not in page
    assert "--" not in error
    if not change:
        assert "<h2>Embedding map</h2>" in page
        assert "<h2>Nearest neighbours</h2>" in page


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "r.html"
    assert main(["report", str(run), "--data", str(tmp_path / "none"), "-o", str(output)]) == 2
    assert "has no folder train" in capsys.readouterr().err
    assert not output.exists()


def test_an_output_that_cannot_be_written(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(plain), "-o", str(tmp_path / "file" / "r.html")]) == 2
    assert "name another file with --output" in capsys.readouterr().err
