"""Features of all rows that ranks share, on the device or on disk: clusterings, checkpoints, kNN."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.distributed import destroy_process_group, init_process_group, own_rows, process_group
from sslfast.evaluation import bank_knn
from sslfast.methods import sela as sela_module
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.sela import SeLa
from sslfast.methods.shared import pseudo_labels
from sslfast.methods.shared.pseudo_labels import CollectedFeatures, row_storage
from sslfast.recipes.clustering import deepcluster_small, sela_small
from sslfast.runs.sharded_store import ShardedStore
from sslfast.runs.stored_tensors import restored
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import enter, run
from tests.methods.harness import ROWS, build, final, losses, tiny, tiny_trunks, train
from tests.runs.test_sharded_store import plain
from tests.tiny import same


def config(name: str, **changes: Any) -> TrainConfig:
    if name == "sela":
        return tiny(sela_small(), **{"heads": 2, "clusters": 4, **changes})
    return tiny(deepcluster_small(), **{"clusters": 4, "pca_dimensions": 8, **changes})


@pytest.mark.parametrize("name", ["deepcluster", "sela"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_with_features_on_disk_is_that_without(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with the logits of SeLa in memory, computed again, and on disk."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(pseudo_labels, "gettempdir", lambda: str(tmp_path / "temporary"))
    train(config(name, feature_dtype=dtype), tmp_path / "device")
    for kind, limit in (("device", 1), ("disk", 1 << 30), ("disk", 1)):
        monkeypatch.setattr(sela_module, "_CACHE_BYTES", limit)
        output = tmp_path / f"{kind} {limit}"
        trainer = train(config(name, feature_dtype=dtype, feature_storage=kind), output)
        assert same(final(output)["method"], final(tmp_path / "device")["method"])
        assert losses(output) == losses(tmp_path / "device")
        features = trainer.method.features
        assert isinstance(features, CollectedFeatures)
        assert features.on_disk == (kind == "disk")
    assert not [*(tmp_path / "temporary").iterdir()]


def test_a_row_storage_without_space_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    assert row_storage(0, 3, dtype=torch.float32, on_disk=True).shape == (0, 3)
    found = row_storage(5, 3, dtype=torch.bfloat16, on_disk=True)
    assert (found.shape, found.dtype, found.abs().sum()) == ((5, 3), torch.bfloat16, 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"0\.00 GB of features of rank 0 .* name a folder on a larger disk in TMPDIR"):
        build(config("deepcluster", feature_storage="disk"))


def one_start(rank: int, ranks: int, port: int, whole: TrainConfig, output: Path, until: int) -> None:
    """A start whose ranks are killed after step ``until`` (0: not)."""
    enter(rank, ranks, port)
    with tiny_trunks(normalised=False):
        trainer = Trainer(whole, ROWS, output, report=lambda _line: None)
    method = trainer.method
    assert isinstance(method, DeepCluster | SeLa)
    assert len(method.features.vectors) == len(own_rows(ROWS))
    assert isinstance(trainer.store, ShardedStore)

    def killed() -> None:
        if trainer.step + 1 == until:
            trainer.saver.settle(wait=True)
            os.kill(os.getpid(), signal.SIGKILL)

    method.after_step = killed  # type: ignore[method-assign]
    trainer.fit()
    destroy_process_group()


@pytest.mark.parametrize("name", ["deepcluster", "sela"])
def test_a_killed_run_resumes_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    """Two, killed in the first epoch, then four, killed in the second, then one; and a run of one all the time."""
    whole = config(name, feature_storage="disk")
    whole = replace(whole, epochs=3, checkpoint_store="sharded", checkpoint_every_steps=2, keep_checkpoints=9)
    run(one_start, 1, whole, tmp_path / "one", 0)
    for ranks, until in ((2, 3), (4, 6), (1, 0)):
        run(one_start, ranks, whole, tmp_path / "killed", until, expect=-signal.SIGKILL if until else 0)
    one, killed = (plain(final(tmp_path / output)) for output in ("one", "killed"))
    assert killed["step"] == 9
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "one"), rel=1e-4, abs=1e-5)
    for key, value in one["method"].items():
        torch.testing.assert_close(killed["method"][key], value, rtol=1e-3, atol=1e-4)
    assert len([*(tmp_path / "killed" / "checkpoints").glob("step_*4/*.bin")]) == 4


def vectors(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(-1, 3, (rows,), generator=generator)
    return torch.randn(rows, 6, generator=generator) + 0.5 * labels[:, None], labels


def searched(rank: int, ranks: int, port: int, folder: Path) -> None:
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    for rows in (11, 97):  # of 11 rows a rank holds fewer than neighbours are searched
        points, labels = vectors(rows)
        labels[0] = labels[-1] = -1
        own = own_rows(rows)
        found = {n: bank_knn(points[own.start : own.stop], labels, (1, 5), queries=n, is_split=True) for n in (None, 4)}
        whole = {n: bank_knn(points, labels, (1, 5), queries=n) for n in (None, 4)}
        assert found == whole
        for wrong in (points[: len(own) - 1], points):
            with pytest.raises(
                ValueError, match=f"bank_rows must be .* one of {ranks} ranks, whose part is {len(own)}"
            ):
                bank_knn(wrong, labels, is_split=True)
        with pytest.raises(ValueError, match="bank_rows must be"):
            bank_knn(points[own.start : own.stop], labels)

    if rank == 0:
        torch.save(found, folder / "found.pt")
    destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_neighbours_in_parts_of_a_bank_are_those_in_the_whole(ranks: int, tmp_path: Path) -> None:
    run(searched, ranks, tmp_path)
    assert math.isfinite(torch.load(tmp_path / "found.pt", weights_only=False)[None][5].top1)


def test_a_checkpoint_of_all_features_is_read_by_any_number_of_ranks() -> None:
    """Those of earlier versions, which held all of them on every rank."""
    features = CollectedFeatures(7, 2)
    state = {"vectors": torch.arange(14.0).view(7, 2), "seen": torch.ones(7, dtype=torch.bool)}
    part = CollectedFeatures(7, 2)
    part.first_row, part.vectors = 3, part.vectors[:2].clone()
    for module in (features, part):
        module.load_state_dict(restored(state, module.state_dict()))
    assert torch.equal(features.vectors, state["vectors"])
    assert torch.equal(part.vectors, state["vectors"][3:5])
