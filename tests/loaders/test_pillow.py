"""The pillow loader: the same pixels for every number of workers and ranks and after restarts; bad images; shutdown."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from sslfast.config import from_dict, to_dict
from sslfast.data.beton import BetonSource
from sslfast.data.manifest import Manifest
from sslfast.data.waiting import LostBatchError
from sslfast.loaders.base import PlannedLoader
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import (
    LOADERS,
    LoaderConfig,
    LoaderName,
    build_loader,
    default_workers,
    loader_status,
    loaders_for,
)
from sslfast.loaders.synthetic import SyntheticLoader
from sslfast.runs.resume import KEYS, check_same_run
from sslfast.views.types import Batch, CropConfig, ViewConfig
from tests.pictures import write_folder
from tests.tiny import TinyConfig

VIEWS = {
    "image": ViewConfig(crop=CropConfig(size=24)),
    "jigsaw": ViewConfig(crop=CropConfig(size=30, scale=(0.6, 1.0))),
}
NAMES = [f"class{i % 3}/{i:02}.jpg" for i in range(26)]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.scan(write_folder(tmp_path / "data", NAMES))


def loader(manifest: Manifest, **options) -> PillowLoader:
    return PillowLoader(manifest, VIEWS, **({"batch_size": 6, "seed": 11} | options))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.sample_ids, b.sample_ids)
        and a.epoch == b.epoch
        and a.crops.keys() == b.crops.keys()
        and all(torch.equal(a.crops[name], b.crops[name]) for name in a.crops)
        for a, b in zip(first, second, strict=True)
    )


def test_shapes_and_dtypes_of_batches(manifest: Manifest) -> None:
    data = loader(manifest)
    assert (data.num_rows, data.steps_per_epoch) == (26, 4)
    batches = list(data.epoch(3))
    assert len(batches) == 4
    for batch in batches:
        assert batch.epoch == 3
        assert (batch.sample_ids.dtype, batch.sample_ids.shape) == (torch.int64, (6,))
        assert list(batch.crops) == ["image", "jigsaw"]
        assert (batch.crops["image"].dtype, batch.crops["image"].shape) == (torch.uint8, (6, 3, 24, 24))
        assert batch.crops["jigsaw"].shape == (6, 3, 30, 30)
        assert all(crop.is_contiguous() for crop in batch.crops.values())
    assert len({int(row) for batch in batches for row in batch.sample_ids}) == 24
    assert data.bad_images == []


def test_workers_restarts_and_abandoned_epochs_give_the_same_bits(manifest: Manifest) -> None:
    alone = loader(manifest)
    epochs = {epoch: list(alone.epoch(epoch)) for epoch in (0, 1)}
    assert not same(epochs[0], epochs[1])
    for workers in (1, 2):
        data = loader(manifest, workers=workers)
        assert same(list(data.epoch(0)), epochs[0])
        abandoned = data.epoch(0)
        next(abandoned)
        assert same(list(data.epoch(1, start_step=2)), epochs[1][2:])
        with pytest.raises(RuntimeError, match="this epoch's iterator ended"):
            next(abandoned)
        assert list(data.epoch(1, start_step=4)) == []
        assert same(list(data.epoch(1)), epochs[1])
        data.close()


def test_a_restart_decodes_no_earlier_sample(manifest: Manifest) -> None:
    data = loader(manifest)
    first = next(data.epoch(0))
    for row in first.sample_ids.tolist():
        manifest.path(row).unlink()
    assert len(list(data.epoch(0, start_step=1))) == 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_put_together_are_the_single_process_batches(manifest: Manifest, world_size: int) -> None:
    ranks = [list(loader(manifest, rank=rank, world_size=world_size).epoch(5)) for rank in range(world_size)]
    for step, whole in enumerate(loader(manifest).epoch(5)):
        assert torch.equal(torch.cat([rank[step].sample_ids for rank in ranks]), whole.sample_ids)
        for name in VIEWS:
            assert torch.equal(torch.cat([rank[step].crops[name] for rank in ranks]), whole.crops[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_keeps_shapes_and_identity_and_records_each_bad_image_once(manifest: Manifest, workers: int) -> None:
    good = {
        int(row): index
        for epoch in (0, 1)
        for b in loader(manifest).epoch(epoch)
        for index, row in enumerate(b.sample_ids)
    }
    assert len(good) == 26
    for row in (2, 9):
        data = manifest.path(row).read_bytes()
        manifest.path(row).write_bytes(data[: len(data) * 2 // 3])
    data = loader(manifest, workers=workers, on_bad_image="skip")
    batches = [batch for epoch in (0, 1) for batch in data.epoch(epoch)]
    assert all(batch.crops["image"].shape == (6, 3, 24, 24) for batch in batches)
    assert not {2, 9} & {int(row) for batch in batches for row in batch.sample_ids}
    assert [path for path, _ in data.bad_images] == [manifest.paths[2], manifest.paths[9]]
    assert all("damaged" in reason for _, reason in data.bad_images)
    assert same(batches, [b for e in (0, 1) for b in loader(manifest, on_bad_image="skip").epoch(e)])
    data.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_error_is_one_line_also_from_a_worker(manifest: Manifest, workers: int) -> None:
    manifest.path(7).write_bytes(b"")
    data = loader(manifest, workers=workers)
    with pytest.raises(ValueError, match=r"^cannot train on .* \(row 7\): empty file; .*--on-bad-image skip$"):
        list(data.epoch(0)) and list(data.epoch(1))
    data.close()


def test_only_bad_images_end_in_one_error(manifest: Manifest) -> None:
    for row in range(len(manifest)):
        manifest.path(row).write_bytes(b"gone")
    with pytest.raises(ValueError, match="nearly every image tried is bad"):
        next(loader(manifest, on_bad_image="skip").epoch(0))


def test_bad_images_start_with_what_the_scan_left_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    (root / "b.jpg").write_bytes(b"")
    data = PillowLoader(Manifest.scan(root, on_bad_image="skip"), VIEWS, batch_size=2, seed=0, on_bad_image="skip")
    (root / "c.jpg").write_bytes(b"text")
    list(data.epoch(0))
    assert [path for path, _ in data.bad_images] == ["b.jpg", "c.jpg"]


def test_close_ends_the_workers_also_in_the_middle_of_an_epoch(manifest: Manifest) -> None:
    before = set(multiprocessing.active_children())
    data = loader(manifest, workers=2)
    steps = data.epoch(0)
    next(steps)
    assert len(set(multiprocessing.active_children()) - before) == 2
    data.close()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(RuntimeError, match="iterator ended"):
        next(steps)
    with pytest.raises(RuntimeError, match="the loader was closed"):
        data.epoch(0)
    data.close()


def test_a_killed_worker_is_one_clear_error(manifest: Manifest) -> None:
    data = loader(manifest, workers=1, batch_size=1)
    steps = data.epoch(0)
    next(steps)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(LostBatchError, match=r"loader process 1 of 1 died \(last file .*\): it was killed .*use fewer"):
        list(steps)
    data.close()


def test_ctrl_c_reaches_the_main_process_only(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path / "manifest.tsv")
    code = f"""
