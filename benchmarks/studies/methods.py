"""Pretrain every method on a labelled folder without its labels, evaluate, and write a table: real images, one budget.

    python -m benchmarks.studies.methods DATA -o OUT [--epochs 100] [--pretrain-per-class 500] [--methods pirl ...]

DATA holds train/<class>/ and val/<class>/, images of about 64 px. Every method trains the same trunk on the same images
for the same epochs, by its recipe NAME-small; its loss, head, views, batch size and learning rate are its own. The
numbers are kNN and a linear probe on the frozen trunk's pooled res5, and the probe on pooled res3 and res4 (pretext
tasks are often best before the last stage, where published numbers are taken), beside raw pixels, the untrained trunk
and the same trunk trained with labels. Finished runs in OUT are kept and an interrupted one is resumed: give the same
command again, and commands for other methods beside it. Writes OUT/methods.md, methods.json and methods.png;
the order of methods is that of the results.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.bench.charts import draw_bars
from sslfast.config import save_json
from sslfast.evaluation import (
    RAW_PIXELS,
    TRAINED,
    UNTRAINED,
    Encoder,
    TrunkEncoder,
    knn_result,
    linear_result,
    load_evaluation_set,
)
from sslfast.methods import BaseConfig, Method, MethodContext, register_method
from sslfast.models import build_trunk, seeded
from sslfast.optim import OptimConfig
from sslfast.recipes import RECIPES
from sslfast.training import TrainConfig, Trainer
from sslfast.views import View, ViewConfig

SUPERVISED = "supervised"
STAGES = ("res3", "res4")
METHODS = [name.removesuffix("-small") for name in RECIPES if name.endswith("-small")]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pirl-rotation": ("pirl", {"pretext": "rotation"}),
    "super-resolution-perceptual": ("super-resolution", {"perceptual_weight": 1.0}),
    # For a few thousand images, of which each of 250 clusters would have 16.
    "deepcluster-50": ("deepcluster", {"clusters": 50, "pca_dimensions": 32, "every_epochs": 1}),
    # 16 adjacent patches in place of 49 overlapping ones: a third of the time, for CPUs.
    "cpc-4x4": ("cpc", {"patch_stride": 16, "first_step": 1, "last_step": 3}),
}
"""Further rows of the table: recipe and changed fields of its method."""


@register_method
class Supervised(Method):
    """Cross-entropy with the folders' labels on the image view: supervised training at the same budget."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        name: ClassVar[str] = SUPERVISED

        image_view: ViewConfig = field(default_factory=lambda: RECIPES["pirl-small"]().method.image_view)
        classes: int = 1

        def build(self, context: MethodContext) -> "Supervised":
            return Supervised(self, context)

    labels: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.classifier = nn.Linear(self.trunk.out_features, config.classes)
        self.register_buffer("labels", torch.zeros(context.num_rows, dtype=torch.int64))

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        logits = self.classifier(self.trunk(views["image"].pixels)).float()
        labels = self.labels[sample_ids]
        return {"loss": cross_entropy(logits, labels), "top1": (logits.argmax(1) == labels).float().mean()}


def subset(data: Path, target: Path, per_class: int) -> Path:
    """The first ``per_class`` training images of every class and all of val, as links."""
    for split, most in (("train", per_class), ("val", None)):
        for folder in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            (target / split / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.rglob("*.*"))[:most]:
                link = target / split / folder.name / image.name
                with suppress(FileExistsError):  # of an earlier or a concurrent command
                    link.symlink_to(image.resolve())
    return target


def budget(name: str, arguments: argparse.Namespace, *, seed: int, classes: int) -> TrainConfig:
    """The method's small recipe with the budget of this benchmark."""
    recipe, changes = VARIANTS.get(name, (name, {}))
    if name == SUPERVISED:
        config = replace(RECIPES["pirl-small"](), method=Supervised.Config(classes=classes))
    else:
        config = RECIPES[f"{recipe}-small"]()
        config = replace(config, method=replace(config.method, **changes))
    method = with_crops_of(config.method, arguments.crop_size)
    return replace(
        config,
        method=method,
        recipe=f"bench-{name}",
        model=replace(config.model, name=arguments.model, stem=arguments.stem, width=arguments.width),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size or config.batch_size,
        optim=optimizer(config.optim, arguments, batch_size=arguments.batch_size or config.batch_size),
        loader=replace(config.loader, workers=arguments.workers),
        seed=seed,
        channels_last=True,  # the same function; faster on GPUs and, with narrow trunks, on CPUs
        tensorboard=False,
        checkpoint_every_steps=200,
        keep_checkpoints=1,
        progress="plain",
        log_every_steps=50,
    )


