"""Memory, files, threads and processes stay constant over many epochs and abandoned ones, with every loader."""

import ctypes
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslfast.data import ffcv_library
from sslfast.data.opening import open_data
from sslfast.loaders.registry import Loader, LoaderConfig, build_loader, loader_status
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import write_folder

# 160 epochs of 3 steps of 4 images are 22 MiB of crops and 3.4 MB of files: a leak of either per step shows.
VIEWS = {
    "image": ViewConfig(crop=CropConfig(size=48)),
    "other": ViewConfig(crop=CropConfig(size=40, scale=(0.6, 1.0))),
}
EPOCHS = {"pillow-2": 60}
"""200 of the others; processes take a while to start an epoch."""
GROWTH = 2 << 20
"""Largest growth in bytes after the first fifth of the epochs; 0.6 MiB was measured."""
USABLE = {name for name, (usable, _, _) in loader_status().items() if usable}
RUNS = [
    run for run in ("synthetic-0", "pillow-0", "pillow-2", "dali-2", "ffcv-0", "ffcv-2") if run.split("-")[0] in USABLE
]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(run: str, tmp_path: Path) -> Path:
    names = [f"{i:02}.jpg" for i in range(13)]
    folder = write_folder(tmp_path / "data", names, width=70, height=60)
    if not run.startswith("ffcv"):
        return folder
    from sslfast.data.prepare import prepare_beton

    prepare_beton(folder, tmp_path / "data.beton", workers=0)
    return tmp_path / "data.beton"


@pytest.fixture
def loader(run: str, data: Path) -> Iterator[Loader]:
    made = build(run, data)
    yield made
    made.close()


def build(run: str, data: Path) -> Loader:
    name, workers = run.split("-")
    config = LoaderConfig(name=name, workers=int(workers))  # type: ignore[arg-type]
    return build_loader(config, views=VIEWS, batch_size=4, seed=1, manifest=open_data(data))


def resident() -> int:
    """Bytes of this process and its children."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    pages = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held() -> tuple[int, int, int]:
    """Open files, threads and children."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(multiprocessing.active_children())


def settled(before: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is held once it is no more than ``before``, or after a timeout: threads take a moment to end."""
    deadline = time.monotonic() + 5
    while any(now > then for now, then in zip(held(), before, strict=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held()


def test_memory_is_flat_over_epochs(run: str, loader: Loader) -> None:
    epochs = EPOCHS.get(run, 200)
    start = 0
    for epoch in range(epochs):
        assert sum(len(batch.sample_ids) for batch in loader.epoch(epoch)) == 12
        if epoch == epochs // 5:
            start, kept = resident(), held()
    assert resident() - start < GROWTH
    assert held() == kept


def test_abandoned_epochs_leave_nothing(run: str, loader: Loader) -> None:
    kept, start = held(), 0
    for epoch in range(EPOCHS.get(run, 200) // 4):
        batches = loader.epoch(epoch)
        next(batches)
        if epoch % 2:
            batches.close()  # type: ignore[attr-defined]
        if epoch == 10:
            start, kept = resident(), held()
    del batches
    assert resident() - start < GROWTH
    assert all(now <= then for now, then in zip(settled(kept), kept, strict=True))


def test_many_loaders_one_after_another_leave_nothing(run: str, data: Path) -> None:
    start = 0
    for number in range(12):
        loader = build(run, data)
        next(loader.epoch(0))
        loader.close()
        del loader
        if number == 3:
            start, kept = resident(), settled(held())
    after = settled(kept)
    assert all(now <= then for now, then in zip(after, kept, strict=True)), (after, kept)
    assert threading.active_count() <= kept[1]
    assert resident() - start < GROWTH


def test_every_loader_of_this_machine_is_tried() -> None:
    assert {run.split("-")[0] for run in RUNS} == USABLE
    assert ("ffcv" in USABLE) == ffcv_library.status()[0]
