"""The study of decode floors runs, and names what it compares."""

import json
from pathlib import Path

from benchmarks.studies.decode_floor import COLUMNS, RECIPES, main
from sslfast.loaders import loader_status
from tests.pictures import write_folder


def test_every_column_is_measured(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", ["a.jpg", "b.jpg"], width=260, height=240)
    main([str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--repeats", "1"])
    facts = json.loads((tmp_path / "out" / "decode_floor.json").read_text())
    assert (facts["images"], [row["recipe"] for row in facts["rows"]]) == (2, list(RECIPES))
    for row in facts["rows"]:
        columns = [column for column in COLUMNS if column != "FFCV" or loader_status()["ffcv"][0]]
        assert list(row["milliseconds"]) == columns
        assert all(value > 0 for value in row["milliseconds"].values())
    assert (tmp_path / "out" / "decode_floor.md").read_text().count("\n") == 2 + len(RECIPES)
