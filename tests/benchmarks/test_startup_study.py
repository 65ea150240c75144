"""The study of a start at a size of milliseconds: every line is there."""

from pathlib import Path

from benchmarks.studies.startup import Table, made_up, made_up_again, real


def test_every_line_is_measured(tmp_path: Path) -> None:
    table = Table()
    real(table, 30, tmp_path)
    made_up(table, 40, tmp_path)
    made_up_again(table, 40, tmp_path)
    assert [row["images"] for row in table.rows] == [30] * 5 + [40] * 8
    assert len(table.markdown().splitlines()) == 2 + 13
