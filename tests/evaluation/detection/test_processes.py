"""Detectors trained by two processes over gloo: the weights and scores of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.config import load_json
from sslfast.distributed.collectives import barrier, is_main
from sslfast.distributed.process_group import distributed_device
from sslfast.evaluation.detection.evaluate import evaluate_detect
from tests.distributed.test_training import enter
from tests.distributed.test_training import run as run_ranks
from tests.evaluation.detection.fixtures import SMALL, train_detector, write_boxed_voc, write_narrow_run


def rank_trains(number: int, ranks: int, port: int, folder: Path) -> None:
    enter(number, ranks, port)
    with distributed_device("cpu"):
        for moco in (False, True):
            model = train_detector(folder / "run", folder / "VOC2007", moco=moco, iterations=2, dtype=torch.float64)
            if is_main():
                torch.save(model.state_dict(), folder / f"{moco}.pt")
            barrier()
        options: dict[str, Any] = {**SMALL, "iterations": 1, "output": folder / "two.json"}
        evaluate_detect(folder / "run", (folder / "VOC2007",), **options)


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """Weights in float64: the choice of proposals is discrete, and float32 rounding, which differs between batch
    splits and between CPUs, is enough to choose others and so to change gradients by a fifth. In float64 the two agree
    to about 1e-14."""
    run = write_narrow_run(tmp_path / "run")
    voc = write_boxed_voc(tmp_path, trainval=range(24), test=range(24, 29))
    run_ranks(rank_trains, 2, tmp_path)
    for moco in (False, True):
        two = torch.load(tmp_path / f"{moco}.pt", weights_only=True)
        one = train_detector(run, voc, moco=moco, iterations=2, dtype=torch.float64).state_dict()
        for name, value in one.items():
            torch.testing.assert_close(
                two[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name} {text}"
            )
    options: dict[str, Any] = {**SMALL, "iterations": 1, "output": tmp_path / "one.json"}
    single, pair = evaluate_detect(run, (voc,), **options), load_json(tmp_path / "two.json")
    assert (single["processes"], pair["processes"]) == (1, 2)
    assert single["data"] == pair["data"]
    assert pair["results"][0]["ap50"] == pytest.approx(single["results"][0]["ap50"], abs=0.05)
    assert (tmp_path / "detect-examples.png").is_file()
