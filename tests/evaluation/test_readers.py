"""Evaluation images by every loader: the published pixels by Pillow, the others within a stated distance of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslfast.data import Manifest, open_data
from sslfast.data.demo import photograph_path
from sslfast.data.ffcv_library import status
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.embed import embed_all
from sslfast.evaluation.encoders import extract_images, load_run
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.linear import LinearConfig, evaluate_linear
from sslfast.evaluation.preprocessing import describe
from sslfast.evaluation.semisup import SemisupConfig, evaluate_semisup
from sslfast.evaluation.sgd import TrainingImages
from sslfast.loaders import dali_whole
from sslfast.report.neighbours import run_neighbours
from tests.evaluation.runs import write_data, write_run
from tests.pictures import encoded, picture

pytestmark = pytest.mark.skipif(not status()[0], reason=status()[1])
PREPROCESSINGS = ("centre-crop", "whole", "centre-square")
SIZES = [(500, 375), (375, 500), (90, 80), (81, 121), (256, 256), (300, 223), (1024, 200)]
DALI_MOST, DALI_EDGE, DALI_MEAN = 1, 8, 0.3
"""Stated distance of DALI's pixels from Pillow's on the CPU, of 255: largest, largest where the edge of the picture is
seen (beyond which DALI repeats the last pixel and Pillow weighs the others), and average over an image."""
FFCV_MEAN = 1.7
"""Stated average distance of JPEGs decoded with the fast DCT."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of photographs as JPEGs of ordinary, portrait, small and long shapes, turned ones, gray, CMYK and PNG."""
    root = tmp_path_factory.mktemp("pictures")
    with Image.open(photograph_path("coffee")) as image:
        photograph = image.convert("RGB").resize((1200, 800))
    (root / "a").mkdir()
    (root / "b").mkdir()
    for number, (width, height) in enumerate(SIZES):
        part = photograph.crop((10 * number, 20, 10 * number + width, 20 + height))
        exif = Image.Exif()
        exif[0x0112] = 1 + number  # turned, all ways
        (root / "a" / f"{number}.jpg").write_bytes(encoded(part, quality=92, exif=exif.tobytes()))
    part = photograph.crop((200, 100, 540, 400))
    (root / "b" / "gray.jpg").write_bytes(encoded(part.convert("L"), quality=92))
    (root / "b" / "cmyk.jpg").write_bytes(encoded(part.convert("CMYK"), quality=92))
    (root / "b" / "png.png").write_bytes(encoded(part, "PNG"))
    (root / "b" / "long.jpg").write_bytes(encoded(photograph.crop((0, 0, 1200, 60)), quality=92))
    return root


def read(manifest: Manifest, loader: str, how: str, *, workers: int = 0, size: int = 96) -> torch.Tensor:
    reader = ImageReader(manifest, size, 4, workers, "error", how, loader)  # type: ignore[arg-type]
    batches = list(reader(range(len(manifest))))
    assert [row for rows, _ in batches for row in rows] == list(range(len(manifest)))
    return torch.cat([images for _, images in batches])


def distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found.int() - expected.int()).abs().flatten(1)


@pytest.mark.parametrize("how", PREPROCESSINGS)
def test_dali_sees_what_pillow_sees(folder: Path, how: str) -> None:
    manifest = open_data(folder)
    expected = read(manifest, "pillow", how)
    found = read(manifest, "dali", how, workers=2)
    difference = distance(found, expected)
    assert difference.max() <= (DALI_MOST if how == "centre-crop" else DALI_EDGE)
    assert difference.float().mean(1).max() <= DALI_MEAN
    own = [manifest.paths.index(name) for name in ("b/cmyk.jpg", "b/long.jpg", "b/png.png")]
    assert torch.equal(found[own], expected[own])  # which Pillow decodes for it
    if how == "whole":
        assert torch.equal(read(manifest, "dali", how, workers=1), found)


