"""Images/s of the ffcv loader, the torch loader on the same files, and a plain FFCV pipeline as FFCV's docs write it.

    pytest benchmarks/bench_loader_ffcv.py --benchmark-enable

Files: those of ``bench_loader_torch.py``, or the folder that SSLFAST_BENCH_IMAGES names; prepared as JPEG and as raw
pixels. ``one`` is one 224-pixel crop; ``pirl`` is a 224-pixel and a 255-pixel crop of the same image. One round is an
epoch in batches of 32 with SSLFAST_BENCH_WORKERS threads (torch: processes; default: all cores); ``images_per_s`` is in
the extra info.

FFCV's pipeline resizes by area and draws its own boxes and flips; its compilation happens in the rounds that warm up.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_loader_torch import VIEWS, manifest  # noqa: F401

from sslfast.loaders import ffcv_library
from sslfast.loaders.batch import ViewConfig
from sslfast.loaders.data import open_data
from sslfast.loaders.ffcv import FFCVLoader
from sslfast.loaders.prepare import PrepareConfig, prepare
from sslfast.loaders.torch import TorchLoader
from sslfast.manifest import Manifest, available_cores

BATCH = 32
WORKERS = int(os.environ.get("SSLFAST_BENCH_WORKERS", available_cores()))
IS_USABLE, *_ = ffcv_library.status()

Epoch = Callable[[], None]
Make = Callable[[Path, dict[str, ViewConfig]], tuple[Epoch, Callable[[], None]]]


@pytest.fixture(scope="module")
def folder(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The data as ``jpg.beton`` and ``raw.beton``, and as the folder ``images``."""
    made = tmp_path_factory.mktemp("beton")
    (made / "images").symlink_to(manifest.root)
    for mode in ("jpg", "raw") if IS_USABLE else ():
        config = PrepareConfig(mode=mode)  # type: ignore[arg-type]
        prepare(manifest.root, made / f"{mode}.beton", config, on_bad_image="skip")
    return made


def torch_loader(folder: Path, views: dict[str, ViewConfig]) -> tuple[Epoch, Callable[[], None]]:
    data = TorchLoader(
        Manifest.scan(folder / "images", on_bad_image="skip"), views, batch_size=BATCH, seed=0, workers=WORKERS
    )
    return lambda: run(data), data.close


def ours(name: str) -> Make:
    def make(folder: Path, views: dict[str, ViewConfig]) -> tuple[Epoch, Callable[[], None]]:
        data = FFCVLoader(open_data(folder / name), views, batch_size=BATCH, seed=0, workers=WORKERS)
        return lambda: run(data), data.close

    return make


def plain(name: str) -> Make:
    """FFCV's Loader with its own random resized crop, one decode for each view."""

    def make(folder: Path, views: dict[str, ViewConfig]) -> tuple[Epoch, Callable[[], None]]:
        # Read when numba is imported. With TBB, which OpenCV brings in, the process can hang at exit.
        os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec
        from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

        def pipeline(view: ViewConfig) -> list[object]:
            size = (view.crop.size, view.crop.size)
            crop = RandomResizedCropRGBImageDecoder(size, scale=view.crop.scale, ratio=view.crop.ratio)
            return [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]

        data = Loader(
            str(folder / name),
            batch_size=BATCH,
            num_workers=WORKERS,
            order=OrderOption.RANDOM,
            os_cache=True,
            drop_last=True,
            pipelines={key: PipelineSpec("image", transforms=pipeline(view)) for key, view in views.items()}
            | {"image": None, "label": None, "row": None}
            | ({"image": pipeline(views["image"])} if "image" in views else {}),
        )

        def epoch() -> None:
            for batch in data:
                assert len(batch[0]) == BATCH

        return epoch, lambda: None

    return make


def run(data: TorchLoader | FFCVLoader) -> None:
    for batch in data.epoch(0):
        assert len(batch.rows) == BATCH


LOADERS: dict[str, Make] = {"torch": torch_loader}
if IS_USABLE:
    LOADERS |= {
        "ffcv-jpg": ours("jpg.beton"),
        "ffcv-raw": ours("raw.beton"),
        "plain-ffcv-jpg": plain("jpg.beton"),
        "plain-ffcv-raw": plain("raw.beton"),
    }


@pytest.mark.parametrize("views", ["one", "pirl"])
@pytest.mark.parametrize("loader", LOADERS)
def test_epoch(benchmark, folder: Path, loader: str, views: str) -> None:
    benchmark.group = f"epoch, {views}, {WORKERS} workers"
    epoch, close = LOADERS[loader](folder, VIEWS[views])
    try:
        benchmark.pedantic(epoch, rounds=5, warmup_rounds=2)
    finally:
        close()
    if benchmark.stats:
        count = len(Manifest.scan(folder / "images", on_bad_image="skip")) // BATCH * BATCH
        benchmark.extra_info["images_per_s"] = round(count / benchmark.stats.stats.min, 1)
