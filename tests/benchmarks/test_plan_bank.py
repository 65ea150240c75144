"""The plan for large banks against what small runs over gloo hold and send."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.studies.plan_bank import CASES, Bank, Cluster, banks, quantity, table
from sslfast.distributed.process_group import destroy_process_group, init_process_group, process_group
from sslfast.models.memory_bank import MemoryBank
from sslfast.ops import negative_rows
from tests.distributed.test_training import enter, run

COLUMNS, NUM_ROWS, BATCH, VIEWS, K = 16, 50, 4, 2, 64


def count_bytes() -> dict[str, int]:
    """Bytes of the tensors that are gathered, reduced and scattered from now on."""
    counted = {"gather": 0, "reduce": 0, "scatter": 0}
    gather, reduce, scatter = dist.all_gather, dist.all_reduce, dist.reduce_scatter_tensor

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor) -> None:
        counted["gather"] += sum(part.nbytes for part in parts)
        gather(parts, own)

    def all_reduce(x: torch.Tensor, **options: Any) -> None:
        counted["reduce"] += x.nbytes
        reduce(x, **options)

    def reduce_scatter_tensor(own: torch.Tensor, x: torch.Tensor) -> None:
        counted["scatter"] += x.nbytes
        scatter(own, x)

    dist.all_gather, dist.all_reduce, dist.reduce_scatter_tensor = all_gather, all_reduce, reduce_scatter_tensor
    return counted


def hold_and_send(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    init_process_group(process_group(), torch.device("cpu"))
    counted = count_bytes()
    index = torch.arange(BATCH) + BATCH * rank
    for layout, dtype, negatives in (
        ("replicated", torch.float32, "shared"), ("sharded", torch.float32, "sampled"),
        ("sharded", torch.bfloat16, "shared"), ("sharded", torch.float32, "full"),
    ):  # fmt: skip
        plan = Bank(
            rows=NUM_ROWS, batch=BATCH * ranks, ranks=ranks, negatives=negatives, num_negatives=K, columns=COLUMNS,
            element=dtype.itemsize, views=VIEWS, layout=layout,
        )  # fmt: skip
        bank = MemoryBank(NUM_ROWS, COLUMNS, momentum=0.5, seed=0, dtype=dtype, layout=layout)
        largest = torch.tensor(bank.vectors.nbytes)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        assert largest == plan.held()

        counted.update(dict.fromkeys(counted, 0))
        query = torch.ones(VIEWS, BATCH, COLUMNS, requires_grad=True)
        losses, _ = bank.score(query, index, negatives=negatives, num_negatives=K, loss="infonce", temperature=1.0)
        losses.mean().backward()
        bank.update_(index, query[0].detach())
        assert counted == plan.payloads()

    rows = negative_rows(torch.arange(BATCH * ranks), num_negatives=K, num_rows=NUM_ROWS, seed=0, step=0)
    here = ((rows >= bank.first_row) & (rows < bank.first_row + len(bank.vectors))).sum().item()
    assert here == pytest.approx(BATCH * K, rel=0.25)  # a rank scores what falls into its shard: B K of G K
    destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_held_and_sent_are_those_of_a_run(ranks: int) -> None:
    run(hold_and_send, ranks)


def test_known_numbers() -> None:
    bank = Bank(rows=10**9, batch=4096, ranks=8, negatives="sampled", num_negatives=32768)
    assert bank.held() == 512 * 10**9
    assert bank.read() == 512 * 32769 * 128 * 4
    assert bank.flops() == 4 * 128 * 2 * 512 * 32769
    sharded = Bank(rows=10**9, batch=4096, ranks=8, negatives="sampled", num_negatives=32768, layout="sharded")
    assert sharded.held() * 8 == bank.held()
    assert (sharded.read(), sharded.flops()) == (bank.read(), bank.flops())
    assert sharded.draws() == 8 * bank.draws() == 4096 * 32768
    assert sharded.received() == 7 / 8 * (
        4096 * (8 + 512) + 4096 * 8 + 2 * 4096 * 512 + 2 * 2 * 2 * 4096 * 4 + 2 * 4096 * 129 * 4
    )
    assert [quantity(x, "B") for x in (0, 1.5e-7, 12, 2.5e9)] == ["0 B", "150 nB", "12 B", "2.5 GB"]


def test_the_table_of_the_documentation_is_computed() -> None:
    cases = [(int(ranks), int(batch)) for ranks, batch in (case.split("x") for case in CASES)]
    text = table(banks(10**9, cases, num_negatives=32768, columns=128), Cluster())
    assert text in (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
