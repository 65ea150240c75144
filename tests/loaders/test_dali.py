"""The dali loader: the pillow loader's rows, boxes and bad images, pixels within a stated distance; no file
breaks it, it resumes bit-equal, and it leaks no memory, thread or process."""

import gc
import io
import os
import random
import re
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
from PIL import Image

from sslfast.data.manifest import Manifest
from sslfast.loaders import dali as dali_loader
from sslfast.loaders.dali import DaliLoader
from sslfast.loaders.dali_graph import build_graph
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig, build_loader, choose_loader, loader_status
from sslfast.runs.checkpoint import checkpoint_path, load_checkpoint
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
MOST, MEAN = 3, 0.3
"""Stated distance of DALI's crops on the CPU from the pillow loader's, of 255: largest, and average over a batch."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.scan(write_folder(tmp_path / "data", NAMES))


def loader(manifest: Manifest, **options) -> DaliLoader:
    return DaliLoader(manifest, VIEWS, **({"batch_size": 6, "seed": 11} | options))


def reference(manifest: Manifest, **options) -> PillowLoader:
    return PillowLoader(manifest, VIEWS, **({"batch_size": 6, "seed": 11} | options))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.sample_ids, b.sample_ids)
        and a.epoch == b.epoch
        and a.crops.keys() == b.crops.keys()
        and all(torch.equal(a.crops[name], b.crops[name]) for name in a.crops)
        for a, b in zip(first, second, strict=True)
    )


def assert_close(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert a.epoch == b.epoch
        assert list(a.crops) == list(b.crops)
        for name, crops in a.crops.items():
            assert (crops.dtype, crops.shape) == (torch.uint8, b.crops[name].shape)
            assert crops.is_contiguous()
            difference = (crops.int() - b.crops[name].int()).abs()
            assert difference.max() <= MOST
            assert difference.float().mean() <= MEAN


def test_batches_are_those_of_the_pillow_loader(manifest: Manifest) -> None:
    data = loader(manifest)
    assert (data.num_rows, data.steps_per_epoch) == (26, 4)
    for epoch in (0, 3):
        assert_close(list(data.epoch(epoch)), list(reference(manifest).epoch(epoch)))
    assert data.bad_images == []
    data.close()


def test_every_kind_of_jpeg_agrees_with_the_pillow_loader(tmp_path: Path) -> None:
    """Grayscale, every subsampling, progressive, restart markers, odd sizes, all orientations, trailing bytes; a side
    is below 60, so that the pillow loader decodes at full size, too."""
    kinds = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)]
    files = [encoded(picture(61 + key, 43 + 2 * key, key), **kind) for key, kind in enumerate(kinds)]
    files += [encoded(picture(67, 51, key).convert("L"), progressive=bool(key)) for key in range(2)]
    files += [encoded(picture(90, 41), restart_marker_blocks=2), encoded(picture(8, 70)), encoded(picture(99, 9))]
    files += [encoded(picture(50, 60)) + b"trailer", encoded(picture(48, 50), "MPO", quality=95)]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(encoded(picture(71, 49, orientation), exif=exif))
    for number, content in enumerate(files):
        (tmp_path / f"{number:02}.jpg").write_bytes(content)
    manifest = Manifest.scan(tmp_path)
    data = loader(manifest, batch_size=len(files), workers=2)
    for epoch in range(3):
        assert_close(list(data.epoch(epoch)), list(reference(manifest, batch_size=len(files)).epoch(epoch)))
    data.close()


def test_a_jpeg_that_the_pillow_loader_decodes_smaller_looks_the_same(tmp_path: Path) -> None:
    """DALI decodes at full size; boxes in the reduced image are rounded to its pixels, so the distance is larger."""
    smooth = picture(61, 54).resize((491, 433), Image.Resampling.BICUBIC)
    (tmp_path / "large.jpg").write_bytes(encoded(smooth))
    manifest = Manifest.scan(tmp_path)
    data = loader(manifest, batch_size=1)
    for epoch in range(4):
        (ours,), (theirs,) = data.epoch(epoch), reference(manifest, batch_size=1).epoch(epoch)
        for name in VIEWS:
            assert (ours.crops[name].float() - theirs.crops[name].float()).abs().mean() < 5
    data.close()


def test_threads_restarts_and_abandoned_epochs_give_the_same_bits(manifest: Manifest) -> None:
    alone = loader(manifest, workers=1)
    epochs = {epoch: list(alone.epoch(epoch)) for epoch in (0, 1)}
    alone.close()
    assert not same(epochs[0], epochs[1])
    data = loader(manifest, workers=3)
    assert same(list(data.epoch(0)), epochs[0])
    for taken in (1, 3):
        abandoned = data.epoch(0)
        for _ in range(taken):
            next(abandoned)
        assert same(list(data.epoch(1, start_step=2)), epochs[1][2:])
        with pytest.raises(RuntimeError, match="this epoch's iterator ended"):
            next(abandoned)
    assert list(data.epoch(1, start_step=4)) == []
    assert same(list(data.epoch(1)), epochs[1])
    data.close()


def test_a_restart_reads_no_earlier_sample(manifest: Manifest) -> None:
    first = next(reference(manifest).epoch(0))
    for row in first.sample_ids.tolist():
        manifest.path(row).unlink()
    assert len(list(loader(manifest).epoch(0, start_step=1))) == 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_put_together_are_the_single_process_batches(manifest: Manifest, world_size: int) -> None:
    ranks = [list(loader(manifest, rank=rank, world_size=world_size).epoch(5)) for rank in range(world_size)]
    for step, whole in enumerate(loader(manifest).epoch(5)):
        assert torch.equal(torch.cat([rank[step].sample_ids for rank in ranks]), whole.sample_ids)
        for name in VIEWS:
            assert torch.equal(torch.cat([rank[step].crops[name] for rank in ranks]), whole.crops[name])


def test_batches_larger_than_a_reading_task(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(loader(manifest, batch_size=13).epoch(2))
    monkeypatch.setattr(dali_loader, "_GROUP", 5)
    assert same(list(loader(manifest, batch_size=13, workers=2).epoch(2)), whole)


UNCOMMON = {
    "cmyk.jpg": encoded(picture().convert("CMYK")),
    "rgb.jpg": encoded(picture(), keep_rgb=True),
    "truecolour.png": encoded(picture(), "PNG"),
    "sixteen_bits.png": encoded(Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30), "PNG"),
    "palette.gif": encoded(picture().quantize(16), "GIF"),
    "animated.webp": encoded(picture(), "WEBP", save_all=True, append_images=[picture(key=1)]),
    "transparent.png": encoded(picture().convert("RGBA"), "PNG"),
    "is_a_png.jpg": encoded(picture(key=2), "PNG"),
}


def test_what_dali_does_not_decode_is_decoded_by_the_pillow_loaders_rule(tmp_path: Path) -> None:
    write_folder(tmp_path, ["first.jpg", "second.jpg"])
    for name, content in UNCOMMON.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "is_a_jpeg.png").write_bytes(encoded(picture(key=3)))
    manifest = Manifest.scan(tmp_path)
    exact = {manifest.paths.index(name) for name in UNCOMMON}
    for batch_size in (1, 11):
        data = loader(manifest, batch_size=batch_size)
        ours, theirs = list(data.epoch(0)), list(reference(manifest, batch_size=batch_size).epoch(0))
        assert_close(ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            slots = [slot for slot, row in enumerate(a.sample_ids.tolist()) if row in exact]
            assert all(torch.equal(a.crops[name][slots], b.crops[name][slots]) for name in VIEWS)
        data.close()


def without_segment(data: bytes, marker: int) -> bytes:
    place = data.index(bytes((0xFF, marker)))
    return data[:place] + data[place + 2 + int.from_bytes(data[place + 2 : place + 4], "big") :]


def damage(content: bytes) -> dict[str, bytes]:
    """Bad files that pass the header check, by name."""
    middle = bytearray(content)
    middle[len(content) * 4 // 5 : len(content) * 4 // 5 + 2] = b"\xff\x3a"
    png = bytearray(encoded(picture(), "PNG"))
    png[len(png) // 2] ^= 0xFF
    return {
        "class0/00.jpg": content[: len(content) * 2 // 3],
        "class1/07.jpg": bytes(middle),
        "class2/08.jpg": without_segment(content, 0xDB),  # its markers are in order; DALI fails on it
        "class0/12.jpg": bytes(png),
        "class1/13.jpg": b"",
        "class2/14.jpg": b"text",
        "class0/15.jpg": encoded(Image.new("RGB", (1, 1))),
    }


def test_bad_files_are_replaced_and_listed_as_by_the_pillow_loader(manifest: Manifest) -> None:
    files = damage(manifest.path(20).read_bytes())
    for name, content in files.items():
        (manifest.root / name).write_bytes(content)
    manifest.path(25).unlink()
    ours, theirs = loader(manifest, workers=2, on_bad_image="skip"), reference(manifest, on_bad_image="skip")
    batches = {epoch: list(ours.epoch(epoch)) for epoch in (0, 1)}
    for epoch, found in batches.items():
        assert_close(found, list(theirs.epoch(epoch)))
    bad = {manifest.paths.index(name) for name in files} | {25}
    assert not bad & {int(row) for found in batches.values() for batch in found for row in batch.sample_ids}
    assert ours.bad_images == theirs.bad_images
    assert [path for path, _ in ours.bad_images] == [manifest.paths[row] for row in sorted(bad)]
    # Nothing of it depends on what was found before.
    assert same(list(ours.epoch(0)), batches[0])
    again = loader(manifest, on_bad_image="skip")
    assert same(list(again.epoch(1)), batches[1])
    ours.close()
    again.close()


def test_random_damage_is_treated_as_by_the_pillow_loader(tmp_path: Path) -> None:
    """Flipped, lost, inserted and cut bytes anywhere: the same rows, the same bad files, pixels alike."""
    draw = random.Random(5)
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"optimize": True}]
    for number in range(140):
        content = bytearray(encoded(picture(40 + number % 13, 40 + number % 9, number), **draw.choice(kinds)))
        for _ in range(draw.choice([1, 2, 8]) if number >= 30 else 0):
            place = draw.randrange(len(content))
            match draw.randrange(5):
                case 0:
                    content[place] = draw.randrange(256)
                case 1:  # in the headers
                    content[draw.randrange(min(600, len(content)))] ^= 1 << draw.randrange(8)
                case 2:
                    del content[place : place + draw.randrange(1, 40)]
                case 3:
                    content[place:place] = draw.randbytes(draw.randrange(1, 20))
                case 4:
                    del content[max(place, 9 * len(content) // 10) :]
        (tmp_path / f"{number:03}.jpg").write_bytes(content)
    manifest = Manifest.scan(tmp_path, on_bad_image="skip")
    ours = loader(manifest, batch_size=16, workers=2, on_bad_image="skip")
    theirs = reference(manifest, batch_size=16, on_bad_image="skip")
    for a, b in zip(ours.epoch(0), theirs.epoch(0), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        for name in VIEWS:
            distance = (a.crops[name].float() - b.crops[name].float()).abs().mean(dim=(1, 2, 3))
            assert distance.max() < 1
    assert ours.bad_images == theirs.bad_images
    assert len(ours.bad_images) - len(manifest.excluded) >= 20
    assert ours._preparer.refused
    ours.close()


@pytest.mark.parametrize("kind", range(7))
def test_error_mode_names_path_row_reason_and_remedy_when_its_batch_comes(manifest: Manifest, kind: int) -> None:
    order = [int(row) for batch in reference(manifest).epoch(0) for row in batch.sample_ids]
    content = list(damage(manifest.path(0).read_bytes()).values())[kind]
    manifest.path(order[8]).write_bytes(content)
    steps = loader(manifest, workers=2).epoch(0)
    assert next(steps).sample_ids.tolist() == order[:6]
    where = re.escape(str(manifest.path(order[8])))
    with pytest.raises(ValueError, match=rf"^cannot train on {where} \(row {order[8]}\): .*--on-bad-image skip$"):
        next(steps)


def test_a_loader_continues_after_an_error(manifest: Manifest) -> None:
    whole = list(loader(manifest).epoch(0))
    path = manifest.path(int(whole[1].sample_ids[0]))
    content = path.read_bytes()
    path.write_bytes(without_segment(content, 0xDB))
    data = loader(manifest)
    with pytest.raises(ValueError, match=r"cannot train on .*: damaged: "):
        list(data.epoch(0))
    assert same([next(data.epoch(0))], whole[:1])
    assert same(list(data.epoch(0, start_step=2)), whole[2:])
    data.close()


def test_an_image_that_only_dali_rejects_is_decoded_by_the_threads(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse_the_wide(images, sizes, *, device):
        tried.append(len(images))
        widths = [Image.open(io.BytesIO(image.data.tobytes())).width for image in images]
        return {position: "refused" for position, width in enumerate(widths) if width == 50}

    expected = list(reference(manifest).epoch(0))
    data = loader(manifest)
    monkeypatch.setattr(dali_loader, "refused_images", refuse_the_wide)
    decoder, waits = data._decoder, []

    def fail_once():
        waits.append(1)
        raise RuntimeError("Critical error in pipeline:\nsomething\nCurrent pipeline object is no longer valid.")

    monkeypatch.setattr(decoder, "wait", fail_once)
    found = list(data.epoch(0))
    assert len(waits) == 1
    assert tried in ([6], [12])  # one batch or two were under way
    assert_close(found, expected)
    data.close()


def test_a_failure_that_no_image_explains_is_one_clear_error(manifest: Manifest, monkeypatch) -> None:
    data = loader(manifest)

    def fail():
        raise RuntimeError("Critical error in pipeline:\nout of memory\nCurrent pipeline object is no longer valid.")

    monkeypatch.setattr(data._decoder, "wait", fail)
    with pytest.raises(RuntimeError, match=r"on none of its images alone \(out of memory\): .*smaller batch"):
        next(data.epoch(0))
    monkeypatch.undo()
    assert same(list(data.epoch(0)), list(loader(manifest).epoch(0)))
    data.close()


def test_only_bad_images_end_in_one_error(manifest: Manifest) -> None:
    for row in range(len(manifest)):
        manifest.path(row).write_bytes(b"gone")
    with pytest.raises(ValueError, match="nearly every image tried is bad"):
        next(loader(manifest, on_bad_image="skip").epoch(0))


def test_close_ends_the_threads_also_in_the_middle_of_an_epoch(manifest: Manifest) -> None:
    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("sslfast-read")]

    gc.collect()  # loaders of other tests
    before = len(readers())
    data = loader(manifest, workers=2)
    steps = data.epoch(0)
    next(steps)
    assert len(readers()) > before
    data.close()
    assert len(readers()) == before
    with pytest.raises(RuntimeError, match="iterator ended"):
        next(steps)
    with pytest.raises(RuntimeError, match="the loader was closed"):
        data.epoch(0)
    data.close()


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_is_flat_over_200_epochs_also_of_abandoned_iterators(tmp_path: Path) -> None:
    """One batch is 0.5 MB of crops: a leak of one per epoch would be 100 MB in the end."""
    manifest = Manifest.scan(write_folder(tmp_path, [f"{i}.jpg" for i in range(8)]))
    data = DaliLoader(manifest, {"image": ViewConfig(crop=CropConfig(size=144))}, batch_size=4, seed=0)

    def run(epochs: range) -> None:
        for epoch in epochs:
            steps = data.epoch(epoch)
            next(steps)
            if epoch % 2:
                list(steps)

    run(range(40))
    before = resident_megabytes()
    run(range(40, 240))
    assert resident_megabytes() - before < 20
    data.close()


def test_ctrl_c_ends_the_process_at_once_and_silently(manifest: Manifest, tmp_path: Path) -> None:
    manifest.save(tmp_path / "manifest.tsv")
    code = f"""