@pytest.mark.parametrize("how", PREPROCESSINGS)
def test_rows_of_a_beton_file_are_those_of_its_folder(folder: Path, tmp_path: Path, how: str) -> None:
    manifest = open_data(folder)
    expected = read(manifest, "auto", how)
    prepare_beton(folder, tmp_path / "raw.beton", PrepareConfig(mode="raw"), workers=0)
    raw = open_data(tmp_path / "raw.beton")
    assert (raw.paths, raw.labels.tolist(), raw.classes) == (manifest.paths, manifest.labels.tolist(), manifest.classes)
    assert torch.equal(read(raw, "auto", how, workers=2), expected)
    prepare_beton(folder, tmp_path / "jpg.beton", PrepareConfig(quality=100), workers=0)
    assert distance(read(open_data(tmp_path / "jpg.beton"), "ffcv", how), expected).float().mean(1).max() <= FFCV_MEAN
    some = [9, 2, 2, 5]
    assert torch.equal(read(raw.take(some), "ffcv", how), expected[some])


def test_thumbnails_of_a_beton_file(folder: Path, tmp_path: Path) -> None:
    for mode in ("raw", "jpg"):
        prepare_beton(folder, tmp_path / f"{mode}.beton", PrepareConfig(mode=mode), workers=0)  # type: ignore[arg-type]
        manifest = open_data(tmp_path / f"{mode}.beton")
        with Image.open(folder / "b" / "png.png") as image:
            wanted = np.asarray(image.convert("RGB")).astype(int)
        (tmp_path / "thumbnail").write_bytes(manifest.location(manifest.paths.index("b/png.png")).read())
        with Image.open(tmp_path / "thumbnail") as image:
            assert abs(np.asarray(image.convert("RGB")) - wanted).mean() < (0.01 if mode == "raw" else 4)


def test_semi_supervised_subsets_of_a_beton_file_are_its_own_images(tmp_path: Path) -> None:
    data = write_data(tmp_path, train=4, val=1)
    prepare_beton(data / "train", tmp_path / "train.beton", PrepareConfig(mode="raw"), workers=0)
    train = open_data(tmp_path / "train.beton").take([0, 4, 5, 8, 11, 9])
    cpu = torch.device("cpu")
    images = TrainingImages(train, size=16, batch_size=6, seed=0, workers=0, on_bad_image="error", device=cpu)
    ((crops, labels),) = images.epoch(0)
    assert torch.equal(crops.float().mean((2, 3)).argmax(1), 2 - labels)  # the brightest channel says the class
    images.close()


