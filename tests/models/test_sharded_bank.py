"""The bank split over ranks: losses, gradients, updates and checkpoints are those of the whole bank."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sslfast.methods.pirl
from sslfast.distributed.collectives import gather_to_rank0, mean_over_ranks, shard_bounds
from sslfast.distributed.data_parallel import check_replicas, replicate
from sslfast.distributed.process_group import destroy_process_group, init_process_group, process_group
from sslfast.methods.pirl import PIRL
from sslfast.models.memory_bank import MemoryBank, initial_rows
from sslfast.models.resnet import ResNetConfig
from sslfast.models.sharded_bank import score_over_shards
from sslfast.ops import bank_update_
from sslfast.runs.checkpoint import list_checkpoints
from sslfast.runs.directory import RunDirectory
from sslfast.views.types import View
from tests.distributed.test_training import NormFree, assert_near, config, data, enter, final, losses, run, train
from tests.tiny import context

__all__ = ["data"]  # a fixture

COLUMNS, VIEWS = 12, 2
CPU = torch.device("cpu")
MODES = list(itertools.product(("sampled", "shared", "full"), ("infonce", "nce"), (True, False)))


def whole_batch(num_rows: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit queries ``[V, size, D]`` and rows ``[size]`` of all ranks: the first and last row, and one twice."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(num_rows, (size,), generator=generator)
    index[0], index[-1] = 0, num_rows - 1
    index[size // 2] = index[1]
    return normalize(torch.randn(VIEWS, size, COLUMNS, generator=generator, dtype=torch.float64), dim=-1), index


def scored(bank: MemoryBank, query: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Losses, log-sum-exps, and the gradient of the losses' weighted sum."""
    leaf = query.clone().requires_grad_()
    loss, lse = bank.score(leaf, index, **options)
    assert not lse.requires_grad
    (loss * torch.arange(1, loss.numel() + 1).reshape(loss.shape)).sum().backward()
    assert leaf.grad is not None
    return loss.detach(), lse, leaf.grad


def score_and_update(rank: int, ranks: int, port: int, num_rows: int, batch: int) -> None:
    enter(rank, ranks, port)
    make: dict[str, Any] = {"num_rows": num_rows, "dimensions": COLUMNS, "momentum": 0.4, "seed": 2}
    whole = MemoryBank(**make, dtype=torch.float64)
    alone = MemoryBank(**make, dtype=torch.float64, layout="sharded")  # before the process group exists
    assert torch.equal(alone.vectors, whole.vectors)
    init_process_group(process_group(), CPU)
    bank = MemoryBank(**make, dtype=torch.float64, layout="sharded")

    first, end = shard_bounds(num_rows, ranks)[rank : rank + 2]
    assert bank.vectors.shape == (end - first, COLUMNS)  # 1 / ranks of the memory, to a row
    assert end - first in (num_rows // ranks, -(-num_rows // ranks))
    assert torch.equal(bank.vectors, whole.vectors[first:end])
    own = slice(rank * batch, (rank + 1) * batch)
    for step, (negatives, loss, exclude_self) in enumerate(MODES):
        query, index = whole_batch(num_rows, ranks * batch, seed=step)
        options: dict[str, Any] = {"negatives": negatives, "num_negatives": 1 + 4 * step, "loss": loss, "seed": 7}
        options |= {"temperature": 0.2, "exclude_self": exclude_self, "step": torch.tensor(step)}
        options |= {"z": torch.tensor(50.0, dtype=torch.float64) if loss == "nce" else None}
        got = scored(bank, query[:, own], index[own], **options)
        wanted = scored(whole, query[:, own], index[own], **options)
        for name, a, b in zip(("loss", "lse", "grad"), got, wanted, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-11, atol=1e-11, msg=lambda m, s=step, n=name: f"{MODES[s]} {n}: {m}"
            )
        with torch.no_grad():
            assert torch.equal(bank.score(query[:, own], index[own], **options)[0], got[0])
        bank.update_(index[own], query[0, own])
        check_replicas(bank.replicated())
        bank_update_(whole.vectors, index, query[0], momentum=0.4)
        assert torch.equal(bank.vectors, whole.vectors[first:end])

    gathered = gather_to_rank0(bank.vectors, bank.bounds)
    assert gathered is None if rank else torch.equal(gathered, whole.vectors)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):  # products and sums are fp32 for both
        small, reference = (MemoryBank(**make, dtype=dtype, layout=layout) for layout in ("sharded", "replicated"))
        options = {"negatives": "sampled", "num_negatives": 30, "loss": "infonce", "temperature": 0.2}
        a, b = (scored(some, query[:, own].float(), index[own], **options) for some in (small, reference))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=10 * tolerance)

    bank.updates += rank
    with pytest.raises(RuntimeError, match="weights or bank differ between ranks"):
        check_replicas(bank.replicated())
    with pytest.raises(ValueError, match=rf"at least 2 rows for each of {ranks} ranks, got {2 * ranks - 1}; use a"):
        MemoryBank(**{**make, "num_rows": 2 * ranks - 1}, layout="sharded")
    with pytest.raises(ValueError, match="nce on a shard needs z"):
        bank.score(query[:, own], index[own], loss="nce", temperature=0.1)
    destroy_process_group()


