"""Time of one JPEG's crops on one CPU core beside what decoding and resizing it cost by themselves.

    python -m benchmarks.studies.decode_floor DATA -o OUT [--images 300] [--repeats 3]

DATA is a folder of JPEGs. For every image and the views of a recipe these take turns in one thread, in another order
each time, and are timed by its CPU clock; files are in memory:

- decode: libjpeg-turbo alone, all of the image, by simplejpeg where it is installed, else by torchvision.
- resize: torch's antialiased ``interpolate`` of the boxes of that image.
- ours: what the pillow loader does: marker scan, decoding, crops into the batch.
- through Pillow: the same before it called libjpeg-turbo directly: ``Image.open``, numpy, ``interpolate``, a copy.
- FFCV: its ``imdecode`` and ``resize_crop`` by area, one decode for all crops, where it is usable.

Writes OUT/decode_floor.json and .md: mean times, and medians over images of the ratios.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from sslfast.data import DEFAULT_DECODING, decode_pixels, open_image, quiet_pillow, scan_jpeg
from sslfast.loaders import loader_status
from sslfast.loaders.decode import fill_crops, stored_box
from sslfast.loaders.jpeg_crops import common_jpeg, why_pillow
from sslfast.recipes import find_recipe
from sslfast.views import crop_boxes, crop_draws

RECIPES = ("pirl-paper", "npid", "simclr")
COLUMNS = ("decode", "resize", "ours", "through Pillow", "FFCV")


def plain_decoder() -> tuple[str, Callable[[bytes], NDArray[np.uint8]]]:
    """Name and function: a file -> [H, W, 3]."""
    try:
        import simplejpeg
    except ImportError:
        from torchvision.io import ImageReadMode, decode_jpeg

        def decode(data: bytes) -> NDArray[np.uint8]:
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return pixels.permute(1, 2, 0).numpy()

        return "torchvision", decode
    return "simplejpeg", lambda data: simplejpeg.decode_jpeg(data, "RGB")


def through_pillow(data: bytes, boxes: list[NDArray[np.int64]], outs: list[torch.Tensor]) -> None:
    """The crops as the loader made them by Pillow and torch alone; upright images."""
    opened = open_image(data, DEFAULT_DECODING)
    room = min(min(b[2] - b[0], b[3] - b[1]) / out.shape[-1] for b, out in zip(boxes, outs, strict=True))
    pixels, factor = decode_pixels(opened, factor=next((f for f in (8, 4, 2) if room >= f), 1))
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for box, out in zip(boxes, outs, strict=True):
        left, top, right, bottom = stored_box(opened, box)
        part = image[:, top // factor : -(-bottom // factor), left // factor : -(-right // factor)]
        out.copy_(interpolate(part[None], size=out.shape[1:], mode="bilinear", antialias=True)[0].expand(out.shape))


def resize(whole: NDArray[np.uint8], boxes: list[NDArray[np.int64]], outs: list[torch.Tensor]) -> None:
    """Torch's resize of decoded pixels."""
    image = torch.from_numpy(whole).permute(2, 0, 1)[None]
    for (left, top, right, bottom), out in zip(boxes, outs, strict=True):
        interpolate(image[..., top:bottom, left:right], size=out.shape[1:], mode="bilinear", antialias=True)


def ours(data: bytes, boxes: list[NDArray[np.int64]], outs: list[torch.Tensor]) -> None:
    """The crops as the loader makes them."""
    found = common_jpeg(data, DEFAULT_DECODING)
    assert found is not None
    fill_crops(found, boxes, outs)


def ffcv(
    source: NDArray[np.uint8],
    shape: tuple[int, ...],
    boxes: list[NDArray[np.int64]],
    squares: list[NDArray[np.uint8]],
) -> None:
    """FFCV's decoder and resize, as its RandomResizedCrop calls them."""
    from ffcv.libffcv import imdecode, resize_crop

    target = np.empty(shape, np.uint8)
    height, width = shape[:2]
    imdecode(source, target, height, width, height, width, 0, 0, 1, 1, False, False)
    for (left, top, right, bottom), square in zip(boxes, squares, strict=True):
        resize_crop(target, top, bottom, left, right, square)


