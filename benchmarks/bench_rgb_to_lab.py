"""rgb_to_lab beside the same formulas in torch and scikit-image's rgb2lab (on the CPU; where it is installed).

    pytest benchmarks/bench_rgb_to_lab.py --benchmark-enable

Runs on the GPU where there is one. ``gib_per_s`` counts every byte once read and once written.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.device import wait_for
from sslfast.ops import rgb_to_lab, rgb_to_lab_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16 if DEVICE.type == "cpu" else 256


def scikit_image(pixels: Tensor) -> Tensor:
    from skimage.color import rgb2lab

    return torch.from_numpy(rgb2lab(pixels.cpu().numpy(), channel_axis=1)).to(pixels.device)


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sslfast": rgb_to_lab,
    "torch": rgb_to_lab_reference,
}
if importlib.util.find_spec("skimage") is not None:
    IMPLEMENTATIONS["scikit-image"] = scikit_image


@pytest.mark.parametrize("impl", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_rgb_to_lab(benchmark: Any, layout: str, impl: str) -> None:
    benchmark.group = f"rgb_to_lab [{BATCH}, 3, 224, 224] float32 {layout}, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(BATCH, 3, 224, 224, generator=generator).to(DEVICE, memory_format=getattr(torch, layout))
    function = IMPLEMENTATIONS[impl]
    torch.testing.assert_close(function(pixels), rgb_to_lab_reference(pixels), rtol=0, atol=0.02)

    def run() -> None:
        function(pixels)
        wait_for(DEVICE)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info["gib_per_s"] = round(8 * pixels.numel() / benchmark.stats.stats.median / 2**30, 2)
