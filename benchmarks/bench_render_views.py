"""render_views beside the same recipe in torchvision v2 (one image or patch after the other, as its transforms work)
and in batched torch.

    pytest benchmarks/bench_render_views.py --benchmark-enable

Runs on the GPU where there is one. ``gib_per_s`` counts bytes in (of the pixels shown) and bytes out.
"""

from typing import Any

import pytest
import torch
import torchvision.transforms.v2 as tv
from torch import Tensor

from sslfast.bench.ops import render_views_case, time_case
from sslfast.device import wait_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16 if DEVICE.type == "cpu" else 256


@pytest.mark.parametrize("impl", ["torch", "sslfast"])
@pytest.mark.parametrize("blur", [False, True], ids=["plain", "blur"])
@pytest.mark.parametrize("jigsaw", [True, False], ids=["jigsaw", "image"])
def test_render_views(benchmark: Any, jigsaw: bool, blur: bool, impl: str) -> None:
    time_case(benchmark, render_views_case(DEVICE, batch=BATCH, jigsaw=jigsaw, blur=blur), impl, DEVICE, rounds=7)


@pytest.mark.parametrize("jigsaw", [True, False], ids=["jigsaw", "image"])
def test_torchvision(benchmark: Any, jigsaw: bool) -> None:
    """ColorJitter, flip, grayscale and normalisation on float images, drawn per picture: what v2 does per call."""
    side, crop = (64, 9) if jigsaw else (224, 1)
    benchmark.group = f"render_views {'jigsaw' if jigsaw else 'image'} view, B={BATCH}, float32, {DEVICE}"
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (BATCH * crop, 3, side, side), generator=generator).to(DEVICE, torch.uint8)
    chain = tv.Compose(
        [
            tv.RandomHorizontalFlip(),
            tv.ToDtype(torch.float32, scale=True),
            tv.ColorJitter(0.4, 0.4, 0.4, 0.4),
            tv.RandomGrayscale(0.2),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def run() -> Tensor:
        out = torch.stack([chain(picture) for picture in pictures])
        wait_for(DEVICE)
        return out

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
