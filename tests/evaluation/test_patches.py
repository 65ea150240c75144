"""Features averaged over the patches that a method trains on, beside the same by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sslfast.config import save_json, to_dict
from sslfast.evaluation.embed import embed_all
from sslfast.evaluation.encoders import PatchEncoder, TrunkEncoder, load_run
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.linear import LinearConfig, evaluate_linear
from sslfast.evaluation.semisup import FineTuned
from sslfast.methods import CPC, Jigsaw, PatchGrid, RelativePosition, jigsaw_view
from sslfast.methods.shared.patches import normalise_patches
from sslfast.models import ResNetConfig
from sslfast.recipes import RECIPES
from sslfast.runs.checkpoint import save_checkpoint
from sslfast.training import TrainConfig
from sslfast.views import CropConfig, ViewConfig
from tests.evaluation.runs import write_data, write_run
from tests.tiny import context


class Squares(nn.Module):
    """Mean square of each channel: not linear, so a mean over patches is not that of the whole."""

    out_features = 3

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3)).square()

    def stages(self, pixels: Tensor) -> list[Tensor]:
        return [pixels.square()] * 5


def by_hand(pixels: Tensor, corners: list[int], patch: int) -> Tensor:
    found = [pixels[:, :, y : y + patch, x : x + patch].mean((2, 3)).square() for y in corners for x in corners]
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(
    ("grid", "side", "corners"),
    [
        (PatchGrid(patch_size=8, stride=4, size=32, source=""), 21, [0, 4, 8, 12]),  # the last 1 pixel is not seen
        (PatchGrid(patch_size=8, stride=8, size=32, source=""), 8, [0]),
        (PatchGrid(patch_size=8, cells=3, size=24, source=""), 24, [0, 8, 16]),
        (PatchGrid(patch_size=8, cells=3, size=24, source=""), 35, [1, 12, 23]),  # cells of 11, 3 pixels left
        (PatchGrid(patch_size=8, cells=2, size=24, source=""), 27, [2, 15]),
    ],
)
def test_mean_over_patches(grid: PatchGrid, side: int, corners: list[int]) -> None:
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder = PatchEncoder(Squares(), grid)
    pixels = TrunkEncoder(Squares()).prepare(images)
    expected = by_hand(pixels, corners, grid.patch_size)
    torch.testing.assert_close(encoder(images), expected)
    assert encoder.cut(images).shape == (4 * len(corners) ** 2, 3, 8, 8)
    maps = encoder.layers(images, ["res5avg", "res5"])
    squares = torch.stack(
        [pixels[:, :, y : y + 8, x : x + 8].square().mean((2, 3)) for y in corners for x in corners]
    ).mean(0)
    torch.testing.assert_close(maps["res5avg"][..., 0, 0], squares)
    assert maps["res5"].shape == (4, 3, 2, 2)
    assert encoder.identity() != TrunkEncoder(Squares()).identity()


def test_patches_are_normalised_as_in_training() -> None:
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = PatchGrid(patch_size=8, cells=3, size=24, normalise=normalise_patches, source="somebody")
    patches = PatchEncoder(Squares(), grid).cut(images)
    torch.testing.assert_close(patches.mean((2, 3)), torch.zeros(18, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.std((2, 3), correction=0), torch.ones(18, 3))
    assert str(grid) == "mean over patches of 8 pixels in the centre of 3 x 3 cells, normalise_patches; as somebody"


def test_patches_that_do_not_fit() -> None:
    for grid, least in (
        (PatchGrid(patch_size=8, cells=3, size=24, source=""), 24),
        (PatchGrid(patch_size=8, stride=4, size=24, source=""), 8),
    ):
        with pytest.raises(ValueError, match=rf"patches of 8 pixels do not fit .* --size to at least {least}, or pass"):
            grid.cut(torch.zeros(1, 3, least - 1, least - 1))


def test_published_grids() -> None:
    cpc = RECIPES["cpc"]().method.evaluation_patches()
    assert cpc is not None
    assert (cpc.by_default, cpc.cut(torch.zeros(1, 3, cpc.size, cpc.size)).shape) == (True, (1, 49, 3, 64, 64))
    for recipe, size, patch in (("jigsaw", 192, 64), ("relative-position", 192, 64)):
        found = RECIPES[recipe]().method.evaluation_patches()
        assert found is not None
        assert (found.by_default, found.size, found.patch_size) == (False, size, patch)
        assert found.cut(torch.zeros(1, 3, size, size)).shape == (1, 9, 3, patch, patch)
    doersch = RECIPES["relative-position-doersch"]().method.evaluation_patches()
    assert doersch is not None
    assert (doersch.size, doersch.identity()["normalise"]) == (288, "standardised")
    assert RECIPES["pirl-vissl"]().method.evaluation_patches() is None


def write_patch_run(kind: str, path: Path) -> Path:
    """A finished run of a small trunk on patches of 16 pixels."""
    jigsaw = jigsaw_view(63, 16)
    whole = ViewConfig(crop=CropConfig(size=48))
    method = {
        "cpc": CPC.Config(patch_size=16, patch_stride=8, last_step=2, image_view=whole),
        "jigsaw": Jigsaw.Config(num_permutations=10, jigsaw_view=jigsaw, normalise_patches=True),
        "relative-position": RelativePosition.Config(patch_view=jigsaw),
    }[kind]
    norm = "layer" if kind == "cpc" else "batch"
    config = TrainConfig(
        recipe="test", method=method, model=ResNetConfig(name="resnet18", stem="small", width=0.25, norm=norm)
    )  # type: ignore[arg-type]
    built = method.build(context(config.model, 4))
    path.mkdir(parents=True)
    save_json(path / "config.json", to_dict(config))
    save_checkpoint(path / "checkpoints", {"step": 5, "method": built.state_dict(), "config": to_dict(config)}, 5)
    return path


@pytest.mark.parametrize("kind", ["cpc", "jigsaw", "relative-position"])
def test_evaluations_of_a_run(kind: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", train=3, val=1, side=32)
    run = write_patch_run(kind, tmp_path / "run")
    auto, on, off = (load_run(run, patches=choice) for choice in ("auto", "on", "off"))  # type: ignore[arg-type]
    assert isinstance(on.encoders["trained"], PatchEncoder)
    assert isinstance(on.encoders["untrained"], PatchEncoder)
    assert not isinstance(off.encoders["trained"], PatchEncoder)
    assert isinstance(auto.encoders["trained"], PatchEncoder) == (kind == "cpc")
    images = torch.randint(0, 256, (2, 3, on.size, on.size), dtype=torch.uint8)
    trunk, encoder = on.encoders["trained"].trunk, on.encoders["trained"]
    with torch.no_grad():
        by_patch = torch.stack([trunk(encoder.cut(image[None])).mean(0) for image in images])
        torch.testing.assert_close(encoder(images), by_patch, rtol=1e-4, atol=1e-5)
    tuned = FineTuned(encoder, classes=2, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(tuned(images), tuned.classifier(by_patch), rtol=1e-4, atol=1e-5)
    knn = {"k": (1,), "device": "cpu", "encoders": ("trained",)}
    result = evaluate_knn(run, data, KnnConfig(**knn, patches="on"))  # type: ignore[arg-type]
    assert result["patches"] == on.facts["patches"]
    assert result["size"] == on.size
    assert result["patches"].startswith("mean over patches of ")
    whole = evaluate_knn(run, data, KnnConfig(**knn, patches="off"))  # type: ignore[arg-type]
    assert "patches" not in whole
    assert embed_all(run, data, device="cpu", patches="on").values.shape[0] == 12
    moco = LinearConfig(protocol="moco", epochs=1, batch_size=4, device="cpu", patches="on")
    assert evaluate_linear(run, data, moco)["patches"] == result["patches"]


def test_other_methods_have_no_patches(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"patches on: .* has no patches to average: .*; take patches auto"):
        load_run(run, patches="on")
