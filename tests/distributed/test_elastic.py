"""torchrun's agent restarts all ranks after one was killed, and the run resumes from its newest good checkpoint."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sslfast.config import load_json
from sslfast.distributed.process_group import destroy_process_group
from sslfast.runs import directory as rundir
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.runs.directory import RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.methods.harness import tiny_trunks
from tests.runs import test_kill_methods
from tests.tiny import TinyConfig, fork_server, log_values, same

ROWS = 17


def config(method: str) -> TrainConfig:
    """24 steps with a checkpoint after every fourth."""
    if method == "tiny":
        return TinyConfig(checkpoint_every_steps=4)
    return replace(test_kill_methods.config(method, checkpoint_every_steps=4), epochs=6, batch_size=4)


def rank(method: str, output: str, pids: str, pause: float) -> None:
    """One rank of a run; writes its pid to a file."""
    torch.set_num_threads(1)
    rundir.git_state = lambda _folder: None
    (Path(pids) / os.environ["RANK"]).write_text(str(os.getpid()))
    with tiny_trunks():
        trainer = Trainer(config(method), ROWS, output, report=lambda _line: None)
    after_step = trainer.method.after_step

    def slow() -> None:
        after_step()
        time.sleep(pause)

    trainer.method.after_step = slow  # type: ignore[method-assign]
    trainer.fit()
    destroy_process_group()


def launch(method: str, output: Path, pids: Path, pause: float) -> None:
    """What ``torchrun --standalone --nproc-per-node 2 --max-restarts 3`` does, with processes of the fork server."""
    pids.mkdir()
    fork_server()
    options = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=3,
        run_id=output.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="forkserver",
        monitor_interval=0.05,
    )
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        elastic_launch(options, rank)(method, str(output), str(pids), pause)
    finally:  # the agent leaves its own behind, in this process
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def kill_in_step(output: Path, pids: Path, victims: list[int]) -> None:
    """SIGKILL to each victim once there is a checkpoint that was not there when the one before it died."""
    known: set[Path] = set()
    for victim in victims:
        while set(list_checkpoints(RunDirectory(output).checkpoints)) <= known:
            time.sleep(0.005)
        time.sleep(0.05)
        known = set(list_checkpoints(RunDirectory(output).checkpoints))
        os.kill(int((pids / str(victim)).read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("method", "victims"), [("tiny", [1, 0]), ("deepcluster", [1]), ("sela", [1])])
def test_a_killed_rank_restarts_all_and_the_run_ends_bit_equal(method: str, victims: list[int], tmp_path: Path) -> None:
    """Rank 1 is killed, which does not write, and in one run then rank 0, which holds the lock of the directory. The
    others assign labels in feature passes over all ranks, which a restart in the middle of an epoch has to keep."""
    launch(method, tmp_path / "whole", tmp_path / "whole-pids", 0.0)
    killed, pids = tmp_path / "killed", tmp_path / "pids"
    killer = threading.Thread(target=kill_in_step, args=(killed, pids, victims), daemon=True)
    killer.start()
    launch(method, killed, pids, 0.05)
    killer.join(1)
    assert not killer.is_alive()
    assert len(load_json(RunDirectory(killed).versions)["starts"]) == len(victims) + 1
    last = [load_checkpoint(list_checkpoints(RunDirectory(p).checkpoints)[-1]) for p in (killed, tmp_path / "whole")]
    assert last[0]["step"] == 24
    assert same(last[0], last[1])
    assert log_values(killed) == log_values(tmp_path / "whole")
