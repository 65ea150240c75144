"""Samples/s of the dali loader beside the torch loader and beside a DALI pipeline as DALI's own pages write it.

    pytest benchmarks/bench_loader_dali.py --benchmark-enable

Files: the folder of class folders that SSLFAST_BENCH_IMAGES names, or photographs that ship inside scikit-image and
scikit-learn, cut and re-encoded as JPEGs of ImageNet's common sizes (500 x 375, 375 x 500, 500 x 333, 333 x 500,
640 x 480). The GPU where there is one, else the CPU; as many threads or worker processes as cores.

- ``crop``: one 224-pixel crop.
- ``pirl``: a 224-pixel and a 255-pixel crop of the same image.
- ``rotation``: one 224-pixel crop, turned by quarter turns, mirrored and normalised to floats (here by the view stage).

The plain pipeline reads with ``readers.file``, draws with DALI's own random operators and shuffles by them; it knows
neither rows nor bad files. One round is an epoch; ``samples_per_s`` of the best one is in the extra info.
"""

import os
import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from PIL import Image

from sslfast.loaders.batch import AugmentConfig, CropConfig, ViewConfig
from sslfast.loaders.dali import DaliLoader
from sslfast.loaders.torch import TorchLoader
from sslfast.loaders.views import ViewStage
from sslfast.manifest import Manifest, available_cores

FILES, BATCH = 384, 16
SIZES = ((500, 375), (375, 500), (500, 333), (333, 500), (640, 480))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {
    "crop": {"image": ViewConfig(crop=CropConfig(size=224))},
    "pirl": {
        "image": ViewConfig(crop=CropConfig(size=224)),
        "jigsaw": ViewConfig(crop=CropConfig(size=255, scale=(0.6, 1.0))),
    },
    "rotation": {
        "image": ViewConfig(
            crop=CropConfig(size=224),
            rotation=True,
            augment=AugmentConfig(jitter_probability=0, grayscale_probability=0, mean=MEAN, std=STD),
        )
    },
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    named = os.environ.get("SSLFAST_BENCH_IMAGES")
    if named:
        return Manifest.scan(named, on_bad_image="skip")
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    folder = tmp_path_factory.mktemp("photographs") / "all"
    folder.mkdir()
    draw = random.Random(0)
    for index in range(FILES):
        photograph = Image.fromarray(photographs[index % len(photographs)])
        width, height = SIZES[index % len(SIZES)]
        scale = draw.uniform(0.6, 1.0) * min(photograph.width / width, photograph.height / height)
        left = draw.uniform(0, photograph.width - scale * width)
        top = draw.uniform(0, photograph.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        cut = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
        cut.save(folder / f"{index:03}.jpg", quality=90)
    return Manifest.scan(folder.parent)


def ours(kind: type[DaliLoader] | type[TorchLoader], manifest: Manifest, recipe: str) -> tuple[Callable, Callable]:
    views = RECIPES[recipe]
    loader = kind(
        manifest, views, batch_size=BATCH, seed=0, workers=available_cores(), on_bad_image="skip", device=DEVICE
    )
    stage = ViewStage(views, seed=0, dtype=torch.float32)
    epochs = count()

    def run() -> None:
        for batch in loader.epoch(next(epochs)):
            if recipe == "rotation":
                stage(batch)

    return run, loader.close


def plain_dali(manifest: Manifest, recipe: str) -> tuple[Callable, Callable]:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    decode = "mixed" if DEVICE.type == "cuda" else "cpu"
    device_id = 0 if DEVICE.type == "cuda" else None
    pipeline = Pipeline(batch_size=BATCH, num_threads=available_cores(), device_id=device_id, seed=0)
    with pipeline:
        encoded, label = fn.readers.file(file_root=str(manifest.root), random_shuffle=True, name="reader")
        outputs: list[Any] = []
        if recipe == "pirl":
            image = fn.decoders.image(encoded, device=decode, output_type=types.RGB)
            for size, area in ((224, [0.08, 1.0]), (255, [0.6, 1.0])):
                outputs.append(fn.random_resized_crop(image, size=[size, size], random_area=area))
        else:
            image = fn.decoders.image_random_crop(
                encoded, device=decode, output_type=types.RGB, random_area=[0.08, 1.0]
            )
            outputs.append(fn.resize(image, size=[224, 224]))
        if recipe == "rotation":
            angle = 90.0 * fn.cast(fn.random.choice(4), dtype=types.FLOAT)
            turned = fn.rotate(outputs.pop(), angle=angle, keep_size=True, interp_type=types.INTERP_NN)
            outputs.append(
                fn.crop_mirror_normalize(
                    turned,
                    dtype=types.FLOAT,
                    output_layout="CHW",
                    mean=[255 * value for value in MEAN],
                    std=[255 * value for value in STD],
                    mirror=fn.random.coin_flip(),
                )
            )
        else:
            outputs = [fn.transpose(output, perm=[2, 0, 1]) for output in outputs]
        pipeline.set_outputs(*outputs, label)
    names = [f"crop{position}" for position in range(len(outputs))]
    batches = DALIGenericIterator(
        pipeline, [*names, "label"], reader_name="reader", auto_reset=True, last_batch_policy=LastBatchPolicy.DROP
    )

    def run() -> None:
        for _ in batches:
            pass

    return run, lambda: None


LOADERS: dict[str, Callable[[Manifest, str], tuple[Callable, Callable]]] = {
    "dali": lambda manifest, recipe: ours(DaliLoader, manifest, recipe),
    "torch": lambda manifest, recipe: ours(TorchLoader, manifest, recipe),
    "plain DALI": plain_dali,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", LOADERS)
def test_epoch(benchmark, manifest: Manifest, name: str, recipe: str) -> None:
    benchmark.group = f"{recipe}, {DEVICE.type}, {available_cores()} cores"
    run, close = LOADERS[name](manifest, recipe)

    def synchronised() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, warmup_rounds=1)
    close()
    if benchmark.stats:
        samples = len(manifest) // BATCH * BATCH
        benchmark.extra_info["samples_per_s"] = round(samples / benchmark.stats.stats.min, 1)
