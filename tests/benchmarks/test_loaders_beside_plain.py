"""Plain pipelines yield the batches that the loaders are timed for, and the study keeps earlier measurements."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.peers.plain_loaders import KINDS, PIPELINES, patch_corners, quarter_turns, shuffled_patches
from benchmarks.studies.loaders_beside_plain import BATCH, PAIRS, main, table, views
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.loaders.registry import loader_status
from tests.tiny import write_images

CPU = torch.device("cpu")
SHAPES = {"crop": [(4, 3, 224, 224)], "pirl": [(4, 3, 224, 224), (4, 9, 3, 64, 64)], "rotation": [(4, 3, 224, 224)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, BATCH)
    return folder


def usable() -> list[str]:
    return [library for library in PAIRS if loader_status()[library][0]]


@pytest.mark.parametrize("library", usable())
@pytest.mark.parametrize("kind", KINDS)
def test_plain_pipelines_yield_normalised_floats(data: Path, kind: str, library: str) -> None:
    if library == "ffcv":
        prepare_beton(data, data.parent / f"{kind}.beton", PrepareConfig(), on_bad_image="error")
        data = data.parent / f"{kind}.beton"
    batches = PIPELINES[PAIRS[library]](data, kind, batch_size=4, workers=1, device=CPU)
    try:
        for _ in range(BATCH // 4 + 1):
            batch = next(batches)
    finally:
        batches.close()
    assert [tuple(view.shape) for view in batch] == SHAPES[kind]
    for view in batch:
        assert view.dtype == torch.float32
        assert -2.2 < view.min() < view.max() < 2.7  # (0 - mean) / std and (1 - mean) / std


def test_patches_come_from_every_cell_once() -> None:
    corners = patch_corners()
    assert sorted(map(tuple, corners // 85)) == [(y, x) for y in range(3) for x in range(3)]
    assert (corners % 85 <= 21).all()
    rows = torch.arange(255.0).view(1, 1, 255, 1).expand(2, 3, 255, 255)
    patches = shuffled_patches(rows)
    assert patches.shape == (2, 9, 3, 64, 64)
    assert (patches[..., 1:, :] - patches[..., :-1, :] == 1).all()
    assert sorted((patches[0, :, 0, 0, 0] // 85).int().tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_quarter_turns_keep_the_pixels() -> None:
    squares = torch.rand(8, 3, 5, 5)
    for square, turned in zip(squares, quarter_turns(squares), strict=True):
        assert any(torch.equal(turned, torch.rot90(square, k, (1, 2))) for k in range(4))


def test_views_of_the_study_have_no_colour_jitter() -> None:
    assert {kind: list(views(kind)) for kind in KINDS} == {
        "crop": ["image"], "pirl": ["image", "patches"], "rotation": ["image"],
    }  # fmt: skip
    assert all(view.augment.jitter_probability == 0 for kind in KINDS for view in views(kind).values())


def test_measurements_are_kept_and_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(data), "-o", str(tmp_path), "--cores", "1", "--seconds", "0", "--device", "cpu"]
    arguments += ["--libraries", "pillow", "ffcv", "--kinds", "crop"]
    main(arguments)
    out = capsys.readouterr()
    assert "| crop | 1 |" in out.out
    assert "ffcv left out" in out.err
    rows = json.loads((tmp_path / "loaders.json").read_text())["rows"]
    assert [(row["library"], row["plain"]) for row in rows] == [("pillow", False), ("pillow", True)]
    assert (tmp_path / "loaders.png").stat().st_size > 1000
    main(arguments)
    assert capsys.readouterr().out == ""  # nothing was measured again
    rows[0]["samples_per_second"], rows[1]["samples_per_second"] = 300.0, 200.0
    assert table(rows).splitlines()[-1] == "| crop | 1 | 300 | 200 | 1.50 |"


def test_more_cores_than_there_are_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(data), "-o", str(tmp_path), "--cores", "4096"])
    assert "--cores 4096: this process may run on" in capsys.readouterr().err
