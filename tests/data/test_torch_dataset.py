"""Dataset objects of Python as data: items, labels, identity, damage, worker processes, and bit-equal resume."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

import sslfast
from sslfast.data import SourceError, open_data, prepare_beton, reopen_data, verify_images
from sslfast.data.images import decode_full
from sslfast.data.manifest import Manifest
from sslfast.data.pixels_file import image_file
from sslfast.loaders.dali import DaliLoader
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import picture, pixels
from tests.tiny import TinyConfig, fork_server

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}


class Pictures(Dataset[Any]):
    """As torchvision's CIFAR10: ``(PIL image, number)``, with targets and classes."""

    classes = ("cat", "dog", "eel")

    def __init__(self, count: int = 12, *, form: str = "pil", bad: tuple[int, ...] = (), first: int = 0) -> None:
        self.form, self.bad, self.first = form, bad, first
        self.targets = [(first + row) % 3 for row in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        if row in self.bad:
            raise OSError(f"item {row} is lost\nfor good")
        image: Any = picture(key=self.first + row)
        if self.form == "array":
            image = np.asarray(image)
        elif self.form == "tensor":
            image = torch.from_numpy(pixels(48, 40, self.first + row)).permute(2, 0, 1)
        elif self.form == "dict":
            return {"image": image, "label": self.targets[row]}
        elif self.form == "alone":
            return image
        return image, self.targets[row]


class Untold(Pictures):
    """Labels in the items alone."""

    def __init__(self, count: int = 12) -> None:
        super().__init__(count)
        self.numbers, self.targets = self.targets, None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> Any:
        return picture(key=row), torch.tensor(self.numbers[row])


class Random(Pictures):
    def __getitem__(self, row: int) -> Any:
        return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), 0


