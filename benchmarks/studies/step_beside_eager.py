"""Samples/s of PIRL-jigsaw from image files to updated bank: sslfast beside a plain PyTorch trainer.

    python -m benchmarks.studies.step_beside_eager DATA -o OUT [--model resnet50] [--batch-size 32] [--negatives 4096]

Both train the same trunk on the same files with the same number of workers, negatives and samples per step, one after
the other in one process: sslfast with its defaults for the device (bf16 where there is bf16), and
``benchmarks/peers/eager_trainer.py`` in fp32 from PIL, DataLoader and eager gather NCE. The parts of sslfast's step are
those of ``sslfast bench step``. Writes OUT/step.json and OUT/step.md.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.eager_trainer import eager_steps
from sslfast.bench.step import measure_step
from sslfast.bench.timing import call_seconds, versions
from sslfast.data import Manifest
from sslfast.device import resolve_device
from sslfast.recipes import RECIPES
from sslfast.training import TrainConfig, Trainer

_WARM_UP = 2


def seconds_per_step(steps: Iterator[Any], device: torch.device, *, seconds: float) -> list[float]:
    """Times of single steps after a warm-up, for at least ``seconds`` and three steps."""
    for _ in range(_WARM_UP):
        next(steps)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(call_seconds(lambda: next(steps), device))
    return times


def sslfast_steps(config: TrainConfig, data: Path, folder: Path) -> Iterator[None]:
    """Train endlessly; yields after every step."""
    trainer = Trainer(config, data, folder, report=lambda _line: None)
    trainer.method.train()
    try:
        epoch = 0
        while True:
            batches = trainer.loader.epoch(epoch)
            for _ in range(trainer.steps_per_epoch):
                trainer.train_step(batches)
                yield
            epoch += 1
    finally:
        trainer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", choices=["resnet18", "resnet50"], default="resnet50")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each of the two trainers")
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    device = resolve_device(chosen.device)
    config = RECIPES["pirl-paper"]()
    config = replace(
        config,
        method=replace(config.method, num_negatives=chosen.negatives, loss="infonce"),
        model=replace(config.model, name=chosen.model),
        loader=replace(config.loader, workers=chosen.workers),
        batch_size=chosen.batch_size,
        device=str(device),
        tensorboard=False,
        progress="off",
    )
    manifest = Manifest.scan(chosen.data)
    files = [Path(manifest.root) / path for path in manifest.paths]
    with tempfile.TemporaryDirectory() as folder:
        ours = seconds_per_step(sslfast_steps(config, chosen.data, Path(folder)), device, seconds=chosen.seconds)
    theirs = seconds_per_step(
        eager_steps(
            files,
            chosen.model,
            batch_size=chosen.batch_size,
            num_negatives=chosen.negatives,
            workers=chosen.workers,
            device=device,
        ),
        device,
        seconds=chosen.seconds,
    )
    parts = measure_step(config, chosen.data, steps=5, rounds=3)
    rates = {name: chosen.batch_size / statistics.mean(times) for name, times in (("sslfast", ours), ("eager", theirs))}
    result = {
        "device": parts.device,
        **versions(),
        "settings": {key: str(value) for key, value in vars(chosen).items() if key not in ("data", "output")},
        "samples_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio": round(rates["sslfast"] / rates["eager"], 2),
        "steps": {"sslfast": len(ours), "eager": len(theirs)},
        "parts": parts.as_dict(),
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "step.json").write_text(json.dumps(result, indent=2) + "\n")
    table = (
        f"{parts.device}, torch {torch.__version__}; PIRL-jigsaw, {chosen.model}, batch {chosen.batch_size}, "
        f"{chosen.negatives} negatives, {chosen.workers} workers, {len(files)} files\n\n"
        "| trainer | samples/s |\n|---|---|\n"
        f"| sslfast ({parts.precision}) | {rates['sslfast']:.2f} |\n"
        f"| PIL, DataLoader, eager gather NCE, fp32 | {rates['eager']:.2f} |\n\nratio {result['ratio']:.2f}\n\n"
        "| part of sslfast's step, alone | ms |\n|---|---|\n"
        + "".join(f"| {name} | {1e3 * seconds:.1f} |\n" for name, seconds in parts.parts.items())
    )
    (chosen.output / "step.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
