"""Helpers of every method's tests: small recipes made tiny, a trunk of milliseconds, and the checks that all must pass.

``tiny(recipe())`` shrinks a small recipe; every function here runs it on synthetic images, without a file, with
:class:`TinyTrunk` in place of the ResNet. Tests that build a method themselves do so under ``tiny_trunks()``.
"""

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from sslfast.distributed.process_group import destroy_process_group
from sslfast.loaders.registry import LoaderConfig, build_loader
from sslfast.methods.base import Method
from sslfast.models import resnet
from sslfast.optim.optimizers import build_optimizer
from sslfast.runs.checkpoint import list_checkpoints, load_checkpoint
from sslfast.runs.log import read_log
from sslfast.training.config import TrainConfig
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from sslfast.views.stage import ViewStage
from sslfast.views.types import View, ViewConfig
from tests.distributed.test_training import enter, run
from tests.tiny import context, same

SIZE = 32
"""Side of the largest crop of a tiny recipe."""
BATCH = 8
ROWS = 3 * BATCH
"""Images of a run: three steps an epoch."""


class TinyTrunk(resnet.ResNetTrunk):
    """A ResNet's modules, maps and strides (small stem) in 8 to 24 channels, one convolution a stage."""

    out_features = 24
    normalised = True

    def __init__(self, config: resnet.ResNetConfig) -> None:
        nn.Module.__init__(self)
        norm = resnet.norm_layer(config) if self.normalised else lambda _channels: nn.Identity()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.relu, self.maxpool = nn.ReLU(), nn.Identity()
        channels = (8, 8, 12, 16, 24)
        for stage in range(4):
            convolution = nn.Conv2d(channels[stage], channels[stage + 1], 3, stride=2 if stage else 1, padding=1)
            layer = nn.Sequential(convolution, norm(channels[stage + 1]), nn.ReLU())
            setattr(self, f"layer{stage + 1}", layer)


class NormFreeTrunk(TinyTrunk):
    """Without BatchNorm: the output for an image does not depend on the rest of the batch."""

    normalised = False


@contextmanager
def tiny_trunks(*, normalised: bool = True) -> Iterator[None]:
    """Methods built inside have a :class:`TinyTrunk`."""
    with patch.object(resnet, "ResNetTrunk", TinyTrunk if normalised else NormFreeTrunk):
        yield


def tiny(config: TrainConfig, **method_changes: Any) -> TrainConfig:
    """A recipe for small images, made tiny: crops of at most 32 px (jigsaw patches in proportion), batch 8, 2 epochs.

    ``method_changes``: fields of the method's configuration, for sizes that only the method has.
    """
    method = config.method
    shrunk = {
        field.name: _shrunk(view)
        for field in fields(method)
        if isinstance(view := getattr(method, field.name), ViewConfig)
    }
    return replace(
        config,
        method=replace(method, **{**shrunk, **method_changes}),
        loader=LoaderConfig(name="synthetic", workers=0),
        epochs=2,
        batch_size=BATCH,
        device="cpu",
        precision="fp32",
        log_every_steps=2,
        checkpoint_every_steps=1000,
        tensorboard=False,
        progress="off",
    )


