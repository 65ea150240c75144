"""jigsaw_patches beside two eager forms: slicing patch by patch, and one gather with computed pixel numbers.

    pytest benchmarks/bench_jigsaw_patches.py --benchmark-enable

Runs on the GPU where there is one. ``gib_per_s`` counts every byte of the patches once read and once written.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslfast.device import wait_for
from sslfast.ops import jigsaw_patches, jigsaw_patches_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def slices(images: Tensor, permutation: Tensor, offsets: Tensor, *, grid: int, patch_size: int) -> Tensor:
    """As a data set's transform does (VISSL's img_patches_tensor); reads the numbers on the host."""
    patches = []
    cell_height, cell_width = images.shape[2] // grid, images.shape[3] // grid
    for image, order, offset in zip(images, permutation.tolist(), offsets.tolist(), strict=True):
        for cell in order:
            y, x = cell // grid * cell_height + offset[cell][0], cell % grid * cell_width + offset[cell][1]
            patches.append(image[:, y : y + patch_size, x : x + patch_size])
    return torch.stack(patches).unflatten(0, (len(images), grid**2))


IMPLEMENTATIONS = {"sslfast": jigsaw_patches, "slices": slices, "gather": jigsaw_patches_reference}


@pytest.mark.parametrize("impl", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
@pytest.mark.parametrize(("batch", "side", "patch_size"), [(256, 96, 24), (64, 255, 64)])
def test_jigsaw_patches(benchmark, batch: int, side: int, patch_size: int, dtype: torch.dtype, impl: str) -> None:
    benchmark.group = f"jigsaw_patches [{batch}, 3, {side}, {side}] {dtype}, patches of {patch_size}, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator).to(DEVICE, dtype)
    permutation = torch.rand(batch, 9, generator=generator).argsort(dim=1).to(DEVICE)
    room = side // 3 - patch_size + 1
    offsets = torch.randint(0, room, (batch, 9, 2), generator=generator).to(DEVICE)
    function: Callable[..., Tensor] = IMPLEMENTATIONS[impl]
    patches = function(images, permutation, offsets, grid=3, patch_size=patch_size)
    assert torch.equal(patches, slices(images, permutation, offsets, grid=3, patch_size=patch_size))

    def run() -> None:
        function(images, permutation, offsets, grid=3, patch_size=patch_size)
        wait_for(DEVICE)

    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    if benchmark.stats:
        moved = 2 * patches.numel() * patches.element_size()
        benchmark.extra_info["gib_per_s"] = round(moved / benchmark.stats.stats.median / 2**30, 2)
