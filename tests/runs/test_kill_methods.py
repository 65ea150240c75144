"""Methods with state of their own (queue and momentum encoder, cluster assignments, optimal-transport labels), killed
at random moments: the run ends bit-equal to an uninterrupted one."""

import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.recipes.clustering import deepcluster_small, sela_small
from sslfast.recipes.contrastive import moco_v2_small
from sslfast.runs import directory as rundir
from sslfast.runs.checkpoint import checkpoint_path, checkpoint_step, list_checkpoints, load_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.methods.harness import ROWS, tiny, tiny_trunks
from tests.tiny import fork_server, log_values, same

KILLS = 20
EPOCHS = 15
STEPS = 3 * EPOCHS


def config(method: str, checkpoint_every_steps: int) -> TrainConfig:
    made: dict[str, Any] = {
        "moco-v2": lambda: tiny(moco_v2_small(), queue_size=16),
        "deepcluster": lambda: tiny(deepcluster_small(), clusters=4, pca_dimensions=8, every_epochs=1),
        "sela": lambda: tiny(sela_small(), heads=2, clusters=4),
    }
    config: TrainConfig = made[method]()
    config.epochs, config.checkpoint_every_steps = EPOCHS, checkpoint_every_steps
    return config


def train(method: str, output: str, checkpoint_every_steps: int) -> None:
    """The child."""
    torch.set_num_threads(1)
    rundir.git_state = lambda _folder: None  # three processes of git at every start
    with tiny_trunks():
        Trainer(config(method, checkpoint_every_steps), ROWS, output, report=lambda _line: None).fit()


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.mark.parametrize("method", ["moco-v2", "deepcluster", "sela"])
def test_killed_often_at_random_moments(method: str, server: ForkServerContext, tmp_path: Path) -> None:
    output, whole = tmp_path / "killed", tmp_path / "whole"
    uninterrupted = server.Process(target=train, args=(method, str(whole), STEPS))
    uninterrupted.start()
    rng = random.Random(method)
    for _ in range(KILLS):
        known = {path.name for path in list_checkpoints(output / "checkpoints")}
        child = server.Process(target=train, args=(method, str(output), 1))
        child.start()
        while child.is_alive() and {path.name for path in list_checkpoints(output / "checkpoints")} <= known:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert KILLS <= checkpoint_step(list_checkpoints(output / "checkpoints")[-1]) < STEPS
    last = server.Process(target=train, args=(method, str(output), STEPS))
    last.start()
    last.join()
    uninterrupted.join()
    assert last.exitcode == uninterrupted.exitcode == 0
    states = [load_checkpoint(checkpoint_path(path / "checkpoints", STEPS)) for path in (output, whole)]
    # Another checkpoint interval is in the saved configuration, and nowhere else.
    assert same(states[0] | {"config": None}, states[1] | {"config": None})
    assert log_values(output) == log_values(whole)