def _shrunk(view: ViewConfig) -> ViewConfig:
    size = min(view.crop.size, SIZE)
    jigsaw = view.jigsaw
    if jigsaw is not None:
        patch_size = max(4, jigsaw.patch_size * size // view.crop.size)
        jigsaw = replace(jigsaw, patch_size=min(patch_size, size // jigsaw.grid), max_offset=None)
    return replace(view, crop=replace(view.crop, size=size), jigsaw=jigsaw)


def build(config: TrainConfig, *, rows: int = ROWS, normalised: bool = True) -> Method:
    """The method of a recipe, on a tiny trunk, in training mode."""
    with tiny_trunks(normalised=normalised):
        return config.method.build(context(config.model, rows, seed=config.seed)).train()


def first_batch(config: TrainConfig, *, rows: int = ROWS) -> tuple[dict[str, View], Tensor]:
    """Views and sample ids of step 0 of a run on synthetic images."""
    views = config.method.views()
    loader = build_loader(
        config.loader, views=views, batch_size=config.batch_size, seed=config.seed, synthetic_rows=rows
    )
    batch = next(iter(loader.epoch(0)))
    return ViewStage(views, seed=config.seed, channels_last=False)(batch), batch.sample_ids


def train(config: TrainConfig, output: Path, *, data: Path | int = ROWS, stop_after: int | None = None) -> Trainer:
    """A run in this process, to its end or through SIGTERM in the middle of step ``stop_after`` (1-based).

    ``data``: a number of synthetic images, or a folder (then with the loader for files).
    """
    if isinstance(data, Path):
        config = replace(config, loader=LoaderConfig(workers=0))
    with tiny_trunks():
        trainer = Trainer(config, data, output, report=lambda _line: None)
    if stop_after is None:
        trainer.fit()
        return trainer
    after_step = trainer.method.after_step

    def interrupted() -> None:
        if trainer.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step()

    trainer.method.after_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(RunInterruptedError, match=f"after step {stop_after}/"):
        trainer.fit()
    return trainer


def final(output: Path) -> dict[str, Any]:
    """The newest checkpoint of a run directory."""
    return load_checkpoint(list_checkpoints(output / "checkpoints")[-1])


def losses(output: Path) -> list[float]:
    """The logged losses of a run directory."""
    return [record["loss"] for record in read_log(output / "log.jsonl")]


def assert_resumes(
    config: TrainConfig, tmp_path: Path, *, data: Path | int = ROWS, stops: tuple[int, ...] = (2, 3)
) -> None:
    """A run stopped inside an epoch (step 2 of 3) and at an epoch's end (step 3) equals an uninterrupted one.

    Equal to the last bit: weights, buffers, optimizer, log.
    """
    train(config, tmp_path / "whole", data=data)
    for stop in stops:
        output = tmp_path / f"stopped{stop}"
        train(config, output, data=data, stop_after=stop)
        train(config, output, data=data)
        for part in ("method", "optimizer", "step", "metrics"):
            assert same(final(output)[part], final(tmp_path / "whole")[part]), f"stopped after {stop}: {part} differs"
        assert losses(output) == losses(tmp_path / "whole")


def overfit(config: TrainConfig, *, steps: int = 40, lr: float | None = None) -> list[float]:
    """The losses of training on one batch, its views drawn once, at a constant learning rate.

    ``lr``: default the recipe's at this batch size.
    """
    method = build(config)
    peak, options = config.optim.peak_lr(config.batch_size), method.parameter_options()
    optimizer = build_optimizer(method, config.optim, lr=peak, options=options)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    views, rows = first_batch(config)
    method.start_epoch(0)
    losses = []
    for step in range(steps):
        loss = method(views, rows, step=step)["loss"]
        loss.backward()
        optimizer.step()
        method.after_step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses)), losses
    return losses


def assert_overfits(config: TrainConfig, *, steps: int = 40, lr: float | None = None, share: float = 0.5) -> None:
    """The last losses of :func:`overfit` are below ``share`` of the first."""
    values = overfit(config, steps=steps, lr=lr)
    assert max(values[-3:]) < share * values[0], values


def assert_gradients_reach_the_trunk(config: TrainConfig) -> Method:
    """Every parameter that takes gradients has one that is finite, the trunk's are not zero; returns the method.

    Biases right before a BatchNorm are shifted away by it: theirs is zero, as are a trunk's unused ones.
    """
    method = build(config)
    views, rows = first_batch(config)
    method.start_epoch(0)
    method(views, rows, step=0)["loss"].backward()
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, parameter in method.trunk.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    return method


def _train_rank(rank: int, ranks: int, port: int, config: TrainConfig, output: Path, normalised: bool) -> None:
    enter(rank, ranks, port)
    with tiny_trunks(normalised=normalised):
        Trainer(config, ROWS, output, report=lambda _line: None).fit()
    destroy_process_group()


def assert_two_processes_train_as_one(
    config: TrainConfig, tmp_path: Path, *, normalised: bool = False, lr: float | None = None
) -> None:
    """Losses and all state of a run of two gloo processes are those of one, up to the order of sums.

    ``normalised=False``: without BatchNorm, which sees each rank's own part of the batch. ``lr``: at batch 256.
    """
    if lr is not None:
        config = replace(config, optim=replace(config.optim, lr_per_256_images=lr, final_lr_per_256_images=0.0))
    for ranks in (1, 2):
        run(_train_rank, ranks, config, tmp_path / str(ranks), normalised)
    one, two = final(tmp_path / "1"), final(tmp_path / "2")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-4, abs=1e-5)
    for name, value in one["method"].items():
        torch.testing.assert_close(
            two["method"][name], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=f"{name} differs"
        )
