"""rotate90 beside the two eager forms in use: one torch.rot90 per image, and torch.where over the four rotations.

    pytest benchmarks/bench_rotate90.py --benchmark-enable

Runs on the GPU where there is one. ``gib_per_s`` counts every byte once read and once written.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sslfast.device import wait_for
from sslfast.ops import rotate90, rotate90_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def per_image(images: Tensor, quarter_turns: Tensor) -> Tensor:
    """As a data set's transform does; reads the turns on the host."""
    return torch.stack([torch.rot90(x, k, (-2, -1)) for x, k in zip(images, quarter_turns.tolist(), strict=True)])


IMPLEMENTATIONS = {"sslfast": rotate90, "per image": per_image, "where": rotate90_reference}


@pytest.mark.parametrize("impl", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "float32"])
@pytest.mark.parametrize(("batch", "side"), [(256, 64), (64, 224), (64, 255)])
def test_rotate90(benchmark, batch: int, side: int, dtype: torch.dtype, impl: str) -> None:
    benchmark.group = f"rotate90 [{batch}, 3, {side}, {side}] {dtype}, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), generator=generator).to(DEVICE, dtype)
    turns = torch.randint(0, 4, (batch,), generator=generator).to(DEVICE)
    function: Callable[[Tensor, Tensor], Tensor] = IMPLEMENTATIONS[impl]
    assert torch.equal(function(images, turns), per_image(images, turns))

    def run() -> None:
        function(images, turns)
        wait_for(DEVICE)

    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    if benchmark.stats:
        moved = 2 * images.numel() * images.element_size()
        benchmark.extra_info["gib_per_s"] = round(moved / benchmark.stats.stats.median / 2**30, 2)