class Floats(Pictures):
    def __getitem__(self, row: int) -> Any:
        return torch.rand(3, 16, 16), 0


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def raises(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


def labels_of(manifest: Manifest) -> list[str | None]:
    return [None if label < 0 else manifest.classes[label] for label in manifest.labels]


@pytest.mark.parametrize("form", ["pil", "array", "tensor", "dict", "alone"])
def test_items_are_the_pixels_that_the_dataset_returns(form: str) -> None:
    manifest = open_data(Pictures(form=form))
    assert (len(manifest), manifest.paths[11]) == (12, "000000011")
    assert labels_of(manifest) == ["cat", "dog", "eel"] * 4
    for source in (manifest.source, manifest.source.packed()):
        for row in (0, 7):
            assert np.array_equal(decode_full(source.read(row)), pixels(48, 40, row))
    assert manifest.take([7, 7, 2]).source.read(2) == manifest.source.read(2)
    assert str(manifest.source) == "tests.data.test_torch_dataset.Pictures of 12 items"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_pil_modes_follow_the_policy_of_files(mode: str, tmp_path: Path) -> None:
    image = picture()
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image
    image = image.convert(mode) if image.mode != mode else image
    image.save(tmp_path / "x.tif")
    assert np.array_equal(decode_full(image_file(image)), decode_full((tmp_path / "x.tif").read_bytes()))


def test_arrays_are_data_as_they_are() -> None:
    stack = np.stack([pixels(20, 10, key) for key in range(9)])
    tensors = torch.from_numpy(stack).permute(0, 3, 1, 2)
    for data in (stack, tensors, TensorDataset(tensors, torch.arange(9)), stack[..., :1]):
        manifest = open_data(data)
        wanted = (
            np.broadcast_to(stack[4][..., :1], (10, 20, 3)) if data is not stack and len(data[0]) == 10 else stack[4]
        )
        assert np.array_equal(decode_full(manifest.source.read(4)), wanted)


def test_labels_through_subsets_and_joined_datasets() -> None:
    one, other = Pictures(6), Pictures(3, first=1)
    assert labels_of(open_data(Subset(one, [5, 1]))) == ["eel", "dog"]
    assert labels_of(open_data(ConcatDataset([one, other])))[5:] == ["eel", "dog", "eel", "cat"]
    one.targets = torch.tensor([1, -1, 0, 1, 2, 2])  # type: ignore[assignment]
    assert labels_of(open_data(one)) == ["dog", None, "cat", "dog", "eel", "eel"]
    one.classes = ("a", "b")  # type: ignore[assignment]
    assert labels_of(open_data(one)) == ["1", None, "0", "1", "2", "2"]
    one.targets = one.targets[:5]
    one.__class__ = type("Other", (Pictures,), {"__len__": lambda self: 6})
    with raises(r"Other of 6 items has 5 targets: give both the same length"):
        open_data(one)


def test_labels_of_items_are_read_only_when_they_are_needed() -> None:
    manifest = open_data(Untold())
    assert labels_of(manifest) == [None] * 12
    assert labels_of(manifest.with_labels()) == ["0", "1", "2"] * 4
    labelled = open_data(Pictures())
    assert labelled.with_labels() is labelled


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            Floats(),
            r"Floats of 12 items: its items are torch.float32 tensors \[3, 16, 16\]: sslfast makes the views its",
        ),
        (np.zeros((4, 16, 16, 3), np.float32), r"its items are float32 arrays \[16, 16, 3\]: sslfast makes the views"),
        (
            np.zeros((4, 3, 16, 16), np.uint8),
            r"uint8 arrays \[3, 16, 16\]: arrays must be \[H, W\] or \[H, W, 3\], tens",
        ),
        (TensorDataset(torch.zeros(4, 7)), r"its items are torch.float32 tensors \[7\]: "),
        (Random(), r"item 0 of .*Random of 12 items is another image at each call \(a random transform\?\)"),
        (Endless(), r"Endless is an IterableDataset, whose items have no numbers, .*: give a path, a torch"),
        (object(), r"data of type builtins.object is not read: give a path, a torch.utils.data.Dataset with __len__"),
        (iter([1]), r"data of type builtins.list_iterator is not read: "),
        ({"train": 1}, r"data of type builtins.dict is not read: "),
        (np.array(["x"]), r"its items are numpy.str_, and not an image or \(image, label, ...\): return a PIL image"),
        (Pictures(0), r"no usable image in .*Pictures of 0 items"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(data: Any, error: str) -> None:
    with raises(error) as found:
        open_data(data, on_bad_image="skip")
    assert "\n" not in str(found.value)


def test_what_a_resume_checks(tmp_path: Path) -> None:
    open_data(Pictures(40)).save(tmp_path / "m.tsv")
    assert reopen_data(Pictures(40), tmp_path / "m.tsv").digest() == Manifest.load(tmp_path / "m.tsv").digest()
    assert open_data(Pictures(40, first=3)).digest() != Manifest.load(tmp_path / "m.tsv").digest()
    with raises("no longer matches its manifest of 40 images: 1 missing: 000000039"):
        reopen_data(Pictures(39), tmp_path / "m.tsv")
    with raises("no longer matches its manifest of 40 images: 1 added: 000000040"):
        reopen_data(Pictures(41), tmp_path / "m.tsv")
    with raises(r"16 changed: 000000000 \(other content\)"):
        reopen_data(Pictures(40, first=3), tmp_path / "m.tsv")
    with raises(r"class of the dataset \(tests.data.test_torch_dataset.Pictures -> .*Untold\)"):
        reopen_data(Untold(40), tmp_path / "m.tsv")
    other = Pictures(40)
    other.targets[17] = 0
    with raises("1 changed: labels of 1 items"):
        reopen_data(other, tmp_path / "m.tsv")
    with raises(r"started with a torch.utils.data.Dataset, and .* is another kind of data: give the data"):
        reopen_data(tmp_path, tmp_path / "m.tsv")
    with raises(r"Pictures of 40 items is known by its manifest only: give the dataset that the run started with"):
        Manifest.load(tmp_path / "m.tsv").source.read(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_raises_is_a_bad_image(workers: int) -> None:
    manifest = open_data(Pictures(bad=(3,)))
    loader = PillowLoader(manifest, VIEWS, batch_size=12, seed=0, workers=workers)
    with raises(
        r"cannot train on item 3 of .*Pictures \(row 3\): its dataset raises OSError: item 3 is lost for good;"
    ):
        list(loader.epoch(0))
    loader.close()
    loader = PillowLoader(manifest, VIEWS, batch_size=12, seed=0, workers=workers, on_bad_image="skip")
    (batch,) = loader.epoch(0)
    assert 3 not in batch.sample_ids.tolist()
    assert loader.bad_images == [("000000003", "its dataset raises OSError: item 3 is lost for good")]
    loader.close()
    verified, bad = verify_images(Pictures(bad=(3,)), workers=workers)
    assert (len(verified), [path for path, _ in bad]) == (11, ["000000003"])
    assert np.array_equal(decode_full(verified.source.read(3)), pixels(48, 40, 4))


def test_loaders_agree(tmp_path: Path) -> None:
    manifest = open_data(Pictures())
    prepare_beton(Pictures(), tmp_path / "x.beton", workers=0)
    assert open_data(tmp_path / "x.beton").paths == manifest.paths
    loaders = [
        PillowLoader(manifest, VIEWS, batch_size=6, seed=1, workers=0),
        PillowLoader(manifest, VIEWS, batch_size=6, seed=1, workers=2),
        DaliLoader(manifest, VIEWS, batch_size=6, seed=1, workers=2),
    ]
    for batches in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        for batch in batches[1:]:
            assert torch.equal(batch.sample_ids, batches[0].sample_ids)
            assert torch.equal(batch.crops["image"], batches[0].crops["image"])
    for loader in loaders:
        loader.close()


def test_other_start_methods_pickle_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    context = fork_server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: context)
    loader = PillowLoader(open_data(Pictures()), VIEWS, batch_size=6, seed=1, workers=1)
    assert len(list(loader.epoch(0))) == 2
    loader.close()
    held = Pictures()
    held.open = lambda row: row  # type: ignore[attr-defined]
    loader = PillowLoader(open_data(held), VIEWS, batch_size=6, seed=1, workers=1)
    with pytest.raises(SourceError, match=r"cannot be sent to loader processes \(.*lambda.*set loader.workers to 0"):
        list(loader.epoch(0))
    loader.close()


def test_a_run_resumes_bit_equal(tmp_path: Path) -> None:
    config = TinyConfig(epochs=2, loader=LoaderConfig(workers=0))
    data = Subset(Pictures(20), range(2, 18))
    whole = Trainer(config, data, tmp_path / "whole", report=lambda _: None).fit()
    Trainer(config, data, tmp_path / "parts", report=lambda _: None).fit()
    sorted((tmp_path / "parts" / "checkpoints").glob("step_*.pt"))[-1].unlink()
    assert (
        Trainer(config, data, tmp_path / "parts", report=lambda _: None).fit().metrics["loss"] == whole.metrics["loss"]
    )
    with raises("no longer matches its manifest of 16 images"):
        Trainer(config, Subset(data.dataset, range(16)), tmp_path / "parts", report=lambda _: None)


def test_online_knn_reads_labels_from_items(tmp_path: Path) -> None:
    config = TinyConfig(epochs=1, loader=LoaderConfig(workers=0), knn_every_epochs=1)
    assert "knn_top1" in Trainer(config, Untold(24), tmp_path, report=lambda _: None).fit().metrics


def test_pretrain_and_embed_take_a_dataset(tmp_path: Path) -> None:
    overrides = {"loader.workers": 0, "method.num_negatives": 4, "model.width": 0.25}
    sslfast.pretrain(Pictures(), "npid-small", tmp_path, epochs=1, batch_size=4, device="cpu", **overrides)
    found = sslfast.embed(tmp_path, Pictures(), device="cpu", workers=0, batch_size=4)
    assert (found.paths[3], found.classes[:3], len(found.values)) == ("000000003", ["cat", "dog", "eel"], 12)
