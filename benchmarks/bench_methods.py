"""Pretrain every method on a labelled folder without its labels, evaluate, and write a table: real images, one budget.

    python benchmarks/bench_methods.py DATA -o OUT [--per-class 100] [--pretrain-per-class 30] [--epochs 48] [--seeds 0]

DATA holds train/<class>/ and val/<class>/. Every method gets the same images, epochs, trunk and augmentation; the
numbers are kNN and a linear probe on the frozen trunk, beside raw pixels and an untrained trunk. Finished runs in OUT
are kept, an interrupted one goes on, so the same command can be given again. Writes OUT/methods.md and methods.json.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sslfast.evaluation.knn import evaluate_knn
from sslfast.evaluation.linear import evaluate_linear
from sslfast.methods.pirl import PIRL
from sslfast.models.resnet import ResNetConfig
from sslfast.recipes.pirl import pirl_small
from sslfast.trainer import TrainConfig, Trainer

METHODS: dict[str, Callable[[PIRL.Config], PIRL.Config]] = {
    "NPID (λ = 0)": lambda method: replace(method, pretext_weight=0.0),
    "PIRL jigsaw": lambda method: replace(method, pretext="jigsaw"),
    "PIRL rotation": lambda method: replace(method, pretext="rotation"),
}


def subset(data: Path, target: Path, per_class: int) -> Path:
    """The first ``per_class`` training images of every class and all of val, as links."""
    for split, most in (("train", per_class), ("val", None)):
        for folder in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            (target / split / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.rglob("*.*"))[:most]:
                link = target / split / folder.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    return target


def budget(arguments: argparse.Namespace, seed: int) -> TrainConfig:
    """``pirl-small`` cut down to what a CPU can do in minutes; the cuts are options of this file."""
    config = pirl_small()
    method = config.method
    image = replace(method.image_view, crop=replace(method.image_view.crop, size=arguments.size))
    rotation = replace(method.rotation_view, crop=replace(method.rotation_view.crop, size=arguments.size))
    return replace(
        config,
        method=replace(method, image_view=image, rotation_view=rotation, temperature=arguments.temperature),
        model=ResNetConfig(name="resnet18", stem=arguments.stem),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        optim=replace(config.optim, lr_per_256_images=arguments.lr, final_lr_per_256_images=arguments.lr / 1000),
        loader=replace(config.loader, workers=arguments.workers),
        seed=seed,
        tensorboard=False,
        checkpoint_every_steps=200,
        keep_checkpoints=1,
        progress="plain",
        log_every_steps=20,
    )


def run(config: TrainConfig, few: Path, data: Path, output: Path) -> dict[str, Any]:
    """Pretrains (or goes on, or finds it done) and evaluates one method."""
    done = output / "result.json"
    if done.exists():
        result: dict[str, Any] = json.loads(done.read_text())
        return result
    start = time.monotonic()
    Trainer(config, few, output).fit()
    minutes = (time.monotonic() - start) / 60
    result = {
        "minutes": round(minutes, 1),
        "knn": evaluate_knn(output, data),
        "linear": evaluate_linear(output, data),
    }
    done.write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=100, help="training images of a class for the evaluations")
    parser.add_argument("--pretrain-per-class", type=int, default=30, help="of them, how many are pretrained on")
    parser.add_argument("--epochs", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=48, help="side of the image crop")
    parser.add_argument("--stem", choices=["imagenet", "small"], default="imagenet")
    parser.add_argument("--lr", type=float, default=0.36, help="learning rate per 256 images")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()

    data = subset(arguments.data, arguments.output / "data", arguments.per_class)
    few = subset(arguments.data, arguments.output / "pretraining", arguments.pretrain_per_class) / "train"
    results: dict[str, dict[int, Any]] = {}
    for seed in arguments.seeds:
        for name in arguments.methods:
            config = budget(arguments, seed)
            config = replace(config, recipe=f"bench-{name}", method=METHODS[name](config.method))
            folder = "".join(c if c.isalnum() else "-" for c in name).strip("-")
            results.setdefault(name, {})[seed] = run(config, few, data, arguments.output / f"{folder}-seed{seed}")
            report(results, arguments)


def report(results: dict[str, dict[int, Any]], arguments: argparse.Namespace) -> None:
    """Writes the table of what is there so far."""
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("data", "output")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    (arguments.output / "methods.json").write_text(
        json.dumps({"settings": settings, "device": device, "results": results}, indent=2) + "\n"
    )
    table = render(results)
    text = f"{device}; torch {torch.__version__}; settings {settings}\n\n{table}\n"
    (arguments.output / "methods.md").write_text(text)
    print(text, flush=True)


def top1(result: dict[str, Any], encoder: str) -> list[float]:
    """kNN for every k, then linear, in percent."""
    rows = [row for kind in ("knn", "linear") for row in result[kind]["results"] if row["encoder"] == encoder]
    return [100 * row["top1"] for row in rows]


def render(results: dict[str, dict[int, Any]]) -> str:
    """Encoders down; kNN for every k and the linear probe across: mean and, for several seeds, spread."""
    first = next(iter(next(iter(results.values())).values()))
    ks = first["knn"]["k"]
    lines = [
        "| encoder | seeds | " + " | ".join(f"kNN k={k}" for k in ks) + " | linear | pretraining |",
        "|---|---|" + "---|" * (len(ks) + 2),
    ]
    cells: dict[str, list[list[float]]] = {
        "raw pixels": [top1(first, "raw pixels")],
        "untrained": [top1(result, "untrained") for result in next(iter(results.values())).values()],
    }
    minutes = {"raw pixels": "–", "untrained": "–"}
    for name, runs in results.items():
        cells[name] = [top1(result, "trained") for result in runs.values()]
        minutes[name] = f"{sum(result['minutes'] for result in runs.values()) / len(runs):.1f} min"
    for name, values in cells.items():
        columns = torch.tensor(values)
        spread = columns.std(0) if len(values) > 1 else None
        words = [
            f"{mean:.1f}" + ("" if spread is None else f" ± {spread[i]:.1f}") for i, mean in enumerate(columns.mean(0))
        ]
        lines.append(f"| {name} | {len(values)} | " + " | ".join(words) + f" | {minutes[name]} |")
    data = first["knn"]["data"]
    lines.append("")
    lines.append(
        f"Top-1 in percent; {data['classes']} classes, {data['train']['images']:,} training and "
        f"{data['val']['images']:,} validation images; standard error of one number about "
        f"{100 * first['knn']['results'][0]['top1_standard_error']:.1f}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
