"""The whole of `make gpu-check`, rehearsed on the CPU at tiny sizes; its verdicts; its results."""

import json
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PART_SECONDS, main
from benchmarks.gpu_steps import STEPS, Check, goals, run_tests
from tests.tiny import write_images


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "val"):
        write_images(data / split, 32 if split == "train" else 8)
    code = main([str(out), "--rehearse", "--data", str(data), "--tar", str(tmp_path / "r.tar")])
    assert code == 0, (capsys.readouterr().out, (out / "summary.md").read_text())
    state = json.loads((out / "state.json").read_text())
    assert {name: step["end"] for name, step in state["steps"].items()} == {step.name: "ok" for step in STEPS}
    with tarfile.open(tmp_path / "r.tar") as tar:
        members = {member.name: member.size for member in tar.getmembers()}
        results = json.load(tar.extractfile("results.json"))  # type: ignore[arg-type]
    assert {"summary.md", "results.json", "tables.md", "logs.txt", "goals.png", "crossover.png"} <= set(members)
    assert len(members) <= 8
    assert max(members.values()) < 16 * 2**20
    assert results["goals"]["launches"] == {"bank_update_": 1, "bank_enqueue_": 1, "ema_update_": 1}
    assert {"state", "goals", "crossover", "step", "learn", "overhead", "loaders"} <= set(results)


def test_a_part_alone_adds_to_what_is_there(tmp_path: Path) -> None:
    for part, step in (("2", "loaders"), ("3", "racecheck"), ("1", "loaders")):  # none of them starts a process
        assert main([str(tmp_path), "--rehearse", "--part", part, "--step", step]) == 0
    state = json.loads((tmp_path / "state.json").read_text())
    assert set(state["steps"]) == {"loaders", "racecheck"}
    assert "| goals | not run yet |" in (tmp_path / "summary.md").read_text()


def test_parts_fit_their_time() -> None:
    # The build of an unchanged tree takes seconds; steps that find no time left say so.
    for part in (1, 2, 3):
        assert sum(step.seconds for step in STEPS if step.part == part) <= PART_SECONDS


def check(out: Path, *, seconds: float = 100) -> Check:
    found = Check(out=out, rehearse=True, data=None, architecture="", environment=dict(os.environ))
    found.ends = time.monotonic() + seconds
    return found


def test_slow_and_failing_commands(tmp_path: Path) -> None:
    assert check(tmp_path).python("a", "-c", "import time; time.sleep(60)", seconds=6) == "longer than 6 s"
    assert check(tmp_path).python("a", "-c", "raise SystemExit(3)", seconds=20) == "exit code 3"
    # As a rehearsal runs modules.
    slow = ("-m", "timeit", "-n1", "-r1", "import time; time.sleep(60)")
    assert check(tmp_path).python("a", *slow, seconds=6) == "longer than 6 s"
    assert check(tmp_path).python("a", "-m", "json.tool", "/nothing", seconds=90) == "exit code 2"
    assert check(tmp_path, seconds=1).python("a", "-c", "", seconds=20) == "not run: the part's time was over"


def test_a_skip_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Check, name: str, *arguments: str, **_: object) -> str:
        report = next(word.split("=", 1)[1] for word in arguments if word.startswith("--junitxml="))
        Path(report).write_text('<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>')
        return "ok"

    monkeypatch.setattr(Check, "python", run)
    assert run_tests(check(tmp_path), 10) == ("1 skipped of 3 tests", "3 tests, 0 failures, 0 errors, 1 skipped")


def test_measurements_go_on_behind_one_that_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel that hangs, a trap and a broken machine do."""
    calls: list[bool] = []

    def run(self: Check, name: str, *arguments: str, **_: object) -> str:
        calls.append("--resume" in arguments)
        undone = ["a", "b", "c"][min(len(calls), lost - 1) if lost else len(calls) :]
        (tmp_path / "goals.json").write_text(json.dumps({"left": undone}))
        return "exit code 1" if undone else "ok"

    monkeypatch.setattr(Check, "python", run)
    lost = 0
    assert goals(check(tmp_path), 10)[0] == "ok"
    assert calls == [False, True, True]
    calls, lost = [], 2  # no process gets further than the second measurement
    assert goals(check(tmp_path), 10)[0] == "exit code 1"
    assert calls == [False, True]


def test_later_steps_and_the_tar_survive_a_broken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_check: Check, _seconds: float) -> tuple[str, str]:
        (tmp_path / "crossover.json").write_text('{"half of')
        raise OSError("no space left")

    steps = [replace(step, function=breaks) if step.name == "crossover" else step for step in STEPS]
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert main([str(tmp_path), "--rehearse", "--part", "2", "--step", "crossover", "loaders"]) == 1
    state = json.loads((tmp_path / "state.json").read_text())["steps"]
    assert state["crossover"]["end"] == "FAILED: OSError: no space left"
    assert state["loaders"]["end"] == "ok"
    with tarfile.open(tmp_path / "gpu-check.tar") as tar:
        assert "crossover" not in json.load(tar.extractfile("results.json"))  # type: ignore[arg-type]


def test_results_of_an_earlier_run_are_gone(tmp_path: Path) -> None:
    (tmp_path / "loaders_runs").mkdir()
    for name in ("loaders.json", "loaders.log", "loaders_runs/loaders.json", "goals.json"):
        (tmp_path / name).write_text("{}")
    assert main([str(tmp_path), "--rehearse", "--part", "2", "--step", "loaders"]) == 0
    assert not list(tmp_path.glob("loaders*"))
    assert (tmp_path / "goals.json").exists()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="needs a CUDA device that torch can see; --rehearse"):
        main([str(tmp_path)])


def test_wrong_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--rehearse", "--data", str(tmp_path)])
    assert "must hold train/ and val/" in capsys.readouterr().err