import itertools
from pathlib import Path
from sslfast.views import CropConfig, ViewConfig
from sslfast.loaders.pillow import PillowLoader
from sslfast.data import Manifest
views = {{"image": ViewConfig(crop=CropConfig(size=24))}}
data = PillowLoader(Manifest.load({str(tmp_path / "manifest.tsv")!r}), views, batch_size=6, seed=0, workers=2)
try:
    for epoch in itertools.count():
        for step in data.epoch(epoch):
            print("step", flush=True)
except KeyboardInterrupt:
    data.close()
    print("interrupted", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "step\n"
        time.sleep(0.1)
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert out.endswith("interrupted\n")
    assert err == ""
    assert child.returncode == 0


def test_an_interrupt_without_close_leaves_no_worker(tmp_path: Path, manifest: Manifest) -> None:
    """Workers that were not asked to end (they ignore SIGTERM) neither outlive the process nor keep it from ending."""
    manifest.save(tmp_path / "manifest.tsv")
    code = f"""
from pathlib import Path
from sslfast.views import CropConfig, ViewConfig
from sslfast.loaders.pillow import PillowLoader
from sslfast.data import Manifest
views = {{"image": ViewConfig(crop=CropConfig(size=24))}}
data = PillowLoader(Manifest.load({str(tmp_path / "manifest.tsv")!r}), views, batch_size=6, seed=0, workers=2)
next(data.epoch(0))
print(*[process.pid for process in data._pool.processes], flush=True)
raise KeyboardInterrupt
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode in (1, -signal.SIGINT)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_arguments_fail_before_any_work(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="must be a multiple of world_size=4"):
        loader(manifest, world_size=4)
    with pytest.raises(ValueError, match=r"batch_size=100 is larger than the data set \(26 images\)"):
        loader(manifest, batch_size=100)
    with pytest.raises(ValueError, match="workers must be 0 or more, got workers=-1"):
        loader(manifest, workers=-1)
    with pytest.raises(ValueError, match="on_bad_image must be 'error' or 'skip'"):
        loader(manifest, on_bad_image="maybe")
    with pytest.raises(ValueError, match="start_step must be in"):
        loader(manifest).epoch(0, start_step=5)


def test_build_loader(manifest: Manifest) -> None:
    built = build_loader(LoaderConfig(workers=0), manifest=manifest, views=VIEWS, batch_size=6, seed=11)
    assert isinstance(built, PillowLoader)
    assert same(list(built.epoch(0)), list(loader(manifest).epoch(0)))
    synthetic = build_loader(LoaderConfig(), synthetic_rows=100, views=VIEWS, batch_size=6, seed=11)
    assert isinstance(synthetic, SyntheticLoader)
    like = build_loader(LoaderConfig(name="synthetic"), manifest=manifest, views=VIEWS, batch_size=6, seed=11)
    assert (like.num_rows, like.steps_per_epoch) == (26, 4)
    with pytest.raises(ValueError, match="loader 'pillow' reads images: name a folder"):
        build_loader(LoaderConfig(name="pillow"), views=VIEWS, batch_size=6, seed=11)
    with pytest.raises(ValueError, match="no data: name a folder"):
        build_loader(LoaderConfig(), views=VIEWS, batch_size=6, seed=11)
    with pytest.raises(ValueError, match=r"loader must be one of auto, pillow, .*synthetic, got 'tape'"):
        build_loader(LoaderConfig(name="tape"), manifest=manifest, views=VIEWS, batch_size=6, seed=11)  # type: ignore[arg-type]


def test_every_loader_is_a_module_of_its_name() -> None:
    assert get_args(LoaderName) == ("auto", *LOADERS)
    for name, loader_class in LOADERS.items():
        module = importlib.import_module(f"sslfast.loaders.{name}")
        assert issubclass(getattr(module, loader_class), PlannedLoader)
        assert callable(module.status)


def test_loaders_for_a_source(manifest: Manifest) -> None:
    assert loaders_for(manifest) == ["pillow", "dali", "synthetic"]
    source = BetonSource(root=manifest.root, paths=manifest.paths, archive=None)
    assert loaders_for(replace(manifest, source=source)) == ["ffcv", "synthetic"]


def test_runs_of_the_loader_once_called_torch_resume(tmp_path: Path) -> None:
    config = TinyConfig(loader=LoaderConfig(name="pillow", workers=0))
    saved = to_dict(config)
    saved["loader"]["name"] = "torch"
    assert from_dict(TinyConfig, saved) == config
    state = dict.fromkeys(KEYS) | {"config": saved, "manifest_digest": "d"}
    check_same_run(tmp_path / "step.pt", state, config=config, manifest_digest="d")
    saved["loader"]["name"] = "dali"
    with pytest.raises(ValueError, match=r"loader.name was 'dali', is 'pillow'"):
        check_same_run(tmp_path / "step.pt", state, config=config, manifest_digest="d")


def test_status_says_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loader_status()
    assert set(found) == set(LOADERS)
    assert found["synthetic"] == (True, "built in", "")
    usable, reason, remedy = found["pillow"]
    assert (usable, remedy) == (True, "")
    assert reason.startswith("Pillow ")
    monkeypatch.setitem(sys.modules, "sslfast.loaders.pillow", None)
    assert loader_status()["pillow"][0] is False


def test_default_workers_share_the_cores_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.data.available_cores", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert default_workers() == 1
