"""Pooled maps of every stage of a trunk, for classifiers on single layers.

Goyal et al. (ICCV 2019) pool each stage of a ResNet-50 at 224 px to about 9,000 values by average pooling; the
windows are those of VISSL's linear and SVM benchmarks. Maps of another side (other image sizes, the small stem) are
averaged to the same grid, or kept as they are if they are smaller.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from sslfast.models import STAGE_NAMES, LibraryTrunk


class Pool(NamedTuple):
    """Average pooling of the map of one stage."""

    stage: int
    side: int
    """Side of the map at 224 px, where the window applies."""
    window: int
    stride: int
    padding: int
    grid: int
    """Side of the pooled map."""


POOLS = {
    "conv1": Pool(0, 112, 10, 10, 4, 12),
    "res2": Pool(1, 56, 16, 8, 0, 6),
    "res3": Pool(2, 28, 13, 5, 0, 4),
    "res4": Pool(3, 14, 8, 3, 0, 3),
    "res5": Pool(4, 7, 6, 1, 0, 2),
    "res5avg": Pool(4, 7, 7, 1, 0, 1),
}
OUTPUT = "res5avg"
LAYERS = tuple(POOLS)
"""Layers that a classifier can be trained on, shallow to deep; ``res5avg`` is the trunk's output."""


def check_layers(layers: Sequence[str]) -> None:
    """ValueError where a layer is unknown, or none is given."""
    unknown = [layer for layer in layers if layer not in POOLS]
    if unknown or not layers:
        raise ValueError(f"layers must be some of {', '.join(LAYERS)}, got {', '.join(unknown) or 'none'}")


def pool(stage: Tensor, layer: str) -> Tensor:
    """The map ``[B, C, h, w]`` of a stage averaged to the grid of ``layer``: ``[B, C, g, g]``."""
    found = POOLS[layer]
    if stage.shape[-2:] == (found.side, found.side):
        return avg_pool2d(stage, found.window, found.stride, found.padding)
    return adaptive_avg_pool2d(stage, (min(found.grid, stage.shape[-2]), min(found.grid, stage.shape[-1])))


def pooled_layers(trunk: nn.Module, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Pooled maps ``[B, C, g, g]`` of several layers from one forward pass.

    Args:
        trunk: with ``stages(pixels)``: maps after conv1, res2, res3, res4 and res5.
        pixels: network input ``[B, 3, S, S]``.
        layers: of :data:`LAYERS`.
    """
    check_layers(layers)
    stages = getattr(trunk, "stages", None)
    if stages is None:
        raise ValueError(f"{type(trunk).__name__} has no stages to take layers from; evaluate it with another protocol")
    if isinstance(trunk, LibraryTrunk):
        return _library_layers(trunk, pixels, layers)
    maps = stages(pixels)
    return {layer: pool(maps[POOLS[layer].stage], layer) for layer in layers}


def _library_layers(trunk: LibraryTrunk, pixels: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """The same of a network with fewer maps, the deepest of which is res5; ``res5avg`` is the trunk's own output."""
    found = {OUTPUT: trunk(pixels)[..., None, None]} if OUTPUT in layers else {}
    deep = [layer for layer in layers if layer != OUTPUT]
    maps = trunk.stages(pixels) if deep else []
    first = len(STAGE_NAMES) - len(maps)
    missing = [layer for layer in deep if POOLS[layer].stage < first]
    if missing:
        known = [layer for layer in LAYERS if POOLS[layer].stage >= first]
        raise ValueError(f"{trunk.name} has the layers {', '.join(known)}, got {', '.join(missing)}; choose among them")
    return {**found, **{layer: pool(maps[POOLS[layer].stage - first], layer) for layer in deep}}