import itertools
from pathlib import Path
from sslfast.views import CropConfig, ViewConfig
from sslfast.loaders.dali import DaliLoader
from sslfast.data import Manifest
data = DaliLoader(Manifest.load({str(tmp_path / "manifest.tsv")!r}), {{"image": ViewConfig(crop=CropConfig(size=24))}},
                  batch_size=6, seed=0, workers=2)
try:
    for epoch in itertools.count():
        for step in data.epoch(epoch):
            print("step", flush=True)
except KeyboardInterrupt:
    assert len(list(data.epoch(1))) == 4
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
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_a_resumed_run_is_bit_equal(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(output: str) -> Trainer:
        config = TinyConfig(loader=LoaderConfig(name="dali", workers=2), epochs=2, checkpoint_every_steps=5)
        return Trainer(config, manifest.root, tmp_path / output, report=lambda line: None)

    def final(output: str) -> dict:
        return load_checkpoint(checkpoint_path(tmp_path / output / "checkpoints", 12))

    trainer("whole").fit()
    after_step, calls = Tiny.after_step, []

    def interrupted(self: Tiny) -> None:
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("power cut")
        after_step(self)

    monkeypatch.setattr(Tiny, "after_step", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer("resumed").fit()
    monkeypatch.setattr(Tiny, "after_step", after_step)
    resumed = trainer("resumed")
    assert isinstance(resumed.loader, DaliLoader)
    resumed.fit()
    assert same_state(final("whole"), final("resumed"))


def test_the_gpu_graph_is_valid() -> None:
    """Serialised without a GPU: operators, arguments and devices fit together. The CPU graph is the same code."""
    graph = build_graph([224, 255], batch_size=256, threads=8, gpu=True).serialize()
    assert b"mixed" in graph
    assert graph.count(b"gpu") >= 6  # slice, resize and transpose of two views
    assert b"gpu" not in build_graph([224, 255], batch_size=256, threads=8, gpu=False).serialize()
    with pytest.raises(RuntimeError, match="requires a CUDA-capable GPU"):
        build_graph([224], batch_size=1, threads=1, gpu=True).build()


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


def test_build_loader_and_the_choice_of_auto(manifest: Manifest) -> None:
    built = build_loader(LoaderConfig(name="dali", workers=0), manifest=manifest, views=VIEWS, batch_size=6, seed=11)
    assert isinstance(built, DaliLoader)
    assert same(list(built.epoch(0)), list(loader(manifest).epoch(0)))
    for device in ("cuda:1", torch.device("cpu")):
        name, why = choose_loader(manifest, device)
        assert name == "pillow"
        assert "dali" in why.lower()
    assert choose_loader(None, "cuda")[0] == "synthetic"


def test_status_and_the_pins_of_the_extra(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    usable, reason, remedy = loader_status()["dali"]
    assert (usable, remedy) == (True, "")
    assert reason.startswith("DALI ")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    pins = [pin.split(";")[0] for pin in project["project"]["optional-dependencies"]["dali"]]
    assert pins == dali_loader.INSTALL.split()[2:]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert loader_status()["dali"] == (False, "NVIDIA DALI is not installed", dali_loader.INSTALL)
    with pytest.raises(ValueError, match=r"loader 'dali' cannot be used: NVIDIA DALI is not installed; pip install"):
        loader(manifest)
