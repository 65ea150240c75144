"""Loader processes: every start method gives the same batches; one that hangs, dies or cannot start is one line."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslfast.data.manifest import Manifest
from sslfast.data.waiting import LostBatchError, WaitInterruptedError
from sslfast.loaders import workers as loader_workers
from sslfast.loaders.pillow import PillowLoader
from sslfast.views.types import Batch, CropConfig, ViewConfig
from tests.pictures import write_folder
from tests.tiny import fork_server

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24)), "small": ViewConfig(crop=CropConfig(size=9))}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.scan(write_folder(tmp_path / "data", [f"{number:02}.jpg" for number in range(16)]))


@pytest.fixture
def start_method() -> Iterator[Any]:
    before = multiprocessing.get_start_method()
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(before, force=True)


def loader(manifest: Manifest, **options: Any) -> PillowLoader:
    return PillowLoader(manifest, VIEWS, **({"batch_size": 4, "seed": 3, "workers": 1} | options))


def pixels(batches: Iterator[Batch]) -> list[Any]:
    return [(batch.sample_ids.tolist(), {k: v.numpy().copy() for k, v in batch.crops.items()}) for batch in batches]


def equal(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        ids == others and all(np.array_equal(crops[name], rest[name]) for name in VIEWS)
        for (ids, crops), (others, rest) in zip(first, second, strict=True)
    )


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_start_method_gives_the_same_batches(manifest: Manifest, start_method: Any, method: str) -> None:
    fork_server()  # preloads torch
    whole = loader(manifest, workers=0)
    expected = pixels(whole.epoch(2))
    start_method(method)
    data = loader(manifest, workers=2)
    data.check()
    assert equal(pixels(data.epoch(2)), expected)
    data.close()
    whole.close()


def test_without_anonymous_files_the_memory_is_reserved(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixels(loader(manifest, workers=0).epoch(0))
    monkeypatch.delattr(os, "memfd_create", raising=False)
    data = loader(manifest)
    assert equal(pixels(data.epoch(0)), expected)
    data.close()

    def full(*_arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = loader(manifest)
    with pytest.raises(LostBatchError, match=r"0 MiB of shared memory cannot be had \(No space left .*--shm-size=8g"):
        next(data.epoch(0))
    data.close()


def test_a_running_loader_needs_no_further_descriptor_and_no_space(manifest: Manifest) -> None:
    data = loader(manifest, workers=2)
    first = pixels(data.epoch(0))
    before, limits = descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        second = [pixels(data.epoch(epoch)) for epoch in (0, 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert equal(second[0], first)
    assert descriptors() == before
    data.close()


def test_batches_are_copies(manifest: Manifest) -> None:
    data = loader(manifest)
    steps = data.epoch(0)
    batch = next(steps)
    kept = batch.crops["image"].clone()
    list(steps)
    data.close()
    assert torch.equal(batch.crops["image"], kept)


def test_abandoned_epochs_leave_nothing_behind(manifest: Manifest) -> None:
    """Batches of an epoch that was left are decoded by nobody, and never taken for those of the next."""
    expected = pixels(loader(manifest, workers=0).epoch(7))
    data = loader(manifest, workers=2)
    for epoch in range(7):
        next(data.epoch(epoch))
    assert equal(pixels(data.epoch(7)), expected)
    data.close()


def test_a_stopped_process_is_one_line_at_the_limit(manifest: Manifest) -> None:
    data = loader(manifest, timeout=0.5)
    steps = data.epoch(0)
    next(steps)
    assert data._pool is not None
    process = data._pool.processes[0]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(
        LostBatchError, match=r"waited \d s for a batch of loader process 1 of 1 \(last file .*\.jpg\): "
    ):
        list(steps)
    data.close()
    assert not process.is_alive()


def test_a_stop_breaks_the_wait_off(manifest: Manifest) -> None:
    data = loader(manifest)
    steps = data.epoch(0)
    next(steps)
    assert data._pool is not None
    os.kill(data._pool.processes[0].pid or 0, signal.SIGSTOP)
    data.patience.is_stopped = lambda: True
    with pytest.raises(WaitInterruptedError):
        list(steps)
    data.close()


def test_without_processes_a_read_that_hangs_is_one_line(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.data.waiting._CLOSE_SECONDS", 0.1)
    data = loader(manifest, workers=0, timeout=0.5)
    monkeypatch.setattr(type(data._decoder.source), "read", lambda self, row: time.sleep(30))
    with pytest.raises(LostBatchError, match=r"waited \d s for a batch \(last file .*\.jpg\): the storage does not"):
        next(data.epoch(0))
    data.close()


def test_processes_that_cannot_start_are_one_line(
    manifest: Manifest, start_method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_method("fork")

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    data = loader(manifest, workers=2)
    with pytest.raises(LostBatchError, match=r"cannot start loader process 1 of 2 \(Resource .*ulimit -u"):
        data.check()
    data.close()


def test_an_error_of_the_decoder_has_its_traceback(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(manifest.source), "read", lambda self, row: 1 // 0)
    data = loader(manifest)
    with pytest.raises(RuntimeError, match=r"(?s)loader process 1 failed:.*ZeroDivisionError"):
        next(data.epoch(0))
    data.close()


SCRIPT = """
import multiprocessing as mp
from sslfast.data import Manifest
from sslfast.loaders.pillow import PillowLoader
from sslfast.views import CropConfig, ViewConfig

