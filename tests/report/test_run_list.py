"""The table of runs: every run of a folder, whatever state it is in, in one line."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sslfast.cli.main import main
from sslfast.report import list_runs, render_runs, sort_runs
from sslfast.runs import RunDirectory


def write_run(path: Path, *, epochs: int = 4, done: float = 4.0, knn: tuple[float, ...] = (), **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "checkpoints").mkdir()
    (path / "versions.json").write_text("{}")
    table = {"recipe": "pirl-small", "epochs": epochs, "model": {"width": 0.25}, "device": "cpu", **config}
    (path / "config.json").write_text(json.dumps(table))
    records: list[dict[str, Any]] = [{"step": i, "epoch": 1.0, "loss": 9.0, "knn_top1": v} for i, v in enumerate(knn)]
    records.append({"step": 99, "epoch": done, "loss": 2.5, "time": {"unix_seconds": 1.0}})
    (path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_result(run: Path, name: str, *values: float, encoder: str = "trained") -> None:
    (run / "evaluation").mkdir(exist_ok=True)
    rows = [{"encoder": encoder, "top1": value, "top5": 1.0} for value in values]
    rows.append({"encoder": "untrained", "top1": 0.99})
    (run / "evaluation" / f"{name}.json").write_text(json.dumps({"results": rows}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_result(write_run(tmp_path / "a", knn=(0.5, 0.7, 0.6)), "linear", 0.4, 0.6)
    write_run(tmp_path / "deep" / "b", done=1.5, device="cuda", model={"width": 0.5}, knn=(0.9,))
    write_run(tmp_path / "c", recipe="moco-v2", seed=3)
    return tmp_path


def test_states_numbers_and_the_settings_that_differ(folder: Path) -> None:
    a, c, b = list_runs(folder)
    assert [run.name for run in (a, b, c)] == ["a", "deep/b", "c"]
    assert (a.state, a.epochs, a.of_epochs, a.loss) == ("finished", 4.0, 4, 2.5)
    assert (b.state, b.epochs) == ("interrupted", 1.5)
    assert a.scores == {"knn_top1": 0.7, "linear": 0.6}
    assert (a.shown, b.shown, c.shown) == ({"model.width": 0.25}, {"model.width": 0.5}, {})
    with RunDirectory(folder / "deep" / "b").locked():
        assert list_runs(folder)[2].state == "running"
    assert list_runs(folder)[2].state == "interrupted"
    assert [run.name for run in list_runs(folder / "a")] == ["a"]


def test_looking_takes_no_lock(folder: Path) -> None:
    run = RunDirectory(folder / "a")
    with run.locked():
        pass
    os.chmod(folder / "a" / ".lock", 0o444)
    code = f"from sslfast.runs import RunDirectory; print(RunDirectory({str(folder / 'a')!r}).is_locked())"
    assert not run.is_locked()
    os.chmod(folder / "a" / ".lock", 0o644)
    with run.locked():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
        with pytest.raises(ValueError, match="in use"):
            run.check_unlocked()


def test_lines_and_order(folder: Path) -> None:
    lines = render_runs(sort_runs(list_runs(folder), "knn_top1")).splitlines()
    assert lines[0].split() == [
        "name",
        "recipe",
        "state",
        "epochs",
        "loss",
        "knn_top1",
        "linear",
        "settings",
        "that",
        "differ",
    ]
    assert lines[1].split() == [
        "deep/b",
        "pirl-small",
        "interrupted",
        "1.5/4",
        "2.5",
        "90.0",
        "%",
        "-",
        "model.width=0.5",
    ]
    assert lines[2].split()[0] == "a"
    assert lines[3].split() == ["c", "moco-v2", "finished", "4/4", "2.5", "-", "-"]
    assert [run.name for run in sort_runs(list_runs(folder), "epochs")] == ["deep/b", "a", "c"]
    assert sort_runs(list_runs(folder), "seed")[0].name == "c"
    assert render_runs(list_runs(folder), ["name", "model.width"]).splitlines()[1].split() == ["a", "0.25"]


def test_as_json_and_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder), "--json", "--sort", "recipe"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found] == ["c", "a", "deep/b"]
    assert found[1]["scores"] == {"knn_top1": 0.7, "linear": 0.6}
    assert main(["runs", str(folder), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["model.width"] for row in rows] == ["0.25", "0.25", "0.5"]
    assert [row["knn_top1"] for row in rows] == ["0.7", "", "0.9"]


def test_broken_runs_are_named_and_end_nothing(folder: Path) -> None:
    (folder / "a" / "log.jsonl").write_bytes(b'\xff\xfe nonsense\n{"step": 1, "epoch": "x", "loss": NaN}\n{"st')
    (folder / "a" / "evaluation" / "linear.json").write_text('{"results": [3, {"top1": "x"}, {"top1": true}]}')
    (folder / "a" / "evaluation" / "broken.json").write_text("{")
    (folder / "c" / "config.json").write_text("[]")
    os.remove(folder / "deep" / "b" / "config.json")
    os.symlink(folder, folder / "deep" / "loop")
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    (folder / "empty" / ".lock").touch()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    found = {run.name: run for run in list_runs(folder)}
    assert set(found) == {"a", "deep/b", "c", "empty"}
    assert found["a"].state == "interrupted"
    assert "broken.json is not JSON" in found["a"].note
    assert [found[name].state for name in ("deep/b", "c", "empty")] == ["unreadable"] * 3
    text = render_runs(sort_runs(list(found.values()), "loss"))
    assert "deep/b: " in text
    assert "c: " in text
    assert len(text.splitlines()) == 1 + 4 + 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gone"], "gone is no folder; name one that holds run directories"),
        (["empty"], "empty holds no run of sslfast pretrain; name another folder"),
        ([".", "--sort", "knn_top"], "no run has a column 'knn_top'; did you mean knn_top1?"),
        ([".", "--columns", "qqq"], "no run has a column 'qqq'; known: name, recipe, state"),
        ([".", "--json", "--csv"], "--json prints everything; leave --csv and --columns out"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    assert main(["runs", *arguments]) == 2
    assert expected in capsys.readouterr().err
