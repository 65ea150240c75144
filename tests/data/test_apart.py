"""What a command writes neither replaces what it reads nor lands among the images."""

import os
from pathlib import Path

import pytest

from sslfast.cli.main import main
from sslfast.data import check_apart, check_run_apart
from tests.tiny import write_images

RUN_PLACES = ["data", "data/.", "data/../data", "data/run", "data/class0/a/b", "link", "link/run", "other/up/data", "."]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_images(tmp_path / "data", 4)
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/up").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    return Path("data")


@pytest.mark.parametrize("place", RUN_PLACES)
def test_a_run_is_not_written_among_its_images(data: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(Path.cwd())
    assert main(["pretrain", str(data), "--recipe", "pirl-small", "--output", place]) == 2
    assert files(Path.cwd()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "choose another output directory with --output" in error


def test_a_run_beside_its_images_and_one_that_is_there_are_taken(data: Path) -> None:
    check_run_apart(Path("runs/a"), data)
    check_run_apart(Path("data2"), data)  # not inside, whatever its name begins with
    check_run_apart(Path("other"), Path("other/list.csv"))
    with pytest.raises(ValueError, match="would be replaced by the run in other"):
        check_run_apart(Path("other"), Path("other/manifest.tsv"))
    old = data / "run"
    (old / "checkpoints").mkdir(parents=True)
    (old / "config.json").write_text("{}")
    check_run_apart(old, data)


@pytest.mark.parametrize(
    "arguments",
    [
        ["preview", "data", "--recipe", "pirl-small", "--output", "data/class0/00.png"],
        ["preview", "data", "--recipe", "pirl-small", "--output", "link/new.PNG"],
        ["data", "verify", "list.csv", "--output", "list.csv"],
        ["data", "verify", "list.csv", "--output", "other/up/list.csv"],
        ["data", "verify", "same.csv", "--output", "list.csv"],
        ["data", "prepare", "data", "data/class0/00.png"],
        ["data", "labels", "data", "list.csv", "--output", "list.csv"],
        ["embed", "weights.pth", "list.csv", "--output", "list.npy"],  # the table list.csv is written beside it
        ["embed", "weights.pth", "data", "--output", "data/new.parquet"],
        ["export", "weights.pth", "weights.pth"],
        ["export", "weights.pth", "../" + "{folder}/weights.pth"],
        ["evaluate", "knn", "weights.pth", "sets", "--output", "weights.pth"],
        ["evaluate", "knn", "weights.pth", "sets", "--output", "sets/val.json"],
        ["evaluate", "knn", "run", "sets", "--output", "run/config.json"],
        ["evaluate", "knn", "run", "sets", "--output", "run/checkpoints/a.json"],
        ["evaluate", "semisup", "run", "sets", "--subset", "list.csv", "--output", "list.csv"],
        ["neighbours", "weights.pth", "sets", "--output", "sets/train/a/0.png"],
        ["report", "run", "--output", "run/checkpoints/a.html"],
    ],
    ids=" ".join,
)
def test_no_output_replaces_or_joins_an_input(
    data: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("list.csv").write_text("data/class0/00.png,a\n")
    Path("same.csv").symlink_to("list.csv")
    Path("weights.pth").write_bytes(b"weights")
    write_images(Path("sets/train"), 4)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.json").write_text("{}")
    before = files(Path.cwd())
    assert main([argument.format(folder=Path.cwd().name) for argument in arguments]) == 2
    assert files(Path.cwd()) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "which is read; " in error or "is read and would be replaced; " in error
    assert "--output" in error or "OUT" in error or "another place" in error


def test_results_beside_inputs_are_taken(data: Path) -> None:
    run = Path("run")
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for output in ("run/evaluation/knn.json", "run/embeddings.npy", "run/sheet.png", "data/manifest.tsv", "data/a.npy"):
        check_apart([Path(output)], [data, run])
    Path("one.csv").write_text("x")
    os.link("one.csv", "two.csv")
    with pytest.raises(ValueError, match=r"two\.csv is read and would be replaced; name another file with --output"):
        check_apart([Path("two.csv")], [Path("one.csv")])


def test_loops_of_links_are_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    check_apart([tmp_path / "a/x.png"], [tmp_path / "data"])
    check_run_apart(tmp_path / "a", tmp_path / "data")
