import pytest
import torch

from sslfast.evaluation.layers import LAYERS, POOLS, pool, pooled_layers
from sslfast.models import ResNetConfig, build_trunk

PUBLISHED = {"conv1": 9216, "res2": 9216, "res3": 8192, "res4": 9216, "res5": 8192, "res5avg": 2048}


def test_pooled_sizes_of_a_resnet50_at_224_are_the_published_ones() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet50"), seed=0).eval()
    with torch.no_grad():
        maps = pooled_layers(trunk, torch.zeros(1, 3, 224, 224), LAYERS)
    assert {layer: value.flatten(1).shape[1] for layer, value in maps.items()} == PUBLISHED
    assert {layer: value.shape[-1] for layer, value in maps.items()} == {n: p.grid for n, p in POOLS.items()}


@pytest.mark.parametrize("layer", LAYERS)
def test_windows(layer: str) -> None:
    """Each value is the mean over its window; zeros of the padding count."""
    window = POOLS[layer]
    side = window.side
    stage = torch.arange(side * side, dtype=torch.float64).reshape(1, 1, side, side) % 97
    padded = torch.nn.functional.pad(stage, [window.padding] * 4)[0, 0]
    found = pool(stage, layer)[0, 0]
    assert found.shape == (window.grid, window.grid)
    for y in range(window.grid):
        for x in range(window.grid):
            top, left = y * window.stride, x * window.stride
            expected = padded[top : top + window.window, left : left + window.window].mean()
            torch.testing.assert_close(found[y, x], expected)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 13, 64])
@pytest.mark.parametrize("layer", LAYERS)
def test_other_map_sides(layer: str, side: int) -> None:
    """The grid of the published pool, or the map itself where it is smaller; the mean stays."""
    stage = torch.arange(2 * side * side, dtype=torch.float64).reshape(1, 2, side, side)
    found = pool(stage, layer)
    grid = min(side, POOLS[layer].grid)
    assert found.shape == (1, 2, grid, grid)
    if side % grid == 0:
        torch.testing.assert_close(found.mean((2, 3)), stage.mean((2, 3)))


def test_res5avg_is_what_the_trunk_returns() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18", stem="small"), seed=0).eval()
    pixels = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24)
    with torch.no_grad():
        maps = pooled_layers(trunk, pixels, ["res5avg", "res3"])
        torch.testing.assert_close(maps["res5avg"].flatten(1), trunk(pixels))
    assert list(maps) == ["res5avg", "res3"]


def test_errors() -> None:
    trunk = build_trunk(ResNetConfig(name="resnet18"), seed=0)
    with pytest.raises(ValueError, match="layers must be some of conv1, res2, res3, res4, res5, res5avg, got res6"):
        pooled_layers(trunk, torch.zeros(1, 3, 32, 32), ["res5", "res6"])
    with pytest.raises(ValueError, match="got none"):
        pooled_layers(trunk, torch.zeros(1, 3, 32, 32), [])
    with pytest.raises(ValueError, match="Identity has no stages"):
        pooled_layers(torch.nn.Identity(), torch.zeros(1, 3, 32, 32), ["res5"])
