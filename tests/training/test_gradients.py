"""Clipping and frozen parameters in a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.methods import Rotation
from sslfast.optim import ParameterOptions
from sslfast.recipes.pretext import rotation_small
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.methods import harness
from tests.tiny import same


def config(**optim: Any) -> TrainConfig:
    whole = harness.tiny(rotation_small())
    return replace(whole, optim=replace(whole.optim, **optim))


def trained(config: TrainConfig, output: Path) -> dict[str, Any]:
    with harness.tiny_trunks(normalised=False):
        Trainer(config, harness.ROWS, output, report=lambda _line: None).fit()
    state: dict[str, Any] = harness.final(output)["method"]
    return state


def test_the_gradient_of_the_whole_batch_is_clipped(tmp_path: Path) -> None:
    """Micro-batches are clipped together, after the last one."""
    free = trained(config(), tmp_path / "free")
    whole = trained(config(clip_grad_norm=0.1), tmp_path / "whole")
    parts = trained(replace(config(clip_grad_norm=0.1), accumulate_steps=4), tmp_path / "parts")
    assert not torch.allclose(free["trunk.conv1.weight"], whole["trunk.conv1.weight"], rtol=0, atol=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_layer_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name, _ in harness.build(config()).named_children() if name != "trunk")
    monkeypatch.setattr(Rotation, "parameter_options", lambda _self: {name: ParameterOptions(frozen_steps=4)})
    start = harness.build(config()).state_dict()
    harness.train(config(), tmp_path / "run", stop_after=3)
    stopped = harness.final(tmp_path / "run")["method"]
    kept = [key for key in start if key.startswith(f"{name}.")]
    assert same({key: stopped[key] for key in kept}, {key: start[key] for key in kept})
    harness.train(config(), tmp_path / "run")
    harness.train(config(), tmp_path / "whole")
    assert same(harness.final(tmp_path / "run")["method"], harness.final(tmp_path / "whole")["method"])
    assert not torch.equal(harness.final(tmp_path / "run")["method"][kept[0]], start[kept[0]])
