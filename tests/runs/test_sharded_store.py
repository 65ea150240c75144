"""Sharded checkpoints in one process: content, damage, kills, and every reader of a run."""

import errno
import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast
from sslfast.evaluation.encoders import load_run
from sslfast.evaluation.results import evaluation_folder
from sslfast.recipes.contrastive import moco_v2_small
from sslfast.runs import sharded_store, stored_tensors
from sslfast.runs.checkpoint import HashedFileStore, list_checkpoints, load_checkpoint, load_latest
from sslfast.runs.checkpoint_store import CheckpointWriteError, CorruptCheckpointError, load_newest, stored_bytes
from sslfast.runs.sharded_store import ShardedStore
from sslfast.runs.stored_tensors import INDEX, TensorTable, read_sharded, restored
from sslfast.training.dry_run import summary
from sslfast.training.trainer import Trainer
from tests.methods.harness import ROWS, tiny, tiny_trunks
from tests.tiny import Tiny, TinyConfig, fork_server, log_values, same

IMAGES = 17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensors, "BLOCK_BYTES", 256)


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "step": 7,
        "method": {
            "bank": torch.randn(33, 5, generator=generator).bfloat16(),
            "trunk.weight": torch.randn(3, 4, 5, 6, generator=generator).to(memory_format=torch.channels_last),
            "flags": torch.tensor([True, False]),
            "count": torch.tensor(3),
            "empty": torch.zeros(0, 4),
            "z": torch.tensor(float("nan"), dtype=torch.float64),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(70, generator=generator), "step": 4}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "foreach": None}],
        },
        "list": [1.5, torch.arange(3), (torch.ones(2),), "text \udcff", float("inf"), 2**62],
    }


def plain(value: Any) -> Any:
    """With everything in memory, and contiguous."""
    if isinstance(value, Mapping):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    store = ShardedStore(tmp_path / "checkpoints")
    store.save(state(), 7)
    before = state()
    changing = state()
    store.start(changing, 8)
    changing["method"]["bank"].zero_()
    store.finish()
    assert list(store.list()) == [7, 8]
    assert store.path(7).name == "step_00000007"
    assert sorted(path.name for path in store.path(7).iterdir()) == [INDEX, f"{INDEX}.sha256", "rank_00000.bin"]
    assert same(plain(store.load(7)), plain(before))
    with pytest.raises(CorruptCheckpointError, match="holds step 7, which is not the step in its name"):
        store.load(8)
    assert same(plain(read_sharded(store.path(8))), plain(before))
    loaded = store.load(7)
    assert isinstance(loaded["method"], TensorTable)
    assert isinstance(loaded["optimizer"]["state"][0], TensorTable)
    assert stored_bytes(store) > 2 * 33 * 5 * 2


def test_tensors_are_read_into_those_that_are_there(tmp_path: Path) -> None:
    store = ShardedStore(tmp_path)
    store.save(state(), 7)
    whole = state()["method"]
    own = {name: torch.full_like(value, 1) for name, value in whole.items()}
    own["bank"] = own["bank"][:11]
    own["count"] = torch.tensor(0.0)  # of another dtype: it is a tensor of its own
    found = restored(store.load(7)["method"], own, {"bank": 20})
    assert torch.equal(found["bank"], whole["bank"][20:31])
    assert found["bank"] is own["bank"]
    assert found["trunk.weight"] is own["trunk.weight"]
    assert same(found["trunk.weight"], whole["trunk.weight"])
    assert found["count"] is not own["count"]
    assert found["count"].dtype == torch.int64
    assert same(plain(restored(store.load(7)["method"], {"bank": torch.zeros(40, 5)}, {"bank": 0})), plain(whole))


def test_a_state_that_the_format_does_not_hold_is_an_error_on_the_spot(tmp_path: Path) -> None:
    store = ShardedStore(tmp_path)
    with pytest.raises(TypeError, match="cannot hold /a/b, which is of type PosixPath"):
        store.save({"step": 1, "a": {"b": Path()}}, 1)
    with pytest.raises(TypeError, match="cannot hold /x of type complex64; known: float64"):
        store.start({"step": 1, "x": torch.zeros(1, dtype=torch.complex64)}, 1)
    assert list(store.list()) == []