def measure(files: list[bytes], recipe: str, *, repeats: int) -> dict[str, list[float]]:
    """Column -> ms of every image, the least of its repeats."""
    views = find_recipe(recipe).method.views()
    outs = [torch.empty(3, view.crop.size, view.crop.size, dtype=torch.uint8) for view in views.values()]
    squares = [np.empty((view.crop.size, view.crop.size, 3), np.uint8) for view in views.values()]
    decode, has_ffcv, draw = plain_decoder()[1], loader_status()["ffcv"][0], random.Random(0)
    times: dict[str, list[float]] = {column: [] for column in COLUMNS if column != "FFCV" or has_ffcv}
    for number, data in enumerate(files):
        scan = scan_jpeg(data)
        size, sample = np.array([[scan.width, scan.height]]), torch.tensor([number])
        boxes = [
            crop_boxes(crop_draws(sample, seed=0, epoch=0, position=position), size, view.crop)[0]
            for position, view in enumerate(views.values())
        ]
        whole, source = decode(data), np.frombuffer(data, np.uint8)

        calls: dict[str, Callable[[], Any]] = {
            "decode": partial(decode, data),
            "resize": partial(resize, whole, boxes, outs),
            "ours": partial(ours, data, boxes, outs),
            "through Pillow": partial(through_pillow, data, boxes, outs),
            "FFCV": partial(ffcv, source, whole.shape, boxes, squares),
        }
        taken: dict[str, list[float]] = {column: [] for column in times}
        for _ in range(repeats):
            for column in draw.sample(list(times), len(times)):
                started = time.thread_time()
                calls[column]()
                taken[column].append(1e3 * (time.thread_time() - started))
        for column, seconds in taken.items():
            times[column].append(min(seconds))
    return times


def summary(recipe: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Means and medians of ratios."""
    floor = [a + b for a, b in zip(times["decode"], times["resize"], strict=True)]

    def ratio(above: list[float], below: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)

    row: dict[str, Any] = {
        "recipe": recipe,
        "milliseconds": {column: round(statistics.mean(found), 3) for column, found in times.items()},
        "ours / (decode + resize)": ratio(times["ours"], floor),
        "through Pillow / ours": ratio(times["through Pillow"], times["ours"]),
    }
    if "FFCV" in times:
        row["FFCV / ours"] = ratio(times["FFCV"], times["ours"])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0]["milliseconds"])
    ratios = [key for key in rows[0] if " / " in key]
    lines = [f"| views | {' | '.join(f'{column}, ms' for column in columns)} | {' | '.join(ratios)} |"]
    lines.append(f"|---|{'---|' * (len(columns) + len(ratios))}")
    for row in rows:
        cells = [f"{row['milliseconds'][column]:.2f}" for column in columns] + [f"{row[key]:.2f}" for key in ratios]
        lines.append(f"| {row['recipe']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(argv)
    if why_pillow():
        sys.exit(f"JPEGs are decoded through Pillow here: {why_pillow()}")
    torch.set_num_threads(1)
    paths = (path for path in sorted(chosen.data.rglob("*")) if path.is_file())
    scans = ((data, scan_jpeg(data)) for data in (path.read_bytes() for path in paths))
    files = [data for data, scan in scans if scan.is_common and scan.orientation == 1 and len(scan.components) == 3]
    files = files[: chosen.images]
    if not files:
        parser.error(f"no JPEG in {chosen.data}")
    with quiet_pillow():
        rows = [summary(recipe, measure(files, recipe, repeats=chosen.repeats)) for recipe in RECIPES]
    facts = {
        "images": len(files),
        "mean_kilobytes": round(statistics.mean(map(len, files)) / 1e3, 1),
        "plain_decoder": plain_decoder()[0],
        "torch": str(torch.__version__),
        "rows": rows,
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "decode_floor.json").write_text(json.dumps(facts, indent=1) + "\n")
    (chosen.output / "decode_floor.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
