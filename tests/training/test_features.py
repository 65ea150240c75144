"""Statistics of the features of a step: closed forms, the run's own features, a collapse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslfast.distributed.process_group import destroy_process_group, init_process_group, process_group
from sslfast.methods.pirl import PIRL
from sslfast.methods.simclr import SimCLR
from sslfast.recipes.registry import RECIPES
from sslfast.training.features import COLLAPSED_STD, SAMPLES, CollapseError, FeatureWatch, feature_statistics
from sslfast.training.trainer import Trainer
from tests.distributed.test_training import enter, run
from tests.methods.harness import tiny, tiny_trunks
from tests.tiny import TinyConfig, log_values

ROWS = 16


def values(features: Tensor) -> dict[str, float]:
    return {name: value.item() for name, value in feature_statistics(features).items()}


def naive(features: Tensor) -> dict[str, float]:
    z = features.numpy().astype(np.float64)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[k] for i in range(len(z)) for k in range(len(z)) if i != k]
    shares = np.linalg.svd(z, compute_uv=False)
    shares = shares[shares > 1e-12] / shares.sum()
    return {
        "std": np.sqrt(z.shape[1] * np.mean(np.var(unit, axis=0))),
        "rank": np.exp(-(shares * np.log(shares)).sum()),
        "cosine": np.mean(pairs),
    }


@pytest.mark.parametrize("dimensions", [1, 3, 8])
def test_opposite_unit_vectors(dimensions: int) -> None:
    unit = torch.eye(dimensions)
    expected = {"std": 1.0, "rank": dimensions, "cosine": -1 / (2 * dimensions - 1)}
    assert values(torch.cat((unit, -unit))) == pytest.approx(expected, abs=1e-9)


def test_one_direction_of_any_length() -> None:
    features = torch.tensor([[1.0], [5.0], [0.1]]) * torch.tensor([[3.0, 0.0, 4.0]])
    assert values(features) == pytest.approx({"std": 0.0, "rank": 1.0, "cosine": 1.0}, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (7, 7), (40, 3), (9, 31)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_statistics_beside_a_float64_reference(shape: tuple[int, int], shift: float) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + shift
    assert values(features) == pytest.approx(naive(features), rel=1e-6)
    assert values(1000 * features) == pytest.approx(values(features), rel=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_have_no_statistics(bad: float) -> None:
    features = torch.ones(4, 3)
    features[2, 1] = bad
    assert all(np.isnan(value) for value in values(features).values())


def test_a_zero_vector_does_not_divide_by_zero() -> None:
    assert values(torch.zeros(3, 4)) == {"std": 0.0, "rank": 1.0, "cosine": 0.0}


def quiet(line: str) -> None:
    pass


def test_records_hold_the_statistics_of_the_last_step(tmp_path: Path) -> None:
    trainer = Trainer(TinyConfig(log_every_steps=8), ROWS, tmp_path, report=quiet)
    seen: list[Tensor] = []
    trainer.method.trunk.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten(1)))
    trainer.fit()
    records = log_values(tmp_path)
    assert [record["step"] for record in records] == [8, 16, 24]
    for record in records:
        expected = feature_statistics(seen[record["step"] - 1].detach())
        assert {name: record[f"feature_{name}"] for name in expected} == {n: v.item() for n, v in expected.items()}


@pytest.mark.parametrize(
    "recipe", ["pirl-small", "simclr-small", "rotation-small", "autoencoder-small", "jigsaw-small"]
)
def test_features_and_embeddings_of_a_method(recipe: str, tmp_path: Path) -> None:
    config = replace(tiny(RECIPES[recipe]()), epochs=1)
    with tiny_trunks():
        Trainer(config, 2 * config.batch_size, tmp_path, report=quiet).fit()
    (record,) = log_values(tmp_path)[-1:]
    compared = isinstance(config.method, PIRL.Config | SimCLR.Config)
    for name in ("feature", "embedding") if compared else ("feature",):
        assert record[f"{name}_std"] > 0
        assert record[f"{name}_rank"] >= 1
        assert -1 <= record[f"{name}_cosine"] <= 1
    assert ("embedding_std" in record) == compared


class Constant(nn.Module):
    """The same features for every image, but for a trace."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Any:
        return 1 + 1e-6 * self.trunk(images)


def collapsed(output: Path, lines: list[str], **changes: Any) -> Trainer:
    trainer = Trainer(replace(TinyConfig(), **changes), ROWS, output, report=lines.append)
    trainer.method.trunk = Constant(trainer.method.trunk)
    trainer.measurements.features = FeatureWatch(
        trainer.method, stop=trainer.config.on_collapse == "error", report=trainer.report
    )
    return trainer


def test_a_collapse_is_one_line(tmp_path: Path) -> None:
    lines: list[str] = []
    collapsed(tmp_path, lines).fit()
    assert all(record["feature_std"] < COLLAPSED_STD for record in log_values(tmp_path))
    (line,) = [line for line in lines if "collapsed" in line]
    assert line.startswith("step 3: the features of different images are the same (mean cosine 1.000000, spread ")
    assert line.endswith("check its temperature and momentum")


def test_a_collapse_ends_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="step 3: the features of different images are the same"):
        collapsed(tmp_path, [], on_collapse="error").fit()


def share(rank: int, world: int, port: int, folder: Path, batch: int) -> None:
    enter(rank, world, port)
    init_process_group(process_group(), torch.device("cpu"))
    method = nn.Module()
    method.trunk, method.embedding_head = nn.Identity(), "none"
    watch = FeatureWatch(method, stop=False, report=quiet)  # type: ignore[arg-type]
    features = torch.randn(2 * batch, 6, generator=torch.Generator().manual_seed(1))
    method.trunk(features[rank * batch : (rank + 1) * batch])
    torch.save(watch.read(1), folder / f"{rank}.pt")
    kept = torch.cat([features[first : first + min(batch, SAMPLES // world)] for first in (0, batch)])
    torch.save({f"feature_{k}": v.item() for k, v in feature_statistics(kept).items()}, folder / "expected.pt")
    destroy_process_group()


@pytest.mark.parametrize("batch", [5, SAMPLES])
def test_ranks_give_equal_shares(batch: int, tmp_path: Path) -> None:
    run(share, 2, tmp_path, batch)
    expected = torch.load(tmp_path / "expected.pt")
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected
