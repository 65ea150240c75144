"""The goal's sizes, tiny and on the CPU: what fails costs one measurement, and a new process goes on behind it."""

import json
from pathlib import Path

import pytest

from benchmarks.studies import goal_sizes
from benchmarks.studies.goal_sizes import main


def test_a_failing_measurement_and_one_that_ended_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(goal_sizes, "pictures", fails)
    words = ["-o", str(tmp_path / "goals"), "--device", "cpu", "--tiny"]
    assert main(words) == 1
    report = json.loads((tmp_path / "goals.json").read_text())
    assert report["errors"] == ["render_views: RuntimeError: CUDA error: an illegal memory access was encountered"]
    assert report["left"] == []
    names = report["done"]
    assert names[:2] == ["launches", "bank_nce full, bf16, B = 4"]
    measured = len(report["rows"])
    assert measured > 10

    report |= {"errors": [], "done": names[:-2], "running": names[-2]}  # as the file is while one runs
    (tmp_path / "goals.json").write_text(json.dumps(report))
    assert main([*words, "--resume"]) == 1
    report = json.loads((tmp_path / "goals.json").read_text())
    assert report["errors"] == [f"{names[-2]}: ended the process, or took longer than 60 s"]
    assert report["done"] == names
    assert measured < len(report["rows"]) < 2 * measured
    assert "WRONG: bank_nce" in (tmp_path / "goals.md").read_text()
