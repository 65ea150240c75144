"""``sslfast launch slurm``: the batch script, and jobs on this machine by submitit's local executor."""

import os
import signal
import time
from pathlib import Path

import pytest
import submitit

from sslfast.cli.launch import PretrainJob
from sslfast.cli.main import main
from sslfast.runs.log import read_log

RUN = ["synthetic:32", "--recipe", "pirl-small", "--method.num-negatives", "8", "--model.width", "0.125"]
RUN += ["--workers", "0", "--device", "cpu", "--batch-size", "4", "--epochs", "1", "--no-tensorboard"]
RUN += ["--progress", "plain", "--log-every-steps", "1"]


def script(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[str]:
    command = ["launch", "slurm", "--dry-run", "--folder", str(tmp_path), *options, "--", *RUN]
    assert main(command) == 0
    return capsys.readouterr().out.splitlines()


def test_the_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--nodes", "4", "--hours", "2.5", "--save-seconds", "240", "--partition", "gpu", "--account", "mine"]
    options += ["--memory-gb", "500", "--name", "x"]
    lines = script([*options, "--sbatch", "mail-type=END", "exclusive"], capsys, tmp_path)
    for option in (
        "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=8", "time=150", "signal=USR2@240",
        "mem=512000M", "partition=gpu", "account=mine", "job-name=x", "mail-type=END", "requeue", "exclusive",
        "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert lines[0] == "#!/bin/bash"
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)


def test_cpu_processes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = script(["--gpus-per-node", "0", "--processes-per-node", "3"], capsys, tmp_path)
    assert "#SBATCH --ntasks-per-node=3" in lines
    assert not any("gpus" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "run", "words"),
    [
        ([], [], "what is to run is missing; append -- and the arguments of sslfast pretrain"),
        ([], ["synthetic:9", "--recipe", "pirl-smal"], "unknown recipe 'pirl-smal'"),
        ([], ["synthetic:9", "--recipe", "demo", "--epochs", "x"], "--epochs"),
        (["--nodes", "0"], RUN, "--nodes must be at least 1, got 0"),
        (
            ["--hours", "0.02", "--save-seconds", "72"],
            RUN,
            "--save-seconds must be less than the 72 of --hours",
        ),
        (["--processes-per-node", "4"], RUN, "--processes-per-node 4 differs from --gpus-per-node 8; leave it out"),
        (["--sbatch", "=x"], RUN, "--sbatch takes options of sbatch as NAME=VALUE, got '=x'"),
        (["--cluster", "local"], RUN, "--dry-run prints a batch script, which --cluster local has none of"),
    ],
)
def test_mistakes(
    options: list[str], run: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["launch", "slurm", "--dry-run", "--folder", str(tmp_path / "s"), *options, "--", *run]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_without_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", "--folder", str(tmp_path), "--", *RUN]) == 2
    assert "there is no srun here: submit from a machine of a Slurm cluster" in capsys.readouterr().err


def test_a_time_limit_saves_and_requeues(tmp_path: Path) -> None:
    """The signal of the time limit comes in the middle of two processes; the second start does the other steps."""
    executor = submitit.LocalExecutor(folder=tmp_path / "%j", max_num_timeout=3)
    executor.update_parameters(timeout_min=9, signal_delay_s=1, tasks_per_node=2, gpus_per_node=0)
    job = executor.submit(PretrainJob([*RUN, "-o", str(tmp_path / "run")]))
    controller, log = job._process, tmp_path / "run" / "log.jsonl"
    end = time.monotonic() + 400
    while not log.exists() or not log.read_text().count("\n"):
        assert time.monotonic() < end, job.stderr()
        assert controller.poll() is None, job.stderr()
        time.sleep(0.02)
    for process in Path(f"/proc/{controller.pid}/task/{controller.pid}/children").read_text().split():
        os.kill(int(process), signal.SIGUSR2)
    assert controller.wait(400) == 0
    assert job.results() == [0, 0]
    output = f"{job.stdout()}{job.stderr()}"
    assert "Requeued job" in output
    assert "SIGTERM: finishing the step and saving" in output
    assert [record["step"] for record in read_log(log)] == list(range(1, 9))


def test_an_error_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    command = ["launch", "slurm", "--cluster", "local", "--gpus-per-node", "0", "--folder", str(tmp_path / "jobs")]
    run = [str(tmp_path / "empty"), "--recipe", "pirl-small", "-o", str(tmp_path / "run")]
    assert main([*command, "--", *run]) == 1
    written = Path(capsys.readouterr().out.partition(" and ")[2].strip()).read_text()
    assert f"sslfast: error: no usable image in {tmp_path / 'empty'}" in written