def with_crops_of(method: BaseConfig, size: int) -> BaseConfig:
    """Every view's crop and its jigsaw's patches scaled from the small recipes' 64 px to ``size``."""

    def scaled(view: ViewConfig) -> ViewConfig:
        crop, jigsaw = view.crop.size * size // 64, view.jigsaw
        if jigsaw is not None:
            crop -= crop % jigsaw.grid
            jigsaw = replace(jigsaw, patch_size=max(1, jigsaw.patch_size * size // 64))
        return replace(view, crop=replace(view.crop, size=crop), jigsaw=jigsaw)

    views = {item.name: getattr(method, item.name) for item in fields(method)}
    return replace(method, **{name: scaled(view) for name, view in views.items() if isinstance(view, ViewConfig)})


def optimizer(recipe: OptimConfig, arguments: argparse.Namespace, *, batch_size: int) -> OptimConfig:
    """The recipe's with its learning rate scaled, or AdamW."""
    if arguments.adamw is None:
        return replace(
            recipe,
            lr_per_256_images=arguments.lr_scale * recipe.lr_per_256_images,
            final_lr_per_256_images=arguments.lr_scale * recipe.final_lr_per_256_images,
        )
    return OptimConfig(
        name="adamw",
        lr_per_256_images=arguments.adamw * 256 / batch_size,
        final_lr_per_256_images=0.0,
        lr_update="step",
        warmup_epochs=min(1.0, arguments.epochs / 10),
        weight_decay=0.05,
    )


def run(name: str, arguments: argparse.Namespace, *, seed: int, few: Path, data: Path, output: Path) -> None:
    """Pretrains and evaluates one method, resuming a run that was interrupted; does nothing for one that is done."""
    done = output / "result.json"
    if done.exists():
        return
    classes = len([path for path in few.iterdir() if path.is_dir()])
    start = time.monotonic()
    trainer = Trainer(budget(name, arguments, seed=seed, classes=classes), few, output)
    if isinstance(trainer.method, Supervised):
        assert trainer.manifest is not None
        trainer.method.labels.copy_(torch.as_tensor(trainer.manifest.labels))
    trained = trainer.fit()
    optim = trainer.config.optim
    result = {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "samples_per_second": trained.samples_per_second,
        "batch_size": trainer.config.batch_size,
        "optimizer": f"{optim.name} {optim.lr_per_256_images * trainer.config.batch_size / 256:.2g}",
        "loss": trained.metrics.get("loss"),
        **evaluate(output, data, {TRAINED: TRAINED}),
    }
    save_json(done, result)


def baselines(name: str, *, seed: int, data: Path, output: Path) -> None:
    """Raw pixels and the untrained trunk, once per seed; once more for methods with another trunk: colorization's sees
    lightness only, CPC's has layer normalisation."""
    base = "pirl" if name == SUPERVISED else VARIANTS.get(name, (name,))[0]
    recipe = RECIPES[f"{base}-small"]()
    kind: list[str] = [recipe.method.trunk_input] if recipe.method.trunk_input != "rgb" else []
    kind += [f"{recipe.model.norm} norm"] if recipe.model.norm != "batch" else []
    file = output.parent / f"baselines-{'-'.join(kind or ['usual']).replace(' ', '-')}-seed{seed}.json"
    if not file.exists():
        names = {UNTRAINED: ", ".join([UNTRAINED, *kind])} | ({} if kind else {RAW_PIXELS: RAW_PIXELS})
        save_json(file, evaluate(output, data, names))


class Stages:
    """A trunk as an encoder of the concatenated spatial means of res3, res4 and res5, from one pass."""

    def __init__(self, encoder: TrunkEncoder) -> None:
        self.encoder = encoder

    def to(self, device: torch.device) -> "Stages":
        self.encoder.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        maps: list[Tensor] = self.encoder.trunk.stages(self.encoder.prepare(images))  # type: ignore[operator]
        return torch.cat([part.float().mean((2, 3)) for part in maps[-3:]], dim=1)

    def identity(self) -> dict[str, Any]:
        return {**self.encoder.identity(), "stages": [*STAGES, "res5"]}

    @staticmethod
    def split(features: Tensor) -> tuple[Tensor, ...]:
        """The parts of res3, res4 and res5: each has twice the columns of the one before."""
        first = features.shape[1] // 7
        return features.split([first, 2 * first, 4 * first], dim=1)


def evaluate(run: Path, data: Path, encoders: dict[str, str]) -> dict[str, Any]:
    """kNN and linear probe of a run's encoders (name there -> name in the table), and the probe on res3 and res4."""

    def chosen(known: Mapping[str, Encoder]) -> dict[str, Encoder]:
        found = {shown: known[name] for name, shown in encoders.items()}
        return {name: Stages(e) if isinstance(e, TrunkEncoder) else e for name, e in found.items()}

    evaluation = load_evaluation_set(run, data, encoders=chosen)
    late: list[dict[str, Tensor]] = []
    early: list[dict[str, Tensor]] = []
    for part in (evaluation.train, evaluation.val):
        stages = {name: Stages.split(values) for name, values in part.items() if name != RAW_PIXELS}
        late.append({name: stages[name][-1] if name in stages else values for name, values in part.items()})
        early.append({f"{name} {s}": stages[name][i] for name in stages for i, s in enumerate(STAGES)})
    evaluation = replace(evaluation, train=late[0], val=late[1])
    return {
        "knn": knn_result(evaluation),
        "linear": linear_result(evaluation),
        "stages": linear_result(replace(evaluation, train=early[0], val=early[1]))["results"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*METHODS, *VARIANTS, SUPERVISED]
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=500, help="training images of a class for the evaluations")
    parser.add_argument("--pretrain-per-class", type=int, default=500, help="of them, how many are pretrained on")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="default: each recipe's")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="factor on every recipe's learning rate")
    parser.add_argument("--adamw", type=float, metavar="RATE", help="AdamW for every method in place of its recipe's")
    parser.add_argument("--model", choices=["resnet18", "resnet50"], default="resnet18")
    parser.add_argument("--stem", choices=["imagenet", "small"], default="small")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the trunk's channels")
    parser.add_argument("--crop-size", type=int, default=64, help="side of the global crops, in pixels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    arguments = parser.parse_args(argv)

    data = subset(arguments.data, arguments.output / "data", arguments.per_class)
    few = subset(arguments.data, arguments.output / "pretraining", arguments.pretrain_per_class) / "train"
    for seed in arguments.seeds:
        for name in arguments.methods:
            output = arguments.output / f"{name}-seed{seed}"
            run(name, arguments, seed=seed, few=few, data=data, output=output)
            baselines(name, seed=seed, data=data, output=output)
            report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Writes the table and the chart of all finished runs in OUT."""
    results: dict[str, dict[int, Any]] = {}
    for file in sorted(arguments.output.glob("*-seed*/result.json")):
        name, _, seed = file.parent.name.rpartition("-seed")
        results.setdefault(name, {})[int(seed)] = json.loads(file.read_text())
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("data", "output")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    others: dict[int, list[Any]] = {}
    for file in sorted(arguments.output.glob("baselines-*-seed*.json")):
        others.setdefault(int(file.stem.rpartition("-seed")[2]), []).append(json.loads(file.read_text()))
    facts = {"settings": settings, "device": device, "baselines": others, "results": results}
    (arguments.output / "methods.json").write_text(json.dumps(facts, indent=2) + "\n")
    table = render(results, others)
    text = f"{device}; torch {torch.__version__}; settings {settings}\n\n{table}\n"
    (arguments.output / "methods.md").write_text(text)
    columns = lines(results, others)
    draw_bars(
        {name: mean(row["linear"]) for name, row in columns.items()},
        arguments.output / "methods.png",
        title=f"linear probe, top-1, {arguments.epochs} epochs",
        unit="%",
    )
    print(text, flush=True)


def lines(results: dict[str, dict[int, Any]], baselines: dict[int, list[Any]]) -> dict[str, dict[str, list[float]]]:
    """Encoder -> column -> values over seeds, in percent; the best linear probe first, baselines among them."""
    found: dict[str, dict[str, list[float]]] = {}
    runs = [("", result) for parts in baselines.values() for result in parts]
    runs += [(name, result) for name, seeds in results.items() for result in seeds.values()]
    for method, result in runs:
        for row in result["knn"]["results"] + result["linear"]["results"] + result["stages"]:
            encoder, _, stage = row["encoder"].rpartition(" ")
            is_stage = stage in STAGES
            column = f"kNN k={row['k']}" if "k" in row else f"linear, {stage}" if is_stage else "linear"
            name = method or (encoder if is_stage else row["encoder"])
            found.setdefault(name, {}).setdefault(column, []).append(100 * row["top1"])
    return dict(sorted(found.items(), key=lambda item: -mean(item[1]["linear"])))


def render(results: dict[str, dict[int, Any]], baselines: dict[int, list[Any]]) -> str:
    """Encoders down, measures across: mean and, for several seeds, its standard error."""
    columns = lines(results, baselines)
    names = list(next(iter(columns[name] for name in columns if name in results)))
    header = ["encoder", "seeds", *names, "optimizer", "loss", "samples/s", "minutes"]
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for encoder, values in columns.items():
        words = [
            "–"
            if name not in values
            else f"{mean(values[name]):.1f}"
            + (f" ± {stdev(values[name]) / len(values[name]) ** 0.5:.1f}" if len(values[name]) > 1 else "")
            for name in names
        ]
        runs = list(results.get(encoder, {}).values())
        cost = ["–"] * 4
        if runs:
            cost = [runs[0]["optimizer"], f"{mean(r['loss'] for r in runs):.2f}"]
            cost += [f"{mean(r[key] for r in runs):,.1f}" for key in ("samples_per_second", "minutes")]
        text.append(f"| {' | '.join([encoder, str(len(values[names[0]])), *words, *cost])} |")
    first = next(iter(baselines.values()))[0]["knn"]
    text += [
        "",
        f"Top-1 in percent; optimizer: its name and first rate; {first['data']['classes']} classes, "
        f"{first['data']['train']['images']:,} training and {first['data']['val']['images']:,} validation images; "
        "standard error of one number from the validation images alone about "
        f"{100 * first['results'][0]['top1_standard_error']:.1f}.",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main()
