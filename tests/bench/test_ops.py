"""``sslfast bench ops``: every case compares its implementations before it is timed. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from sslfast.bench import ops
from sslfast.cli.main import main

CPU = torch.device("cpu")
CASES = {
    "bank_nce": lambda: ops.bank_nce_case(CPU, batch=4, num_negatives=16, dimensions=8, num_rows=50),
    "two views": lambda: ops.bank_nce_case(CPU, batch=4, num_negatives=16, dimensions=8, num_rows=50, views=2),
    "nce": lambda: ops.bank_nce_case(CPU, batch=4, num_negatives=16, dimensions=8, num_rows=50, loss="nce"),
    "full": lambda: ops.bank_nce_dense_case(CPU, batch=4, dimensions=8, num_rows=50),
    "shared": lambda: ops.bank_nce_dense_case(CPU, batch=4, dimensions=8, num_rows=50, num_negatives=40),
    "bank_update_": lambda: ops.bank_update_case(CPU, batch=4, num_rows=50),
    "bank_enqueue_": lambda: ops.bank_enqueue_case(CPU, batch=5, num_rows=50),
    "negative_rows": lambda: ops.negative_rows_case(CPU, batch=4, num_negatives=16),
    "render_views": lambda: ops.render_views_case(CPU, batch=2),
}


@pytest.mark.parametrize("name", CASES)
def test_implementations_agree_and_take_turns(name: str) -> None:
    case = CASES[name]()
    rows = ops.measure(case, CPU, rounds=2)
    assert [row["implementation"] for row in rows] == list(case.implementations)
    assert rows[0]["times_faster"] == 1
    for row in rows:
        assert row["op"] == case.op
        assert row["quantile20_ms"] <= row["median_ms"] <= row["quantile80_ms"]
        assert row["floor_gb_per_s"] >= 0
    assert ops.render(rows).count(case.size) == len(rows)


def test_a_case_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "scatter_update_", lambda bank, index, features, momentum: None)
    with pytest.raises(AssertionError):
        ops.measure(ops.bank_update_case(CPU, batch=4, num_rows=50), CPU, rounds=1)


def test_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "op_cases", lambda device: [ops.bank_update_case(device, batch=4, num_rows=50)])
    file = tmp_path / "ops.json"
    assert main(["bench", "ops", "--device", "cpu", "--rounds", "2", "--json", str(file)]) == 0
    assert "bank_update_    B=4 D=128 N=50 float32" in capsys.readouterr().out
    facts = json.loads(file.read_text())
    assert [row["implementation"] for row in facts["rows"]] == ["eager gather", "sslfast"]
    assert facts["torch"] == torch.__version__
    assert main(["bench", "ops", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
