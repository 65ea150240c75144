"""The crossover study measures, gives reasons for what it leaves out, and draws; sizes are tiny, no time asserted."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.studies import crossover
from benchmarks.studies.crossover import Sizes, Way, crossings, main

TINY = ["--device", "cpu", "--batch", "2", "4", "--rows", "50", "70", "--negatives", "8", "16", "--rounds", "2"]


def test_grid(tmp_path: Path) -> None:
    assert main([*TINY, "-o", str(tmp_path / "out"), "--without", "compiled"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ceilings"]["copy_gb_per_s"] > 0
    ways = {row["way"] for row in found["rows"]}
    assert {
        "sampled K=8: sslfast",
        "sampled K=16: eager gather",
        "shared K=16: sslfast",
        "full: split attention",
    } <= ways
    assert not any("compiled" in way for way in ways)
    assert len(found["rows"]) == 4 * len(ways)
    for row in found["rows"]:
        assert row["quantile20_ms"] <= row["median_ms"] <= row["quantile80_ms"]
        assert row["views"] == 2
    text = (tmp_path / "out.md").read_text()
    assert text.count("| full: sslfast |") == 4
    assert "- N = 50: full is faster than sampled K=8 " in text
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 900


def test_left_out_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main([*TINY, "-o", str(tmp_path / "slow"), "--limit", "0", "--without", "compiled", "chunked", "gather"])
    rows = json.loads((tmp_path / "slow.json").read_text())["rows"]
    assert all("over --limit 0" in row["skipped"] for row in rows)
    assert "over --limit 0" in (tmp_path / "slow.md").read_text()
    assert not (tmp_path / "slow.png").exists()
    free = iter([10**9] * 2 + [10**3] * 10**4)
    monkeypatch.setattr(crossover, "free_bytes", lambda _: next(free))
    main([*TINY, "-o", str(tmp_path / "full"), "--without", "compiled"])
    rows = json.loads((tmp_path / "full.json").read_text())["rows"]
    assert {"the bank does not fit memory"} < {row.get("skipped", "") for row in rows}
    assert any(row.get("skipped", "").startswith("needs about") for row in rows)


def test_floor_and_arithmetic() -> None:
    sizes = Sizes(batch=256, num_rows=1_281_167, views=2)
    sampled = Way(name="", mode="sampled", negatives=32000, dtype=torch.bfloat16, peer=None)
    assert sampled.floor_bytes(sizes) == 256 * 32001 * 128 * 2
    assert sampled.flops(sizes) == 4 * 2 * 256 * 32001 * 128
    full = Way(name="", mode="full", negatives=32000, dtype=torch.bfloat16, peer=None)
    assert full.floor_bytes(sizes) == (1_281_167 + 256) * 128 * 2
    assert full.flops(sizes) == 4 * 2 * 256 * 1_281_167 * 128


def test_crossings() -> None:
    def row(way: str, batch: int, median: float) -> dict[str, object]:
        return {"way": way, "num_rows": 1000, "batch": batch, "median_ms": median}

    rows = [row("full: sslfast", b, 10.0) for b in (16, 64, 256)]
    rows += [row("sampled K=9: sslfast", b, m) for b, m in ((16, 5.0), (64, 11.0), (256, 40.0))]
    assert crossings(rows) == ["- N = 1,000: full is faster than sampled K=9 from B = 64 up."]
    rows[-1]["median_ms"] = 9.0
    assert crossings(rows) == ["- N = 1,000: full is faster than sampled K=9 at no B up to 256."]