@pytest.mark.parametrize(("ranks", "num_rows", "batch"), [(2, 31, 4), (3, 41, 5)])
def test_every_mode_is_that_of_the_whole_bank(ranks: int, num_rows: int, batch: int) -> None:
    run(score_and_update, ranks, num_rows, batch)


METHODS = [
    {"negatives": "sampled", "loss": "nce", "z": "frozen"},
    {"negatives": "sampled", "loss": "nce", "z": "running", "separate_draws": True, "z_from": "pretext"},
    {"negatives": "shared", "loss": "nce", "z": "exact", "exclude_self": False},
    {"negatives": "full", "loss": "nce", "z": "running"},
    {"negatives": "shared", "loss": "infonce", "separate_draws": True},
    {"negatives": "sampled", "loss": "infonce", "pretext_weight": 0.0},
]


def steps_of(method: PIRL, own: slice) -> list[Tensor]:
    """Loss, log values, gradients and bank of two steps, averaged over ranks where they differ."""
    model, out = replicate(method, CPU), []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        pixels = {name: torch.randn(6, 4, 3, 8, 8, generator=generator) for name in ("pretext", "image")}
        pixels["image"] = pixels["image"][:, 0]
        values = model(
            {name: View(pixels=x[own]) for name, x in pixels.items()}, 3 * torch.arange(6)[own] + step, step=step
        )
        values["loss"].backward()
        method.after_step()
        out += [mean_over_ranks(value.detach()) for value in values.values()]
        out += [p.grad.clone() for p in method.parameters() if p.grad is not None]
        method.zero_grad()
    return [*out, method.full_state_dict()["bank.vectors"]]


def train_methods(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    sslfast.methods.pirl.build_trunk = lambda _model, seed: NormFree()

    def build(changes: dict[str, Any], layout: str) -> PIRL:
        base = config().method
        assert isinstance(base, PIRL.Config)
        return replace(base, bank_layout=layout, **changes).build(context(ResNetConfig(), 19, seed=4))

    alone = [steps_of(build(changes, "replicated"), slice(None)) for changes in METHODS]
    init_process_group(process_group(), CPU)
    own = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    for changes, wanted in zip(METHODS, alone, strict=True):
        method = build(changes, "sharded")
        assert method.full_state_bytes() == build(changes, "replicated").full_state_bytes()
        got = steps_of(method, own)
        check_replicas([*method.parameters(), *method.replicated()])
        for a, b in zip(got if rank == 0 else got[:-1], wanted, strict=rank == 0):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, c=changes: f"{c}: {m}")
    destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_method_trains_as_on_one_process(ranks: int) -> None:
    run(train_methods, ranks)


def test_runs_resume_in_another_layout_and_number_of_processes(data: Path, tmp_path: Path) -> None:
    method = replace(config(loss="nce").method, bank_layout="sharded")
    sharded = {"method": method, "batch_size": 6, "checkpoint_every_steps": 2}
    replicated = sharded | {"method": replace(method, bank_layout="replicated")}
    run(train, 1, data, tmp_path / "whole", replicated, 0.0)
    run(train, 2, data, tmp_path / "part", sharded, 0.0)
    for ranks, arguments in ((3, sharded), (2, replicated), (1, sharded)):
        assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
        state, expected = final(tmp_path / "part"), final(tmp_path / "whole")
        assert state["step"] == expected["step"] == 9
        assert state["method"]["bank.vectors"].shape == (19, 8)
        for name, value in expected["method"].items():
            assert_near(state["method"][name], value, name)
        for path in list_checkpoints(RunDirectory(tmp_path / "part").checkpoints)[-2:]:
            path.unlink()
        run(train, ranks, data, tmp_path / "part", arguments, 0.0)
    assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_loading_the_wrong_number_of_rows() -> None:
    bank = MemoryBank(9, 4, momentum=0.5, seed=0, layout="sharded")
    with pytest.raises(RuntimeError, match="size mismatch for vectors"):
        bank.load_state_dict({"rows": torch.zeros(8, 4)})
    assert torch.equal(initial_rows(4, 4, seed=0, first_row=5), bank.vectors[5:])
    assert shard_bounds(10, 4) == [0, 2, 5, 7, 10]


def test_collectives_are_a_graph_break_for_torch_compile() -> None:
    """The collectives and the derivative inside cannot be traced; this is torch's mark of a disabled function."""
    assert vars(score_over_shards)["_torchdynamo_disable"]