def sign(folder: Path, content: Any) -> None:
    """Replace the index, with the checksum that fits."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / INDEX).write_text(text)
    (folder / f"{INDEX}.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {INDEX}\n")


def damage(folder: Path, kind: str) -> None:
    file, index = folder / "rank_00000.bin", folder / INDEX
    content = json.loads(index.read_text())
    data = bytearray(file.read_bytes())
    if kind == "flipped":
        data[100] ^= 1
        file.write_bytes(data)
    elif kind == "truncated":
        file.write_bytes(data[:-1])
    elif kind == "missing":
        file.unlink()
    elif kind == "index flipped":
        index.write_text(index.read_text().replace('"step"', '"stop"', 1))
    elif kind == "no index":
        index.unlink()
    elif kind == "no checksum":
        (folder / f"{INDEX}.sha256").unlink()
    elif kind == "other format":
        sign(folder, content | {"format": "sslfast sharded checkpoint 2"})
    elif kind == "other place":
        content["files"][0]["name"] = "../rank_00000.bin"
        sign(folder, content)
    elif kind == "gap":
        content["files"][0]["blocks"][0][1] = 5
        sign(folder, content)
    elif kind == "negative":
        content["files"][0]["blocks"][0][0] = -1
        sign(folder, content)
    elif kind == "unknown kind":
        content["state"] = {"call": ["os.system", "true"]}
        sign(folder, content)
    elif kind == "deep":
        sign(folder, '{"format": "sslfast sharded checkpoint 1", "state": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif kind == "no table":
        content["state"] = 3
        sign(folder, content)
    elif kind == "file":
        os.rename(folder, folder.with_name("away"))
        folder.write_bytes(b"\x80\x04cos\nsystem\n")


KINDS = {
    "flipped": r"rank_00000\.bin is damaged or truncated \(block at byte 0\)",
    "truncated": r"rank_00000\.bin has \d+ bytes in place of \d+",
    "missing": r"lacks rank_00000\.bin \(No such file or directory\); copy the whole folder",
    "index flipped": r"index\.json is damaged or truncated",
    "no index": r"index\.json cannot be read \(No such file",
    "no checksum": r"index\.json cannot be read \(No such file",
    "other format": "not the index of a checkpoint of this version",
    "other place": "not the index of a checkpoint",
    "gap": "not the index of a checkpoint",
    "negative": "not the index of a checkpoint",
    "unknown kind": "not the index of a checkpoint",
    "deep": "not the index of a checkpoint",
    "no table": "no step in it",
    "file": "has no checksum",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(kind: str, tmp_path: Path) -> None:
    store = ShardedStore(tmp_path)
    for step in (6, 7):
        store.save(state() | {"step": step}, step)
    damage(store.path(7), kind)
    with pytest.raises(CorruptCheckpointError, match=KINDS[kind]):
        store.load(7)
    lines: list[str] = []
    found = load_newest(store, report=lines.append)
    assert found is not None
    assert found[0] == 6
    assert len(lines) == 1
    assert lines[0].endswith("; trying the one before, step_00000006")


def test_a_full_disk_leaves_nothing_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardedStore(tmp_path)
    store.save(state(), 7)

    def full(*_arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded_store, "write_part", full)
    store.start(state(), 8)
    with pytest.raises(CheckpointWriteError, match=r"step_00000008 \(No space left on device\); free some space"):
        store.finish()
    store.finish()
    monkeypatch.undo()
    monkeypatch.setattr(sharded_store, "write_index", full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        store.save(state(), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]
    assert not store.has_failed()


def test_either_store_lists_loads_and_deletes_both_kinds(tmp_path: Path) -> None:
    sharded, file = ShardedStore(tmp_path), HashedFileStore(tmp_path)
    for step, store in ((1, file), (2, sharded), (3, file)):
        store.save(state() | {"step": step}, step)
    (tmp_path / ".step_00000009.tmp").mkdir()
    (tmp_path / ".step_00000009.tmp" / "rank_00000.bin").write_bytes(b"half")
    for store in (sharded, file):
        assert list(store.list()) == [1, 2, 3]
        assert [store.path(step).name for step in (1, 2, 3)] == [
            "step_00000001.pt",
            "step_00000002",
            "step_00000003.pt",
        ]
        assert [store.load(step)["step"] for step in (1, 2, 3)] == [1, 2, 3]
        assert same(plain(store.load(1)["method"]), plain(store.load(2)["method"]))
    file.save(state() | {"step": 2}, 2)
    assert not (tmp_path / "step_00000002").exists()
    sharded.save(state() | {"step": 2}, 2)
    sharded.save(state() | {"step": 2}, 2)
    assert sharded.path(2).is_dir()
    assert not (tmp_path / "step_00000002.pt").exists()
    file.clean()
    file.delete(2)
    sharded.delete(1)
    assert file.set_aside(3).name == "step_00000003.pt.superseded"
    sharded.save(state() | {"step": 4}, 4)
    assert file.set_aside(4).name == "step_00000004.superseded"
    assert list(file.list()) == []
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def train(output: str, store: str, last_step: int) -> None:
    """A child that is killed as soon as its thread writes the checkpoint of ``last_step``, if that comes."""
    torch.set_num_threads(1)
    write = sharded_store.write_part

    def dying(path: Path, parts: Any) -> Any:
        if path.parent.name == f".step_{last_step:08d}.tmp":
            path.write_bytes(b"a part")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, parts)

    sharded_store.write_part = dying
    config = replace(TinyConfig(), checkpoint_store=store)  # type: ignore[arg-type]
    Trainer(config, IMAGES, output, report=lambda _line: None).fit()


def test_a_run_killed_in_a_save_and_resumed_ends_as_one_with_files(tmp_path: Path) -> None:
    server = fork_server()
    for name, store, step, code in (
        ("file", "file", 99, 0),
        ("sharded", "sharded", 15, -signal.SIGKILL),
        ("sharded", "sharded", 20, -signal.SIGKILL),
        ("sharded", "sharded", 99, 0),
    ):
        child = server.Process(target=train, args=(str(tmp_path / name), store, step))
        child.start()
        child.join()
        assert child.exitcode == code
        if step == 15:
            names = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
            assert names == [".step_00000015.tmp", "step_00000005", "step_00000010"]
    sharded, file = (list_checkpoints(tmp_path / name / "checkpoints") for name in ("sharded", "file"))
    assert [path.name for path in sharded] == ["step_00000020", "step_00000024"]
    ours, theirs = (load_checkpoint(paths[-1]) for paths in (sharded, file))
    assert same(plain(ours) | {"config": None}, plain(theirs) | {"config": None})
    assert log_values(tmp_path / "sharded") == log_values(tmp_path / "file")
    assert not [*(tmp_path / "sharded" / "checkpoints").glob(".*")]


def test_a_run_changes_its_store_at_a_resume_and_says_which_it_has(tmp_path: Path) -> None:
    lines: list[str] = []

    def trainer(output: str, store: str, **options: Any) -> Trainer:
        config = replace(TinyConfig(), checkpoint_store=store)  # type: ignore[arg-type]
        return Trainer(config, IMAGES, tmp_path / output, report=lines.append, **options)

    first = trainer("a", "sharded")
    assert dict(summary(first))["checkpoints"] == "a file a process (as asked for)"
    assert dict(summary(trainer("b", "auto")))["checkpoints"] == "one file each (one process)"
    assert first.fit().checkpoint == tmp_path / "a" / "checkpoints" / "step_00000024"
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000020"
    trainer("b", "file", resume=checkpoint).fit()
    trainer("c", "sharded", resume=tmp_path / "b").fit()
    os.rename(checkpoint, tmp_path / "copy")
    trainer("d", "auto", resume=tmp_path / "copy").fit()
    finals = [plain(load_latest(tmp_path / name / "checkpoints")[1]) for name in "abd"]  # type: ignore[index]
    assert all(same(final | {"config": 0}, finals[0] | {"config": 0}) for final in finals)
    resumed = [line for line in lines if line.startswith("resumed")]
    assert [line.split(": ")[-1] for line in resumed] == ["step 20/24", "step 24/24", "step 20/24"]


def test_training_goes_on_where_a_background_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, lines = sharded_store.write_part, list[str]()

    def failing(path: Path, parts: Any) -> Any:
        if "00000010" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(path, parts)

    monkeypatch.setattr(sharded_store, "write_part", failing)
    after_step = Tiny.after_step
    monkeypatch.setattr(Tiny, "after_step", lambda self: (time.sleep(0.02), after_step(self))[1])
    config = replace(TinyConfig(), checkpoint_store="sharded", keep_checkpoints=9)
    Trainer(config, IMAGES, tmp_path, report=lines.append).fit()
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "checkpoints")] == ["05", "15", "20", "24"]
    assert len(lines) == 1
    assert "step_00000010 (Input/output error); correct the disk; training continues" in lines[0]


def test_load_evaluate_and_init_read_the_trunk_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(tiny(moco_v2_small(), queue_size=16), epochs=1, checkpoint_store="sharded")
    with tiny_trunks():
        run = Trainer(config, ROWS, tmp_path / "run", report=lambda _line: None).fit()
        index = json.loads((run.checkpoint / INDEX).read_text())
        (queue,) = [n for n, entry in enumerate(index["tensors"]) if entry["name"] == "method/queue"]
        blocks, offset = index["files"][0]["blocks"], 0
        for number, _, count, _ in blocks:  # all of the state is fp32 or int64
            if number == queue:
                break
            offset += count * (8 if index["tensors"][number]["dtype"] == "int64" else 4)
        with (run.checkpoint / "rank_00000.bin").open("r+b") as file:
            file.seek(offset)
            file.write(b"damage of the queue")
        for path in (tmp_path / "run", run.checkpoint):
            weights = sslfast.weights.read_weights(path)
            assert weights.path == run.checkpoint
            assert weights.facts["step"] == run.step
            assert same(dict(weights.state), dict(Trunk(run.checkpoint)))
            assert load_run(path, head=True).step == run.step
        assert evaluation_folder(run.checkpoint).name == f"{run.checkpoint.name}.evaluation"
        lines: list[str] = []
        fresh = replace(config, init=str(run.checkpoint))
        Trainer(fresh, ROWS, tmp_path / "new", report=lines.append)
        assert lines[0].startswith("initial weights: ")
        assert "projection" in lines[0]
        with pytest.raises(CorruptCheckpointError, match="every checkpoint"):
            Trainer(config, ROWS, tmp_path / "run", report=lambda _line: None).fit()
    assert capsys.readouterr().err == ""


class Trunk(dict[str, torch.Tensor]):
    """Entries of the trunk in a sharded checkpoint."""

    def __init__(self, path: Path) -> None:
        method = load_checkpoint(path)["method"]
        super().__init__({name.removeprefix("trunk."): method[name] for name in method if name.startswith("trunk.")})
