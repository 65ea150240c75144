import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslfast.methods.base import Method
from sslfast.recipes.clustering import deepcluster_small, sela_small
from sslfast.training.config import TrainConfig
from sslfast.training.dry_run import summary
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from sslfast.views.types import Batch, View
from tests.methods.harness import ROWS, final, losses, tiny, tiny_trunks, train
from tests.tiny import TinyConfig, same


def config(name: str = "deepcluster", **changes: Any) -> TrainConfig:
    if name == "sela":
        return tiny(sela_small(), **{"heads": 2, "clusters": 4, **changes})
    return tiny(deepcluster_small(), **{"clusters": 4, "pca_dimensions": 8, "every_epochs": 1, **changes})


def trainer_of(config: TrainConfig, output: Path) -> Trainer:
    with tiny_trunks():
        return Trainer(config, ROWS, output, report=lambda _line: None)


def test_a_pass_collects_the_samples_of_its_epoch(tmp_path: Path) -> None:
    trainer = trainer_of(config(every_epochs=2), tmp_path)
    assert trainer.feature_pass is not None
    method, seen = trainer.method.train(), []
    before = {name: value.clone() for name, value in method.state_dict().items()}

    def store_features(views: Mapping[str, View], rows: Tensor) -> None:
        assert not any(module.training for module in method.modules())
        assert not torch.is_grad_enabled()
        assert list(views) == ["image"]
        method.trunk(views["image"].pixels)
        seen.append(rows)

    method.store_features = store_features  # type: ignore[assignment,method-assign]
    for epoch in (0, 1, 2):
        seen.clear()
        assert trainer.feature_pass.run(epoch) is None
        expected = [batch.sample_ids for batch in trainer.loader.epoch(epoch)] if epoch != 1 else []
        assert len(seen) == len(expected)
        assert all(map(torch.equal, seen, expected))
        assert method.training
    assert same(method.state_dict(), before)  # nor were BatchNorm's running statistics touched
    trainer.close()
    with pytest.raises(RuntimeError, match="the loader was closed"):
        trainer.feature_pass.run(2)


def test_methods_without_a_feature_pass_have_no_second_loader(tmp_path: Path) -> None:
    assert Trainer(TinyConfig(), ROWS, tmp_path, report=lambda _line: None).feature_pass is None
    assert not Method().needs_feature_pass(0)
    with pytest.raises(RuntimeError, match="Method has no feature pass"):
        Method().store_features({}, torch.zeros(1))


def test_features_depend_on_their_image_alone(tmp_path: Path) -> None:
    """Not on the batch, its position in the epoch or augmentation: another order gives the same features."""
    trainer = trainer_of(config("sela"), tmp_path)
    assert trainer.feature_pass is not None
    for name, buffer in trainer.method.trunk.named_buffers():
        if name.endswith("num_batches_tracked"):  # before the first step SeLa's features are by their batch
            buffer.fill_(1)
    features = []
    for epoch in (0, 1):
        trainer.feature_pass.run(epoch)
        features.append(trainer.method.features.vectors.clone())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-6)
    assert features[0].std(0).max() > 1e-3
    assert any(isinstance(module, nn.BatchNorm2d) for module in trainer.method.modules())


@pytest.mark.parametrize("name", ["deepcluster", "sela"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupted_pass_is_repeated(tmp_path: Path, name: str, epoch: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config(name), whole)
    trainer = trainer_of(config(name), cut)
    store_features, calls = trainer.method.store_features, []

    def interrupted(views: Mapping[str, View], rows: Tensor) -> None:
        store_features(views, rows)
        calls.append(rows)
        if len(calls) == 2 + 3 * epoch:  # three batches an epoch
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.method.store_features = interrupted  # type: ignore[method-assign]
    with pytest.raises(RunInterruptedError, match=rf"stopped by SIGTERM after step {3 * epoch}/6"):
        trainer.fit()
    assert len(calls) == 2 + 3 * epoch
    train(config(name), cut)
    for part in ("method", "optimizer", "step", "metrics"):
        assert same(final(cut)[part], final(whole)[part]), part
    assert losses(cut) == losses(whole)


def test_a_signal_that_kills_the_loader_in_a_pass_stops_the_run(tmp_path: Path) -> None:
    """Loader workers receive signals of the whole process group: the loader fails while the pass waits for it."""
    trainer = trainer_of(config(), tmp_path)
    assert trainer.feature_pass is not None

    def epoch(epoch: int) -> Iterator[Batch]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed")
        yield

    trainer.feature_pass.loader.epoch = epoch  # type: ignore[method-assign,assignment]
    with pytest.raises(RunInterruptedError, match="stopped by SIGTERM after step 0/6"):
        trainer.fit()


def test_summary_counts_the_passes(tmp_path: Path) -> None:
    trainer = trainer_of(replace(config(every_epochs=3), epochs=9), tmp_path)
    assert dict(summary(trainer))["steps"] == (
        "9 epochs x 3 steps of 8 = 27 steps, with a feature pass over the data before 3 of the epochs"
    )
