"""What a memory bank refuses; losses and updates: ``tests/adapters/test_stateful.py``, ``test_sharded_bank.py``."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from sslfast.models import MemoryBank, snapshot


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_rows": 1}, "at least 2 rows.*got num_rows=1"),
        ({"num_rows": 0}, "at least 2 rows.*got num_rows=0"),
        ({"dimensions": 0}, "dimensions=0"),
        *(({"momentum": m}, r"momentum must be in \[0, 1\], got") for m in (-0.5, 1.5, math.nan)),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="MemoryBank: .*" + text):
        MemoryBank(**({"num_rows": 9, "dimensions": 4, "momentum": 0.5, "seed": 0} | options))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_score_that_is_recomputed_after_the_update_of_the_step_is_an_error(use_reentrant: bool) -> None:
    """The update is outside of what is recomputed, and before the backward pass."""
    bank, rows = MemoryBank(9, 4, momentum=0.5, seed=0), torch.arange(3)
    query = normalize(torch.randn(1, 3, 4), dim=2).requires_grad_()
    loss = checkpoint(lambda q: bank.score(q, rows, negatives="full")[0].sum(), query, use_reentrant=use_reentrant)
    bank.update_(rows, query[0])
    with pytest.raises(RuntimeError, match=r"MemoryBank.score: activation checkpointing runs it a second time"):
        loss.backward()


def test_a_snapshot_is_detached_and_its_own() -> None:
    x = torch.ones(3, requires_grad=True)
    copied = snapshot(x, "test", once=False)
    assert not copied.requires_grad
    assert copied.data_ptr() != x.data_ptr()
    with pytest.raises(TypeError, match="test: needs a tensor, got list"):
        snapshot([1], "test", once=False)  # type: ignore[arg-type]
