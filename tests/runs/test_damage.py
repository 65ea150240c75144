"""What a run finds damaged, moved or of another shape: every good checkpoint and record is used, nothing is deleted."""

import csv
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.cli.main import main
from sslfast.config import load_json
from sslfast.runs.checkpoint import HashedFileStore, load_checkpoint, save_checkpoint
from sslfast.runs.checkpoint_store import prune, set_aside_newer
from sslfast.runs.directory import RunDirectory
from sslfast.runs.log import LogFile, read_log
from sslfast.training.csv_log import CSVLog
from sslfast.training.logging import LogContext
from sslfast.training.trainer import Trainer
from tests.tiny import TinyConfig, log_values, same

ROWS = 17
STEPS = 24


def trainer(output: Path, lines: list[str], **changes: Any) -> Trainer:
    return Trainer(TinyConfig(**changes), ROWS, output, report=lines.append)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    trainer(output, []).fit()
    return output


def sums(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def other_content(path: Path, state: Any) -> None:
    torch.save(state, path)
    sums(path).write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "  x\n")


def denied(path: Path) -> None:
    """As root, who may read everything, a link into nowhere of another kind."""
    path.chmod(0)
    if os.access(path, os.R_OK):
        instead(path, lambda p: p.symlink_to("/proc/self/mem/x"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda p: instead(p, Path.mkdir), "it is a folder"),
    "link to nothing": (lambda p: instead(p, lambda q: q.symlink_to("/nowhere")), "it is a link to /nowhere"),
    "link to itself": (lambda p: instead(p, lambda q: q.symlink_to(q.name)), "Too many levels"),
    "pipe": (lambda p: instead(p, os.mkfifo), "it is a named pipe"),
    "device": (lambda p: instead(p, lambda q: q.symlink_to("/dev/zero")), "it is a device"),
    "permission": (denied, "Permission denied|Not a directory"),
    "empty": (lambda p: p.write_bytes(b""), r"damaged or truncated \(0 bytes\)"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "damaged or truncated"),
    "no checksum": (lambda p: sums(p).unlink(), "has no checksum"),
    "empty checksum": (lambda p: sums(p).write_text(""), "the checksum .* is damaged"),
    "binary checksum": (lambda p: sums(p).write_bytes(b"\xff" * 200), "the checksum .* is damaged"),
    "checksum folder": (lambda p: instead(sums(p), Path.mkdir), "the checksum .*it is a folder"),
    "checksum pipe": (lambda p: instead(sums(p), os.mkfifo), "the checksum .*it is a named pipe"),
    "checksum device": (lambda p: instead(sums(p), lambda q: q.symlink_to("/dev/zero")), "the checksum .*a device"),
    "other pickle": (lambda p: other_content(p, [1, 2]), "no step in it"),
    "other keys": (lambda p: other_content(p, {"step": 24}), r"is no checkpoint of a run \(method, .* missing\)"),
    "other types": (lambda p: other_content(p, {**load_checkpoint(p), "optimizer": 3}), "optimizer no table"),
    "other step": (lambda p: other_content(p, {**load_checkpoint(p), "step": 20}), "holds step 20, which is not"),
    "no step": (lambda p: other_content(p, {**load_checkpoint(p), "step": "x"}), "holds step x, which is not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_falls_back_and_deletes_nothing(tmp_path: Path, whole: Path, kind: str) -> None:
    run, lines = tmp_path / "run", []
    shutil.copytree(whole, run)
    damage, words = DAMAGE[kind]
    damage(run / "checkpoints" / "step_00000024.pt")
    before = len(os.listdir(run / "checkpoints"))
    trainer(run, lines).fit()
    assert len(lines) == 3
    assert re.search(words, lines[0])
    assert "step_00000024.pt" in lines[0]
    assert lines[0].endswith("; trying the one before, step_00000020.pt")
    assert "\n" not in lines[0]
    assert lines[1].startswith("set aside step_00000024.pt.superseded")
    names = os.listdir(run / "checkpoints")
    assert len(names) == before + 2  # 24 was written anew
    assert same(load_checkpoint(run / "checkpoints" / "step_00000024.pt"), final(whole))
    assert log_values(run) == log_values(whole)


def final(run: Path) -> dict[str, Any]:
    return load_checkpoint(run / "checkpoints" / "step_00000024.pt")


def test_a_disk_that_cannot_read_falls_back(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "run")
    digest = hashlib.file_digest

    def fail(file: Any, *arguments: Any) -> Any:
        if Path(file.name).name == "step_00000024.pt":
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", fail)
    lines: list[str] = []
    trainer(tmp_path / "run", lines).fit()
    assert "step_00000024.pt cannot be read (Input/output error); trying the one before" in lines[0]


def test_a_folder_that_cannot_be_listed_is_never_a_new_run(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Any) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(OSError, match=r"cannot list the checkpoints in .* \(Permission denied\); make it readable"):
        trainer(whole, []).fit()
    lines: list[str] = []
    prune(HashedFileStore(whole / "checkpoints"), keep=1, report=lines.append)
    assert lines[0].startswith("old checkpoints are kept: cannot list")


def test_a_checkpoint_that_cannot_be_deleted_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step}, step)

    def fail(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fail)
    lines: list[str] = []
    prune(HashedFileStore(tmp_path), keep=2, report=lines.append)
    words = "(Read-only file system); it is tried again at the next checkpoint"
    assert lines == [f"cannot delete {tmp_path}/step_00000001.pt {words}"]


