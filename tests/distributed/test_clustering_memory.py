"""Bytes of a clustering of four processes beside those of the plan: no rank holds more than its share and blocks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.plan_clustering import Clustering, table
from sslfast.distributed import destroy_process_group, gather_objects, init_process_group, process_group
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.sela import SeLa
from tests.distributed.test_features import config
from tests.distributed.test_sharded_checkpoints import peak
from tests.distributed.test_training import enter, run
from tests.methods.harness import TinyTrunk, build

ROWS, COLUMNS, RANKS, SLACK = 400_000, 128, 4, 40e6


class Wide(TinyTrunk):
    out_features = COLUMNS


def clustered(rank: int, ranks: int, port: int, output: Path, name: str) -> None:
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    import tests.methods.harness

    tests.methods.harness.TinyTrunk = Wide  # type: ignore[misc]
    own: dict[str, Any] = (
        {"heads": 1, "max_iterations": 3} if name == "sela" else {"pca_dimensions": 32, "iterations": 2}
    )
    whole = config(name, clusters=16, feature_storage="disk", feature_dtype="bf16", **own)
    method = build(whole, rows=ROWS)
    assert isinstance(method, DeepCluster | SeLa)
    generator = torch.Generator().manual_seed(rank)
    for part in method.features.vectors.split(1 << 14):
        part.copy_(torch.randn(part.shape, generator=generator))
    method.features.seen.fill_(True)
    small = build(whole, rows=64)  # what is loaded once
    small.features.seen.fill_(True)  # type: ignore[union-attr,operator]
    small.start_epoch(0)
    found = peak(lambda: method.start_epoch(0))
    facts = gather_objects((found, method.features.vectors.nbytes))
    if rank == 0:
        output.write_text(json.dumps(facts))
    destroy_process_group()


@pytest.mark.parametrize("name", ["deepcluster", "sela"])
def test_no_rank_holds_more_than_its_share(name: str, tmp_path: Path) -> None:
    run(clustered, RANKS, tmp_path / "facts.json", name)
    plan = Clustering(
        rows=ROWS, ranks=RANKS, columns=COLUMNS, clusters=16, dimensions=32, heads=1 if name == "sela" else 0
    )
    for found, held in json.loads((tmp_path / "facts.json").read_text()):
        assert held <= plan.features()
        # Pages of the mapped features are read, and 24 bytes a row are labels that ranks exchange.
        assert found < plan.features() + plan.second() + 24 * ROWS + plan.memory() + SLACK
        assert plan.features() + plan.second() + 24 * ROWS + plan.memory() + SLACK < RANKS * plan.features() + 4e7


def test_the_table_of_the_documentation() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
