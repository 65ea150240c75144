from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageColor

from sslfast.data import FolderSource, ImageLocation
from sslfast.evaluation.dataset import EvaluationSet
from sslfast.report.neighbours import (
    Neighbour,
    Query,
    choose_queries,
    neighbour_sheet,
    run_neighbours,
    write_neighbours,
)
from tests.pictures import write_folder

GREEN, RED = (ImageColor.getrgb(colour) for colour in ("#16a34a", "#dc2626"))


def location(path: Path) -> ImageLocation:
    return ImageLocation(FolderSource(root=path.parent, paths=[path.name]), 0)


def evaluation(tmp_path: Path) -> EvaluationSet:
    """Queries along three axes; the bank holds each axis twice, the second time with the label of the next class."""
    write_folder(tmp_path / "train", [f"{i}.png" for i in range(6)], width=50, height=33)
    write_folder(tmp_path / "val", [f"{i}.png" for i in range(3)], width=200, height=230)
    bank = torch.cat((torch.eye(3), torch.eye(3) + 0.2))
    return EvaluationSet(
        train={"one": bank, "two": bank.flip(0)},
        train_labels=torch.tensor([0, 1, 2, 1, 2, 0]),
        val={"one": torch.eye(3), "two": torch.eye(3)},
        val_labels=torch.arange(3),
        train_locations=[location(tmp_path / "train" / f"{i}.png") for i in range(6)],
        val_locations=[location(tmp_path / "val" / f"{i}.png") for i in range(3)],
        classes=["a", "bb", "a class of an endless name"],
        facts={},
    )


def columns(sheet: Image.Image, colour: Any) -> int:
    """Pixels of a colour."""
    return sum(count for count, found in sheet.getcolors(sheet.width * sheet.height) or [] if found == colour)


def test_frames_mark_the_class(tmp_path: Path) -> None:
    data = evaluation(tmp_path)
    one = write_neighbours(data, tmp_path / "out" / "one.png", k=1, encoders=["one"])
    two = write_neighbours(data, tmp_path / "two.png", k=2, encoders=["one"])
    with Image.open(one) as sheet:
        frame = columns(sheet, GREEN) / 3
        legend = columns(sheet, RED)
        assert frame > 4 * 96 * 4
        assert legend < frame / 10
    with Image.open(two) as sheet:
        # The second neighbour of every query is of another class.
        assert columns(sheet, GREEN) == round(3 * frame)
        assert columns(sheet, RED) == columns(sheet, GREEN)


def test_all_encoders_and_sizes(tmp_path: Path) -> None:
    path = write_neighbours(evaluation(tmp_path), tmp_path / "sheet.png", queries=50, k=4, title="short")
    with Image.open(path) as sheet:
        assert sheet.width > 9 * 96
        assert sheet.height > 3 * 96


def test_choose_queries() -> None:
    labels = torch.tensor([4, 0, 0, 0, 1, 1, 3, 3, 3])
    assert choose_queries(labels, 10).tolist() == [2, 5, 7, 0]
    assert choose_queries(labels, 2).tolist() == [2, 7]


def test_errors(tmp_path: Path) -> None:
    data = evaluation(tmp_path)
    with pytest.raises(ValueError, match="no encoder 'three' in this evaluation; there are one, two"):
        write_neighbours(data, tmp_path / "sheet.png", encoders=["three"])
    with pytest.raises(ValueError, match="output must end in a picture format"):
        write_neighbours(data, tmp_path / "sheet.xyz", k=1)
    with pytest.raises(ValueError, match="queries must be at least 1"):
        write_neighbours(data, tmp_path / "sheet.png", queries=0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 6\]"):
        write_neighbours(data, tmp_path / "sheet.png", k=7)
    with pytest.raises(ValueError, match="at least one query"):
        neighbour_sheet([], title="")


def test_queries_by_hand(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a.png"])
    found = Neighbour(location=location(tmp_path / "a.png"), similarity=0.5, same_class=True)
    query = Query(location=location(tmp_path / "a.png"), label="a", neighbours={"x": [found, found]})
    assert neighbour_sheet([query], title="t").size[0] > 3 * 96


def test_a_flat_folder_names_the_way(tmp_path: Path) -> None:
    write_folder(tmp_path / "flat", ["a.png"], width=9, height=9)
    with pytest.raises(
        ValueError, match=r"holds no sets train and val; for images without them: sslfast embed .*\.npy"
    ):
        run_neighbours(tmp_path / "run", tmp_path / "flat")