def test_bad_images_by_every_loader(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(5):
        data = encoded(picture(60, 50, number))
        (tmp_path / "a" / f"{number}.jpg").write_bytes(data)
    manifest = open_data(tmp_path)
    (tmp_path / "a" / "3.jpg").write_bytes(data[: len(data) // 2])
    for loader in ("pillow", "dali"):
        reader = ImageReader(manifest, 24, 2, 0, "skip", "centre-crop", loader)  # type: ignore[arg-type]
        assert [rows for rows, _ in reader(range(5))] == [[0, 1], [2], [4]]
        assert [name for name, _ in reader.bad_images] == ["a/3.jpg"]
        with pytest.raises(ValueError, match=r"a/3.jpg cannot be used \(.*\); repair or remove it, or pass --on-bad"):
            list(ImageReader(manifest, 24, 2, loader=loader)(range(5)))  # type: ignore[arg-type]


def test_an_image_that_only_dali_rejects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_data(folder)
    expected = read(manifest, "pillow", "centre-crop")
    waits = []
    wait = dali_whole.WholeDecoder.wait

    def fail_once(self: dali_whole.WholeDecoder) -> list[torch.Tensor]:
        waits.append(1)
        if len(waits) == 1 + 2:  # building the pipeline waits twice
            raise RuntimeError("Critical error in pipeline:\nsomething\nCurrent pipeline object is no longer valid.")
        return wait(self)

    monkeypatch.setattr(dali_whole.WholeDecoder, "wait", fail_once)
    monkeypatch.setattr(
        dali_whole, "refused_images", lambda images, *a, **o: {0: "refused", len(images) - 1: "refused"}
    )
    found = read(manifest, "dali", "centre-crop")
    assert torch.equal(found[0], expected[0])
    assert distance(found, expected).max() <= DALI_MOST


def test_the_same_features_and_results(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=5, val=2)
    packed = tmp_path / "packed"
    for split in ("train", "val"):
        prepare_beton(data / split, packed / f"{split}.beton", PrepareConfig(mode="raw"), workers=0)
    config = {"device": "cpu", "k": (1,), "encoders": ("trained",)}
    first = evaluate_knn(run, data, KnnConfig(**config))  # type: ignore[arg-type]
    second = evaluate_knn(run, packed, KnnConfig(**config))  # type: ignore[arg-type]
    assert second["results"] == first["results"]
    assert first["preprocessing"].endswith("; Pillow bilinear, version 1")
    assert "of the .beton file's images, JPEGs by libjpeg-turbo's fast DCT" in second["preprocessing"]
    third = evaluate_knn(run, data, KnnConfig(**config, loader="dali"))  # type: ignore[arg-type]
    assert "DALI's decoder and triangular filter" in third["preprocessing"]
    assert abs(third["results"][0]["top1"] - first["results"][0]["top1"]) < 0.4
    trained = load_run(run).encoders["trained"]
    cpu = torch.device("cpu")
    features = [
        extract_images({"": trained}, ImageReader(open_data(place), 24), device=cpu).values[""]
        for place in (data / "val", packed / "val.beton")
    ]
    assert torch.equal(*features)
    assert torch.equal(embed_all(run, packed / "val.beton", size=24, preprocessing="centre-crop").values, features[0])
    probe = evaluate_linear(run, packed, LinearConfig(device="cpu", encoders=("trained",), strengths=(1.0,)))
    assert probe["preprocessing"] == second["preprocessing"]
    sheet = run_neighbours(run, packed, output=tmp_path / "sheet.png")
    assert sheet.exists()


def test_a_beton_file_for_training_beside_a_folder_for_validation(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), write_data(tmp_path / "data", train=4, val=2)
    prepare_beton(data / "train", data / "train.beton", PrepareConfig(mode="raw"), workers=0)
    (data / "train").rename(data / "away")
    goyal = LinearConfig(
        protocol="goyal", layers=("res5avg",), epochs=1, batch_size=4, device="cpu", loader="ffcv", size=16
    )
    result = evaluate_linear(run, data, goyal)
    assert (result["loader"], result["preprocessing"]) == ("ffcv", describe("centre-square", 16))
    semisup = SemisupConfig(fraction=0.5, epochs=1, batch_size=4, device="cpu", size=16)
    assert evaluate_semisup(run, data, semisup)["data"]["train"]["images"] == 6
    knn = evaluate_knn(run, data, KnnConfig(k=(1,), device="cpu", encoders=("trained",), size=16))
    assert "train: Pillow bilinear of the .beton" in knn["preprocessing"]
    assert knn["preprocessing"].endswith("val: Pillow bilinear, version 1")


def test_a_loader_that_cannot_read_the_data(folder: Path, tmp_path: Path) -> None:
    prepare_beton(folder, tmp_path / "x.beton", PrepareConfig(mode="raw"), workers=0)
    packed = open_data(tmp_path / "x.beton")
    for loader in ("pillow", "dali"):
        with pytest.raises(
            ValueError, match=rf"'{loader}' reads files and .*x.beton is a .beton file: use --loader ff"
        ):
            ImageReader(packed, 24, loader=loader)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the ffcv loader reads .beton files: make one with `sslfast data prepare .*`"
    ):
        ImageConfig(loader="ffcv").readers([open_data(folder)], 24, "whole")
    with pytest.raises(ValueError, match="loader must be one of"):
        ImageReader(open_data(folder), 24, loader="magic")  # type: ignore[arg-type]
