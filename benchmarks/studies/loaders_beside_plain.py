"""Samples/s of every loader beside the pipeline from its library's own documentation, on the same files.

    python -m benchmarks.studies.loaders_beside_plain [DATA] -o OUT [--beton DATA.beton] [--cores 1 2] [--device cpu]

DATA is a folder of class folders; without it OUT/images is written from photographs that ship with scikit-image and
scikit-learn, cropped and re-encoded as JPEGs of ImageNet's common sizes. Every measurement is a process of its own on
the first ``cores`` CPU cores, with as many workers: batches of float32 views, mirrored and normalised, from files in
the page cache.

- ``crop``: one 224-pixel crop.
- ``pirl``: that crop, and nine shuffled 64-pixel patches of a second crop of 255 pixels.
- ``rotation``: the crop turned by quarter turns.

The plain pipelines are in ``benchmarks/peers/plain_loaders.py``. Loaders whose library is missing are left out and
named; measurements already in OUT/loaders.json are kept, so that several environments can fill one table.
Writes OUT/loaders.json, loaders.md and loaders.png.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.peers.plain_loaders import KINDS, PIPELINES
from sslfast.bench.charts import draw_bars
from sslfast.bench.loader import measure_batches, measure_loader
from sslfast.data import available_cores, open_data
from sslfast.device import resolve_device
from sslfast.loaders import loader_status
from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, ViewConfig

BATCH = 32
SIZES = ((500, 375), (375, 500), (500, 333), (333, 500), (640, 480))
PAIRS = {"pillow": "torchvision", "dali": "dali", "ffcv": "ffcv"}
"""Loader of sslfast -> plain pipeline that reads with the same library."""


def views(kind: str) -> dict[str, ViewConfig]:
    """The kinds of ``plain_loaders`` as view configurations of sslfast."""
    plain = AugmentConfig(jitter_probability=0.0, grayscale_probability=0.0)
    image = ViewConfig(crop=CropConfig(size=224), rotation=kind == "rotation", augment=plain)
    square = ViewConfig(crop=CropConfig(size=255, scale=(0.6, 1.0)), jigsaw=JigsawConfig(), augment=plain)
    return {"image": image, "patches": square} if kind == "pirl" else {"image": image}


def measure(line: dict[str, Any], *, data: Path, beton: Path | None, seconds: float, device: torch.device) -> Any:
    """One measurement: rate, cores, memory."""
    library, kind, cores = line["library"], line["kind"], line["processors"]
    source = beton if library == "ffcv" else data
    assert source is not None
    if line["plain"]:
        batches = PIPELINES[PAIRS[library]](source, kind, batch_size=BATCH, workers=cores, device=device)
        return measure_batches(lambda: (batches, batches.close), batch_size=BATCH, seconds=seconds, device=device)
    manifest = open_data(source, on_bad_image="skip")
    return measure_loader(
        library, manifest, views(kind), batch_size=BATCH, workers=cores, seconds=seconds, device=device, render=True,
        dtype=torch.float32,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--beton", type=Path, help="the same images as `sslfast data prepare` writes them, for ffcv")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, 2, available_cores()}))
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--libraries", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--line", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    device = resolve_device(chosen.device)
    if chosen.line is not None:
        torch.set_num_threads(chosen.line["processors"])
        line = measure(chosen.line, data=chosen.data, beton=chosen.beton, seconds=chosen.seconds, device=device)
        print(json.dumps(line))
        return
    if max(chosen.cores) > available_cores():
        parser.error(f"--cores {max(chosen.cores)}: this process may run on {available_cores()}")
    chosen.output.mkdir(parents=True, exist_ok=True)
    data = chosen.data or photographs(chosen.output / "images")
    file = chosen.output / "loaders.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for library in usable(chosen.libraries, chosen.beton):
        for cores in chosen.cores:
            for kind in chosen.kinds:
                for plain in (False, True):
                    line = {"library": library, "plain": plain, "kind": kind, "processors": cores}
                    line["device"] = device.type
                    if any(line.items() <= row.items() for row in rows):
                        continue
                    rows.append(line | in_child(line, data, chosen))
                    report(rows, chosen.output, device)


def photographs(folder: Path, count: int = 384) -> Path:
    """``folder/all`` with ``count`` JPEGs."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), *load_sample_images().images]
    draw = random.Random(0)
    (folder / "all").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = Image.fromarray(pictures[index % len(pictures)])
        width, height = SIZES[index % len(SIZES)]
        scale = draw.uniform(0.6, 1.0) * min(picture.width / width, picture.height / height)
        left = draw.uniform(0, picture.width - scale * width)
        top = draw.uniform(0, picture.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        cut = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
        cut.save(folder / "all" / f"{index:03}.jpg", quality=90)
    return folder


def usable(libraries: list[str], beton: Path | None) -> list[str]:
    """The libraries that import and have data; the others are printed with the reason."""
    found = []
    for library in libraries:
        is_usable, reason, remedy = loader_status()[library]
        if not is_usable:
            print(f"{library} left out: {reason}; {remedy}", file=sys.stderr)
        elif library == "ffcv" and beton is None:
            print("ffcv left out: give --beton, which `sslfast data prepare DATA DATA.beton` writes", file=sys.stderr)
        else:
            found.append(library)
    return found


def in_child(line: dict[str, Any], data: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run ``measure`` in a process pinned to the first CPU cores, as many as the measurement asks for."""
    cores = line["processors"]
    processors = ",".join(str(processor) for processor in sorted(os.sched_getaffinity(0))[:cores])
    command = [
        "taskset",
        "--cpu-list",
        processors,
        sys.executable,
        "-m",
        "benchmarks.studies.loaders_beside_plain",
        str(data),
    ]
    command += ["-o", str(chosen.output), "--seconds", str(chosen.seconds), "--device", chosen.device]
    command += ["--beton", str(chosen.beton)] if chosen.beton else []
    command += ["--line", json.dumps(line)]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def report(rows: list[dict[str, Any]], output: Path, device: torch.device) -> None:
    """Write JSON, table and chart of all measurements so far."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {"device": where, "torch": str(torch.__version__), "batch_size": BATCH, "rows": rows}
    (output / "loaders.json").write_text(json.dumps(facts, indent=2) + "\n")
    text = table(rows)
    (output / "loaders.md").write_text(text + "\n")
    most = max(row["processors"] for row in rows)
    rates = {name_of(row): row["samples_per_second"] for row in rows if row["processors"] == most}
    draw_bars(rates, output / "loaders.png", title=f"{where}, {most} cores: samples/s", unit="/s", highlight="sslfast")
    print(text, flush=True)


def name_of(row: dict[str, Any]) -> str:
    owner = f"plain {PAIRS[row['library']]}" if row["plain"] else f"sslfast {row['library']}"
    return f"{owner}, {row['kind']}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows: kinds and numbers of cores; columns: each library's sslfast loader, plain pipeline and their ratio."""
    libraries = [library for library in PAIRS if any(row["library"] == library for row in rows)]
    header = ["views", "cores"]
    for library in libraries:
        header += [f"sslfast {library}", f"plain {PAIRS[library]}", "ratio"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    rates = {(r["library"], r["plain"], r["kind"], r["processors"]): r["samples_per_second"] for r in rows}
    for kind in KINDS:
        for cores in sorted({row["processors"] for row in rows}):
            if not any(row["kind"] == kind and row["processors"] == cores for row in rows):
                continue
            cells = [kind, str(cores)]
            for library in libraries:
                ours, plain = (rates.get((library, side, kind, cores)) for side in (False, True))
                cells += ["–" if rate is None else f"{rate:,.0f}" for rate in (ours, plain)]
                cells.append(f"{ours / plain:.2f}" if ours and plain else "–")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
