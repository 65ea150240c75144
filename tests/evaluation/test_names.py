"""Class and file names that nobody expects, through everything that stores names: they come back as they were."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from sslfast.cli.main import main
from sslfast.data.ground_truth import label_images
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data
from sslfast.evaluation.embed import read_embeddings
from sslfast.report.run_list import csv_of_runs, list_runs
from tests.evaluation.runs import write_run
from tests.pictures import encoded, picture

NAMES = [
    "line\nfeed", "carriage\rreturn", "tab\there", "\x01control", 'quo"te', "com,ma", "semi;colon", "#hash", "-dash",
    "space ", "dot.", "\u202eright to left", "\udcff\udcfe", "x" * 249, "per%cent%s", "{brace}", "back\\slash", "train",
    "val", "a\u2028b", "=1", "*?[x]", "<b>&amp;",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names") / "data"
    for key, name in enumerate(NAMES):
        path = root / name / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(picture(24, 20, key), "PNG"))
    return root


def classes_of(manifest: Manifest) -> dict[str, str | None]:
    labels = manifest.labels.tolist()
    return {path: manifest.classes[label] for path, label in zip(manifest.paths, labels, strict=True)}


def wanted(start: str = "") -> dict[str, str | None]:
    return {f"{start}{name}/{name}.png": name for name in NAMES}


def escaped(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def test_in_folders_manifests_archives_and_lists(data: Path, tmp_path: Path) -> None:
    manifest = open_data(data)
    manifest.save(tmp_path / "m.tsv")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for path in wanted():
            archive.add(data / path, arcname=path)
    (data.parent / "l.jsonl").write_text("".join(json.dumps([*row]) + "\n" for row in wanted("data/").items()))
    assert main(["data", "prepare", str(data), str(tmp_path / "b.beton"), "--workers", "0"]) == 0
    for found in (
        manifest,
        Manifest.load(tmp_path / "m.tsv"),
        open_data(tmp_path / "t.tar"),
        open_data(tmp_path / "b.beton"),
    ):
        assert classes_of(found) == wanted()
    listed = wanted("data/") | {"data/space /space .png": "space"}  # lists leave out space around a label
    assert classes_of(open_data(data.parent / "l.jsonl")) == listed


def test_in_lists_that_are_written(data: Path) -> None:
    flat = data.parent / "flat"
    flat.mkdir()
    for name in NAMES:
        (flat / f"{name}.png").write_bytes((data / name / f"{name}.png").read_bytes())
    labels = data.parent / "labels.txt"
    labels.write_text("".join(f"{number}\n" for number in range(len(NAMES))))
    assert label_images(flat, labels, data.parent / "val.csv") == len(NAMES)
    paths = [*open_data(data.parent / "val.csv").paths]
    assert paths == sorted(f"flat/{name}.png" for name in NAMES)


def test_in_embeddings(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for suffix in (".npy", ".parquet"):
        path = tmp_path / f"e{suffix}"
        assert main(["embed", str(run), str(data), "-o", str(path), "--device", "cpu"]) == 0
        found = read_embeddings(path)
        shown = {escaped(path): escaped(name or "") for path, name in wanted().items()}  # .parquet holds UTF-8 alone
        assert dict(zip(found.paths, found.classes, strict=True)) == (wanted() if suffix == ".npy" else shown)
        sheet = tmp_path / "n.png"
        assert main(["neighbours", str(path), str(data), "-o", str(sheet), "--device", "cpu"]) == 0


def test_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "log.jsonl").write_text('{"step": 1, "epoch": 1.0, "loss": 2.0}\n')
    table = csv_of_runs(list_runs(tmp_path / "runs"))
    rows = list(csv.reader(io.StringIO(table, newline=""), strict=True))
    assert [row[0] for row in rows[1:]] == sorted(NAMES)
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + 2 * len(
        NAMES
    )  # a line each, and a note that its configuration is gone
