"""The ffcv loader: the pillow loader's rows and boxes, reproducible pixels, damage detected, clean shutdown."""

import ctypes
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from sslfast.data import ffcv_library
from sslfast.data.beton import Beton, BetonSource
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.loaders.ffcv import FFCVLoader
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig, build_loader
from sslfast.training.signals import RunInterruptedError
from sslfast.training.trainer import Trainer
from sslfast.views.types import Batch, CropConfig, ViewConfig
from tests.pictures import encoded, picture, write_folder
from tests.tiny import Tiny, TinyConfig
from tests.tiny import same as same_state

VIEWS = {
    "image": ViewConfig(crop=CropConfig(size=24)),
    "jigsaw": ViewConfig(crop=CropConfig(size=30, scale=(0.6, 1.0))),
}
NAMES = [f"class{i % 3}/{i:02}.jpg" for i in range(26)]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    prepare_beton(write_folder(tmp_path / "data", NAMES), tmp_path / "data.beton", workers=0)
    return open_data(tmp_path / "data.beton")


def archive(manifest: Manifest) -> Path:
    """The .beton file."""
    assert isinstance(manifest.source, BetonSource)
    assert manifest.source.archive is not None
    return manifest.source.archive


def loader(manifest: Manifest, **options) -> FFCVLoader:
    return FFCVLoader(manifest, VIEWS, **({"batch_size": 6, "seed": 11} | options))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.sample_ids, b.sample_ids) and all(torch.equal(a.crops[name], b.crops[name]) for name in VIEWS)
        for a, b in zip(first, second, strict=True)
    )


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def damage(manifest: Manifest, row: int) -> None:
    """Change one byte in the middle of a stored image, in place."""
    with Beton(archive(manifest)) as beton:
        place = int(beton.offsets[row] + beton.sizes[row] // 2)
    with open(archive(manifest), "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def test_shapes_and_dtypes_of_batches(manifest: Manifest) -> None:
    data = loader(manifest, workers=2)
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
    data.close()


def test_crops_of_raw_pixels_are_bit_equal_to_the_pillow_loaders(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", NAMES)
    prepare_beton(root, tmp_path / "raw.beton", PrepareConfig(mode="raw"), workers=0)
    ours = loader(open_data(tmp_path / "raw.beton"))
    # No box is twice as large as its crop, so the pillow loader decodes at full size too.
    assert same(list(ours.epoch(2)), list(PillowLoader(Manifest.scan(root), VIEWS, batch_size=6, seed=11).epoch(2)))


@pytest.mark.parametrize("size", [(48, 40), (700, 500)])
def test_kept_jpegs_differ_from_the_pillow_loader_only_by_the_fast_dct(tmp_path: Path, size: tuple[int, int]) -> None:
    root = write_folder(tmp_path / "data", NAMES[:12], width=size[0], height=size[1])
    prepare_beton(root, tmp_path / "jpg.beton", workers=0)
    ours, theirs = (
        FFCVLoader(open_data(tmp_path / "jpg.beton"), VIEWS, batch_size=12, seed=11),
        PillowLoader(Manifest.scan(root), VIEWS, batch_size=12, seed=11),
    )
    (one,), (other,) = ours.epoch(0), theirs.epoch(0)
    assert torch.equal(one.sample_ids, other.sample_ids)
    for name in VIEWS:
        difference = (one.crops[name].int() - other.crops[name].int()).abs()
        assert difference.float().mean() < 1.5
        assert difference.max() <= 16


def test_threads_restarts_and_abandoned_epochs_give_the_same_bits(manifest: Manifest) -> None:
    alone = loader(manifest)
    epochs = {epoch: list(alone.epoch(epoch)) for epoch in (0, 1)}
    assert not same(epochs[0], epochs[1])
    for workers in (1, 3):
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


def test_a_restart_reads_no_earlier_sample(manifest: Manifest) -> None:
    data = loader(manifest)
    first = next(data.epoch(0))
    for row in first.sample_ids.tolist():
        damage(manifest, row)
    fresh = loader(manifest)
    assert len(list(fresh.epoch(0, start_step=1))) == 3
    with pytest.raises(ValueError, match="wrong checksum"):
        next(fresh.epoch(0))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_put_together_are_the_single_process_batches(manifest: Manifest, world_size: int) -> None:
    ranks = [list(loader(manifest, rank=rank, world_size=world_size).epoch(5)) for rank in range(world_size)]
    for step, whole in enumerate(loader(manifest).epoch(5)):
        assert torch.equal(torch.cat([rank[step].sample_ids for rank in ranks]), whole.sample_ids)
        for name in VIEWS:
            assert torch.equal(torch.cat([rank[step].crops[name] for rank in ranks]), whole.crops[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_inside_the_file_is_one_error_or_left_out(manifest: Manifest, workers: int) -> None:
    good = {row: batch for batch in loader(manifest).epoch(0) for row in batch.sample_ids.tolist()}
    for row in (2, 9):
        damage(manifest, row)
    strict = loader(manifest, workers=workers)
    wanted = r"^cannot train on row [29] of .*data.beton \(class.*\): damaged: wrong checksum; .*--on-bad-image skip$"
    with pytest.raises(ValueError, match=wanted):
        list(strict.epoch(0)) and list(strict.epoch(1))
    strict.close()
    data = loader(manifest, workers=workers, on_bad_image="skip")
    batches = [batch for epoch in (0, 1) for batch in data.epoch(epoch)]
    assert all(batch.crops["image"].shape == (6, 3, 24, 24) for batch in batches)
    assert not {2, 9} & {int(row) for batch in batches for row in batch.sample_ids}
    assert data.bad_images == [(manifest.paths[row], "damaged: wrong checksum") for row in (2, 9)]
    again = loader(manifest, on_bad_image="skip")
    assert same(batches, [batch for epoch in (0, 1) for batch in again.epoch(epoch)])
    assert len(good) == 24
    data.close()


def test_errors_of_the_decoder_are_checked(manifest: Manifest) -> None:
    data = loader(manifest, on_bad_image="skip")
    row = int(next(data.epoch(0)).sample_ids[0])
    with open(archive(manifest), "r+b") as file:
        file.seek(int(data._decoder.beton.offsets[row]))
        file.write(b"no JPEG")
    data._decoder._is_checked[:] = True  # as if it had been damaged with the checksum
    assert row not in next(data.epoch(0)).sample_ids.tolist()
    assert data.bad_images == [(manifest.paths[row], "damaged: the JPEG decoder complains")]


def test_only_damaged_images_end_in_one_error(manifest: Manifest) -> None:
    for row in range(len(manifest)):
        damage(manifest, row)
    with pytest.raises(ValueError, match=r"no usable replacement found for row .* nearly every image tried is bad"):
        next(loader(manifest, on_bad_image="skip").epoch(0))


def test_a_file_truncated_while_in_use_is_an_error_and_not_a_crash(manifest: Manifest) -> None:
    data = loader(manifest, workers=1)
    os.truncate(archive(manifest), 1000)
    with pytest.raises(ValueError, match="the file was cut short while it was in use"):
        list(data.epoch(0))
    data.close()


def test_a_replaced_file_does_not_affect_a_running_loader(manifest: Manifest, tmp_path: Path) -> None:
    data = loader(manifest)
    before = list(data.epoch(0))
    (tmp_path / "data" / "more.jpg").write_bytes(encoded(picture()))
    prepare_beton(tmp_path / "data", tmp_path / "data.beton", workers=0)
    assert same(list(data.epoch(0)), before)
    with pytest.raises(ValueError, match=r"data.beton is no longer the file that was opened before"):
        loader(manifest)


def test_what_prepare_left_out_is_listed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", ["a.jpg", "b.jpg", "c.jpg"])
    (root / "b.jpg").write_bytes(b"")
    prepare_beton(root, tmp_path / "out.beton", on_bad_image="skip", workers=0)
    data = FFCVLoader(open_data(tmp_path / "out.beton"), VIEWS, batch_size=2, seed=0)
    assert data.bad_images == [("b.jpg", "empty file")]


def test_close_ends_threads_and_file_also_in_the_middle_of_an_epoch(manifest: Manifest) -> None:
    before = held()
    data = loader(manifest, workers=3)
    steps = data.epoch(0)
    next(steps)
    assert held()[1] == before[1] + 3
    data.close()
    with pytest.raises(RuntimeError, match="iterator ended"):
        next(steps)
    with pytest.raises(RuntimeError, match="the loader was closed"):
        data.epoch(0)
    data.close()
    assert held() == before


def test_abandoned_iterators_and_loaders_leak_nothing(manifest: Manifest) -> None:
    before = held()
    for _ in range(5):
        data = loader(manifest, workers=2)
        for _ in range(5):
            next(data.epoch(0))
        assert held()[1] == before[1] + 2
        assert len(data._steps) <= 6
        del data
    gc.collect()
    for _ in range(100):
        if held() == before:
            break
        time.sleep(0.02)
    assert held() == before


def test_memory_is_flat_over_200_epochs(manifest: Manifest) -> None:
    data = loader(manifest, workers=2)
    used = []
    for epoch in range(250):
        for _ in data.epoch(epoch):
            pass
        if epoch in (49, 249):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
            used.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    data.close()
    assert used[1] - used[0] < 4 << 20


def test_torchs_number_of_threads_is_unchanged(manifest: Manifest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    data = loader(manifest, workers=2)
    found = [torch.get_num_threads(), *(data._pool.submit(torch.get_num_threads).result() for _ in range(2))]  # type: ignore[union-attr]
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    data.close()
    torch.set_num_threads(before)
    assert (found, other) == ([3, 1, 1], [3])


def test_ctrl_c_ends_the_process_at_once(manifest: Manifest) -> None:
    code = f"""
import itertools, sys
from pathlib import Path
from sslfast.views import CropConfig, ViewConfig
from sslfast.data import open_data
from sslfast.loaders.ffcv import FFCVLoader
data = FFCVLoader(open_data(Path({str(archive(manifest))!r})), {{"image": ViewConfig(crop=CropConfig(size=24))}},
                  batch_size=6, seed=0, workers=2)
try:
    for epoch in itertools.count():
        for step in data.epoch(epoch):
            print("step", flush=True)
except KeyboardInterrupt:
    print("interrupted", *sorted({{"ffcv", "numba", "cv2"}} & set(sys.modules)), flush=True)
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


def test_build_loader_chooses_it_for_beton_files(manifest: Manifest, tmp_path: Path) -> None:
    options = {"views": VIEWS, "batch_size": 6, "seed": 11}
    built = build_loader(LoaderConfig(workers=0), manifest=manifest, **options)  # type: ignore[arg-type]
    assert isinstance(built, FFCVLoader)
    assert same(list(built.epoch(0)), list(loader(manifest).epoch(0)))
    with pytest.raises(ValueError, match=r"loader 'pillow' reads files and .*data.beton is a .beton file"):
        build_loader(LoaderConfig(name="pillow"), manifest=manifest, **options)  # type: ignore[arg-type]
    folder = Manifest.scan(tmp_path / "data")
    with pytest.raises(ValueError, match=r"reads .beton files: make one with `sslfast data prepare .*data`"):
        build_loader(LoaderConfig(name="ffcv"), manifest=folder, **options)  # type: ignore[arg-type]


def test_status_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usable, reason, remedy = ffcv_library.status()
    assert (usable, reason.split()[0], remedy) == (True, "ffcv", "")
    (tmp_path / "broken.so").write_bytes(b"")
    monkeypatch.setattr(ffcv_library, "find_library", lambda: tmp_path / "broken.so")
    usable, reason, remedy = ffcv_library.status()
    assert not usable
    assert reason.startswith("ffcv's compiled part cannot be loaded (")
    assert remedy.startswith("apt-get install -y libturbojpeg0-dev libopencv-dev pkg-config g++ && pip install ffcv==")
    monkeypatch.setattr(ffcv_library, "find_library", lambda: None)
    assert ffcv_library.status()[1] == "Python package 'ffcv' is not installed"
    assert "\n" not in ffcv_library.status()[2]
    with pytest.raises(ImportError, match="'ffcv' is not installed; apt-get install -y libturbojpeg0-dev"):
        ffcv_library.load_decoder.__wrapped__()


def test_the_pins_are_the_same_everywhere() -> None:
    root = Path(__file__).parents[2]
    pins = ffcv_library.PINS.removeprefix("pip install ")
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ffcv"]
    assert " ".join(extra) == pins
    assert f"\nFFCV ?= {pins}\n" in (root / "Makefile").read_text()
    assert ffcv_library.HEADERS.removeprefix("apt-get install -y ") in (root / "Makefile").read_text()
    assert ffcv_library.HEADERS.removeprefix("apt-get install -y ") in (root / ".ci" / "run").read_text()


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = archive(manifest), TinyConfig(epochs=3, batch_size=6, loader=LoaderConfig(workers=2))
    whole = Trainer(config, data, tmp_path / "whole", report=lambda _: None)
    whole.fit()
    steps = iter(range(12))
    after_step = Tiny.after_step

    def stop_in_the_second_epoch(method: Tiny) -> None:
        after_step(method)
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "after_step", stop_in_the_second_epoch)
        with pytest.raises(RunInterruptedError, match="after step 6/12"):
            Trainer(config, data, tmp_path / "parts", report=lambda _: None).fit()
    resumed = Trainer(config, data, tmp_path / "parts", report=lambda _: None)
    assert resumed.fit().step == 12
    assert same_state(resumed.method.state_dict(), whole.method.state_dict())


def test_boxes_are_those_of_the_sampling_rule(manifest: Manifest) -> None:
    """A view whose crop is its box has the stored image's own pixels."""
    data = FFCVLoader(manifest, {"whole": ViewConfig(crop=CropConfig(size=40, scale=(1, 1)))}, batch_size=26, seed=4)
    (batch,) = data.epoch(0)
    boxes = data._decoder.boxes(0, batch.sample_ids.numpy())[:, 0]
    for slot, row in enumerate(batch.sample_ids.tolist()):
        left, top, right, bottom = boxes[slot].tolist()
        if (right - left, bottom - top) == (40, 40):
            pixels, _ = data._decoder.pixels(row, 1)
            shown = batch.crops["whole"][slot].permute(1, 2, 0).numpy()
            assert np.array_equal(shown, pixels[top:bottom, left:right])