def test_what_was_set_aside_before_is_not_overwritten(tmp_path: Path) -> None:
    for value in (1, 2):
        save_checkpoint(tmp_path, {"step": 5, "value": value}, 5)
        set_aside_newer(HashedFileStore(tmp_path), 0)
    HashedFileStore(tmp_path).clean()
    names = [f"step_00000005.pt.superseded{part}" for part in ("", "-2", "-2.sha256", ".sha256")]
    assert sorted(os.listdir(tmp_path)) == names


RECORDS = [{"step": step, "loss": 0.5 * step, "time": {"unix_seconds": 1.0}} for step in range(1, 21)]
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


def replaced(number: int, line: bytes) -> bytes:
    return b"".join([*LINES[: number - 1], line, *LINES[number:]])


@pytest.mark.parametrize(
    ("content", "lost", "words"),
    [
        (replaced(3, b"garbage\n"), {3}, "left out 1 line that are no log records: 3; every other record is kept"),
        (replaced(3, b'{"step": 3, "loss": 1.\n'), {3}, "left out 1 line"),
        (replaced(3, b"[3]\n"), {3}, "left out 1 line"),
        (replaced(3, b'{"step": "3"}\n'), {3}, "left out 1 line"),
        (replaced(3, b'{"step": true}\n'), {3}, "left out 1 line"),
        (replaced(3, b"[" * 100_000 + b"\n"), {3}, "left out 1 line"),
        (replaced(3, b'{"step": ' + b"9" * 5000 + b"}\n"), {3}, "left out 1 line"),
        (replaced(3, b"\xff\xfe\n"), {3}, "left out 1 line"),
        (b"\n" + b"".join(LINES), set(), ""),
        (b"".join(LINES).replace(b"\n", b"\r\n"), set(), ""),
        (b"\0\0\0\0" + b"".join(LINES), set(), ""),
        (replaced(3, b'{"step": 3, "lo' + LINES[2]), set(), ""),  # half a record, and the record after it
        (b"x\n" * 12 + b"".join(LINES), set(), "left out 12 lines that are no log records: 1, 2, 3, 4, 5, 6, 7, 8,"),
        (b"".join(LINES)[:-9], {20}, ""),
        (b"".join(LINES)[:-1], set(), ""),
        (b"", {*range(1, 21)}, ""),
    ],
)  # fmt: skip
def test_good_records_survive_damaged_lines(tmp_path: Path, content: bytes, lost: set[int], words: str) -> None:
    path, lines = tmp_path / "log.jsonl", []
    path.write_bytes(content)
    kept = [record for record in RECORDS if record["step"] not in lost]
    assert read_log(path, report=lines.append) == kept
    assert path.read_bytes() == content  # the run may be writing it
    log = LogFile(path, last_step=18, report=lines.append)
    assert path.read_bytes() == b"".join(line for n, line in enumerate(LINES[:18], 1) if n not in lost)
    log.write({"step": 19})
    log.close()
    assert [record["step"] for record in read_log(path)] == [n for n in range(1, 19) if n not in lost] + [19]
    assert len(lines) == (2 if words else 0)
    assert all(words in line and str(path) in line for line in lines)


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:3], "garbage", *lines[4:]],
        lambda lines: [*lines[:3], '"3,1', *lines[4:]],
        lambda lines: [*lines[:3], "3," + "x" * 200_000, *lines[4:]],
        lambda lines: [*lines[:3], "\0\0\0", *lines[4:]],
    ],
)
def test_good_rows_survive_damaged_lines(tmp_path: Path, change: Any, has_log: bool) -> None:
    table = ["step,loss,time/unix_seconds", *(f"{r['step']},{r['loss']},1.0" for r in RECORDS)]
    (tmp_path / "log.csv").write_text("\n".join(change(table)) + "\n20,9")
    if has_log:
        (tmp_path / "log.jsonl").write_bytes(b"".join(LINES))
    lines: list[str] = []
    run = RunDirectory(tmp_path)
    log = CSVLog(LogContext(config=TinyConfig(), run=run, first_step=18, total_steps=20, report=lines.append))
    log.write(RECORDS[18])
    log.close()
    with (tmp_path / "log.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [n for n in range(1, 20) if n != 3 or has_log]
    assert lines == [f"{tmp_path}/log.csv: left out 1 lines that are no rows of the log"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"starts": {}}', b'{"starts": 3}', b"\xff", b"[" * 100_000, b"{}", None],
)
def test_a_damaged_record_of_versions_is_set_aside(tmp_path: Path, content: bytes | None) -> None:
    run, lines = RunDirectory(tmp_path), []
    if content is None:
        run.versions.mkdir()
    else:
        run.versions.write_bytes(content)
    run.add_versions({"torch": "2"}, report=lines.append)
    assert load_json(run.versions) == {"starts": [{"torch": "2"}]}
    aside = [path for path in tmp_path.iterdir() if "damaged" in path.name]
    assert len(aside) == len(lines) == 1
    assert aside[0].name in lines[0]
    assert content is None or aside[0].read_bytes() == content


