import os
import stat
from pathlib import Path

import pytest

from sslfast.files import replacing


def test_the_file_appears_complete_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.txt"
    with replacing(path) as temporary:
        temporary.write_text("complete")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "complete"
    assert os.listdir(path.parent) == ["notes.txt"]
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_keeps_the_old_file(tmp_path: Path, error: type[BaseException], written: bool) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:  # noqa: PT012
        if written:
            temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_two_writers_do_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert os.listdir(tmp_path) == ["notes.txt"]
