"""Evaluations by two processes over gloo: the numbers of one process."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sslfast.config import load_json
from sslfast.data.manifest import Manifest
from sslfast.distributed.collectives import gather_objects, gather_uneven, own_rows, raise_together
from sslfast.distributed.process_group import distributed_device, rank
from sslfast.evaluation.embed import EmbedConfig, embed, embed_all, read_embeddings
from sslfast.evaluation.encoders import TRAINED, RawPixels, extract_all, load_run, trunk_encoders
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.linear import LinearConfig, evaluate_linear
from sslfast.evaluation.linear_sgd import FrozenMaps, train_heads
from sslfast.evaluation.semisup import SemisupConfig, evaluate_semisup
from sslfast.evaluation.sgd import GOYAL as LINEAR
from sslfast.evaluation.sgd import ResumeState, TrainingImages
from sslfast.evaluation.svm import SvmConfig, evaluate_svm
from tests.distributed.test_training import enter
from tests.distributed.test_training import run as run_ranks
from tests.evaluation.runs import write_data, write_run
from tests.evaluation.voc_data import write_voc

GOYAL = LinearConfig(protocol="goyal", layers=("res2",), epochs=1, batch_size=6, device="cpu")
SHOTS = SvmConfig(layers=("conv1",), shots=(2,), shot_layers=("conv1",), draws=2, costs=(1.0,), device="cpu")


def evaluate_all(run: Path, data: Path, voc: Path, output: Path) -> None:
    knn = KnnConfig(k=(1, 3), device="cpu", cache=False, batch_size=4)
    evaluate_knn(run, data, knn, output=output / "knn.json")
    evaluate_linear(run, data, GOYAL, output=output / "goyal.json")
    evaluate_svm(run, voc, SHOTS, output=output / "lowshot.json")


def trained_heads(run: Path, data: Path) -> dict[str, torch.Tensor]:
    """State of goyal's classifiers, with and without BatchNorm, after two epochs of two batches of six."""
    cpu, protocol = torch.device("cpu"), replace(LINEAR, lr_per_256_images=2.0)
    manifest, encoders = Manifest.scan(data / "train"), trunk_encoders(load_run(run), (TRAINED,))
    layers = ("res2", "res5avg", "res5avg-plain")
    images = TrainingImages(
        manifest, size=24, batch_size=6, seed=0, workers=0, on_bad_image="error", device=cpu, loader="pillow"
    )
    with closing(images):
        return train_heads(
            FrozenMaps(encoders, layers, device=cpu, precision=torch.float32),
            images,
            protocol,
            size=24,
            classes=3,
            epochs=2,
            batch_size=6,
            seed=0,
            resume=ResumeState(None, {}),
        ).state_dict()


def rank_evaluates(number: int, ranks: int, port: int, folder: Path) -> None:
    enter(number, ranks, port)
    with distributed_device("cpu"):
        assert rank() == number
        assert [len(own) for own in gather_objects(own_rows(7))] == [3, 4]
        found = gather_uneven(torch.arange(number * 2 + 1) + 10 * number)
        assert found.tolist() == [0, 10, 11, 12]
        with pytest.raises(ValueError, match="of the second rank"):
            raise_together("of the second rank" if number == 1 else None)
        evaluate_all(folder / "run", folder / "data", folder / "voc", folder / "two")
        heads = trained_heads(folder / "run", folder / "data")
        if number == 0:
            torch.save(heads, folder / "two" / "heads.pt")
        embed(folder / "run", folder / "data", EmbedConfig(device="cpu", batch_size=3), output=folder / "two" / "e.npy")
        values = embed_all(folder / "run", folder / "data", device="cpu").values
        torch.testing.assert_close(values, read_embeddings(folder / "two" / "e.npy").values)
        semisup = SemisupConfig(fraction=0.5, epochs=1, batch_size=6, device="cpu")
        evaluate_semisup(folder / "run", folder / "data", semisup, output=folder / "two" / "semi.json")
        victim = folder / "data" / "val" / "red" / "1.png"
        if number == 0:
            victim.write_bytes(victim.read_bytes()[:600])
        gather_objects(None)
        encoders = {"raw pixels": RawPixels(side=4)}
        with pytest.raises(ValueError, match=r"red/1.png cannot be used"):
            extract_all(encoders, Manifest.scan(folder / "data" / "val"), size=24)


def near(a: Any, b: Any) -> bool:
    """Equal but for rounding; file names, versions and timings aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a if key != "versions")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return bool(a == pytest.approx(b, rel=1e-3, abs=1e-3)) if isinstance(a, float) else bool(a == b)


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    data = write_data(tmp_path / "data", train=4, val=2)
    write_voc(tmp_path / "voc", trainval=12, test=6)
    run_ranks(rank_evaluates, 2, tmp_path)
    write_data(tmp_path / "data", train=4, val=2)
    evaluate_all(run, data, tmp_path / "voc", tmp_path / "one")
    for name in ("knn", "goyal", "lowshot"):
        two, one = (load_json(tmp_path / folder / f"{name}.json") for folder in ("two", "one"))
        assert near(two, one), f"{name}: {two['results']} {one['results']}"
    heads, alone = torch.load(tmp_path / "two" / "heads.pt"), trained_heads(run, data)
    assert heads.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(heads[name], value, rtol=1e-4, atol=1e-5)
    embed(run, data, EmbedConfig(device="cpu"), output=tmp_path / "one" / "e.npy")
    ours, theirs = (read_embeddings(tmp_path / folder / "e.npy") for folder in ("one", "two"))
    torch.testing.assert_close(ours.values, theirs.values)
    assert (ours.paths, ours.classes, ours.rows.tolist()) == (theirs.paths, theirs.classes, theirs.rows.tolist())
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.part1"))
    semi = load_json(tmp_path / "two" / "semi.json")
    assert semi["protocol"] == "semisup-1ep-50%"
    assert 0 <= semi["results"][0]["top1"] <= 1
