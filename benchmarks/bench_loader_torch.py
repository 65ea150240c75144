"""Images/s of decode + random crop in one process: sslfast against torchvision v2 on PIL, on the same files.

    pytest benchmarks/bench_loader_torch.py --benchmark-enable

Files: photographs that ship inside scikit-image and scikit-learn, cut and re-encoded as 500 x 375 JPEGs (ImageNet's
median size), or the folder that SSLFAST_BENCH_IMAGES names. ``one`` is one 224-pixel crop; ``pirl`` is a 224-pixel
and a 255-pixel crop of the same image. One round is a pass over all files; ``images_per_s`` is in the extra info.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from sslfast.loaders.batch import CropConfig, ViewConfig
from sslfast.loaders.decode import BatchDecoder, PackedPlaces
from sslfast.manifest import Manifest

VIEWS = {
    "one": {"image": ViewConfig(crop=CropConfig(size=224))},
    "pirl": {
        "image": ViewConfig(crop=CropConfig(size=224)),
        "jigsaw": ViewConfig(crop=CropConfig(size=255, scale=(0.6, 1.0))),
    },
}
FILES = 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    named = os.environ.get("SSLFAST_BENCH_IMAGES")
    if named:
        return Manifest.scan(named, on_bad_image="skip")
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    folder = tmp_path_factory.mktemp("photographs")
    draw = random.Random(0)
    for index in range(FILES):
        photograph = Image.fromarray(photographs[index % len(photographs)])
        width = draw.uniform(0.6, 1.0) * min(photograph.width, photograph.height * 4 / 3)
        left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        cut = photograph.resize((500, 375), Image.Resampling.BICUBIC, box=box)
        cut.save(folder / f"{index:03}.jpg", quality=90)
    return Manifest.scan(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a loader's worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sslfast_pass(manifest: Manifest, views: dict[str, ViewConfig]) -> Callable[[], None]:
    decoder = BatchDecoder(places=PackedPlaces(manifest), views=views, seed=0, on_bad_image="error")

    def run() -> None:
        for start in range(0, len(manifest), FILES):
            decoder(0, np.arange(start, min(start + FILES, len(manifest))))

    return run


def torchvision_pass(manifest: Manifest, views: dict[str, ViewConfig]) -> Callable[[], None]:
    crops = [
        v2.Compose([v2.RandomResizedCrop(v.crop.size, v.crop.scale, v.crop.ratio, antialias=True), v2.PILToTensor()])
        for v in views.values()
    ]

    def run() -> None:
        for start in range(0, len(manifest), FILES):
            batch: list[list[torch.Tensor]] = [[] for _ in crops]
            for row in range(start, min(start + FILES, len(manifest))):
                image = Image.open(manifest.path(row)).convert("RGB")
                for out, crop in zip(batch, crops, strict=True):
                    out.append(crop(image))
            for out in batch:
                torch.stack(out)

    return run


@pytest.mark.parametrize("views", ["one", "pirl"])
@pytest.mark.parametrize("loader", [sslfast_pass, torchvision_pass], ids=["sslfast", "torchvision"])
def test_decode_and_crop(benchmark, manifest: Manifest, loader: Callable, views: str) -> None:
    benchmark.group = f"decode + crop, {views}"
    run = loader(manifest, VIEWS[views])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["images_per_s"] = round(len(manifest) / benchmark.stats.stats.min, 1)
        benchmark.extra_info["folder"] = str(Path(manifest.root).name)