def moved_at(output: Path, step: int, move: Callable[[], object], lines: list[str]) -> Trainer:
    begun = trainer(output, lines, loggers=("csv",), tensorboard=True)
    after_step = begun.method.after_step

    def hook() -> None:
        after_step()
        if begun.step == step:
            move()

    begun.method.after_step = hook  # type: ignore[method-assign]
    return begun


@pytest.mark.parametrize("again", [False, True])
def test_a_run_follows_its_directory(tmp_path: Path, whole: Path, again: bool) -> None:
    old, new, lines = tmp_path / "old", tmp_path / "new", []

    def move() -> None:
        old.rename(new)
        if again:  # another run has begun there
            old.mkdir()

    result = moved_at(old, 7, move, lines).fit()
    assert result.checkpoint == new / "checkpoints" / "step_00000024.pt"
    assert lines == [f"{old} is now {new}; the run goes on there"]
    assert log_values(new) == log_values(whole)
    assert not old.exists() or os.listdir(old) == []
    assert (new / "log.csv").read_text().count("\n") == 9


def test_a_run_whose_directory_is_deleted_ends_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"run was deleted or moved to another disk .* --output where it is"):
        moved_at(run, 7, lambda: shutil.rmtree(run), []).fit()
    assert not run.exists()


def test_names_that_are_not_utf8(tmp_path: Path, capfdbinary: Any) -> None:
    name = os.fsdecode(b"r\xe9\xff")
    options = ["--recipe", "pirl-small", "--loader.name", "synthetic", "--batch-size", "4", "--epochs", "1"]
    options += ["--model.width", "0.125", "--method.num-negatives", "8", "--device", "cpu", "--loggers", "csv"]
    command = ["pretrain", "synthetic:8", *options, "--output", str(tmp_path / name)]
    assert [main(command), main(command)] == [0, 0]
    assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}.safetensors"), "--format", "safetensors"]) == 0
    out = capfdbinary.readouterr().out
    assert b"r\\udce9\\udcff" in out or os.fsencode(name) in out