def main():
    mp.set_start_method({method!r}, force=True)
    views = {{"image": ViewConfig(crop=CropConfig(size=24))}}
    data = PillowLoader(Manifest.load({manifest!r}), views, batch_size=4, seed=0, workers=2)
    try:
        print(len(list(data.epoch(0))))
    except Exception as error:
        print(error)

{start}
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_main_guard_is_told_so(manifest: Manifest, tmp_path: Path, method: str) -> None:
    manifest.save(tmp_path / "manifest.tsv")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method=method, manifest=str(tmp_path / "manifest.tsv"), start="main()"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path
    )
    assert f"{script} again: put what it runs under `if __name__ == '__main__':`" in done.stdout
    assert "memory ran out" not in done.stdout
    assert "Traceback" not in done.stderr


def test_no_process_outlives_a_killed_parent_although_one_is_stopped(manifest: Manifest, tmp_path: Path) -> None:
    """A stopped process holds the other ends of the pipes of those that were forked before it; it is killed too."""
    manifest.save(tmp_path / "manifest.tsv")
    code = f"""
import os, signal
from sslfast.data import Manifest
from sslfast.loaders.pillow import PillowLoader
from sslfast.views import CropConfig, ViewConfig
views = {{"image": ViewConfig(crop=CropConfig(size=24))}}
data = PillowLoader(Manifest.load({str(tmp_path / "manifest.tsv")!r}), views, batch_size=4, seed=0, workers=3)
data.check()
pids = [process.pid for process in data._pool.processes]
os.kill(pids[-1], signal.SIGSTOP)
print(*pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with (tmp_path / "pids").open("w") as out:  # a pipe would stay open with a process that stays
        subprocess.run([sys.executable, "-c", code], stdout=out, timeout=60, cwd=ROOT)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    end = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_memory_has_room_for_every_batch_in_flight() -> None:
    layout = loader_workers._Layout({"a": (3, 3, 5, 5), "b": (3, 3, 7, 7)}, 3, slots=4)
    memory = loader_workers._Memory(layout)
    for number in range(4):
        planned, decoded, crops = memory.slot(number)
        planned[:], decoded[:] = number, number + 10
        for value, crop in enumerate(crops.values()):
            crop[:] = 16 * number + value
    for number in range(4):
        planned, decoded, crops = memory.slot(number)
        assert planned.tolist() == [number] * 3
        assert decoded.tolist() == [number + 10] * 3
        assert [crop.unique().tolist() for crop in crops.values()] == [[16 * number], [16 * number + 1]]
    assert memory.head.tolist() == [0] * 5
