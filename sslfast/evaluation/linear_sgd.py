"""Linear classifiers on layers of frozen trunks, trained by SGD on augmented images: ``linear-goyal``, ``linear-moco``.

Every batch passes each trunk once; the classifiers of all its layers train on it together. Each has a loss of its own
and no weight in common with another, so together is the same as one after the other.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.data import Manifest, OnBadImage
from sslfast.device import resolve_precision
from sslfast.distributed import gather_rows
from sslfast.evaluation.encoders import TrunkEncoder, load_run, trunk_encoders
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.folders import load_manifests
from sslfast.evaluation.pools import pooled_layers
from sslfast.evaluation.results import data_facts, mean_and_spread, run_facts, standard_error, write_result
from sslfast.evaluation.sgd import Progress, SGDProtocol, TrainingImages, check_training, count_hits
from sslfast.models import seeded
from sslfast.optim import set_learning_rate
from sslfast.runs import versions

PLAIN = "-plain"
"""A layer's name with this has no BatchNorm before its classifier."""


class Heads(nn.Module):
    """One linear classifier per encoder and layer, behind BatchNorm unless the layer is plain.

    Args:
        shapes: ``encoder/layer`` -> pooled map ``(C, h, w)``.
        classes: columns of each classifier.
        seed: of the initial weights, normal with deviation 0.01; biases are 0.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, classes: int, seed: int) -> None:
        super().__init__()
        self.names = list(shapes)
        heads = []
        for name, (channels, height, width) in shapes.items():
            with seeded(seed):
                linear = nn.Linear(channels * height * width, classes)
                nn.init.normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)
            norm: list[nn.Module] = [] if name.endswith(PLAIN) else [nn.BatchNorm2d(channels)]
            heads.append(nn.Sequential(*norm, nn.Flatten(), linear))
        self.heads = nn.ModuleList(heads)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits ``[B, classes]`` by name of pooled maps ``[B, C, h, w]`` by name."""
        return {name: head(maps[name]) for name, head in zip(self.names, self.heads, strict=True)}


class FrozenMaps:
    """Pooled maps of several trunks, which never change; float32."""

    def __init__(
        self,
        encoders: Mapping[str, TrunkEncoder],
        layers: Sequence[str],
        *,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self.encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
        self.layers = list(layers)
        self.pools = list(dict.fromkeys(layer.removesuffix(PLAIN) for layer in layers))
        self.device, self.precision = device, precision

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """``encoder/layer`` -> ``[B, C, h, w]`` of uint8 images."""
        found = {}
        for name, encoder in self.encoders.items():
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                pooled = pooled_layers(encoder.trunk, encoder.prepare(images), self.pools)
            found.update({f"{name}/{layer}": pooled[layer.removesuffix(PLAIN)].float() for layer in self.layers})
        return found


def train_heads(
    maps: FrozenMaps,
    images: TrainingImages,
    protocol: SGDProtocol,
    *,
    size: int,
    classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Heads:
    """Train all classifiers in one pass per epoch.

    Under several processes every rank makes the maps of its part of a batch, gathers those of all, and takes the same
    step: BatchNorm sees the whole batch, and the result is that of one process.

    Raises:
        ValueError: a loss that is not finite, naming the classifier.
    """
    shapes = {name: value.shape[1:] for name, value in maps(_blank(size, maps.device)).items()}
    heads = Heads(shapes, classes=classes, seed=seed).to(maps.device).train()
    optimizer = protocol.optimizer(heads, batch_size=batch_size)
    for epoch in range(progress.load(heads, optimizer), epochs):
        set_learning_rate(optimizer, protocol.learning_rate(epoch, epochs=epochs, batch_size=batch_size))
        losses: dict[str, Tensor] = {}
        for crops, labels in images.epoch(epoch):
            all_labels = gather_rows(labels)
            logits = heads({name: gather_rows(value) for name, value in maps(crops).items()})
            losses = {name: cross_entropy(value, all_labels) for name, value in logits.items()}
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        check_finite(losses, epoch)
        progress.save(heads, optimizer, epoch + 1)
    return heads.eval()


def check_finite(losses: Mapping[str, Tensor], epoch: int) -> None:
    """ValueError where the last loss of an epoch is not finite."""
    for name, loss in losses.items():
        if not bool(loss.isfinite()):  # host sync: once an epoch
            raise ValueError(
                f"the loss of {name} is {loss.item()} after epoch {epoch + 1}: the features are not finite, or far too "
                "large for this protocol's learning rate; use --protocol probe"
            )


def evaluate_heads(
    run: Path,
    data: Path,
    protocol: SGDProtocol,
    *,
    layers: Sequence[str],
    encoders: Sequence[str],
    epochs: int | None,
    batch_size: int,
    seeds: Sequence[int],
    size: int | None,
    precision: str,
    workers: int,
    device: torch.device,
    on_bad_image: OnBadImage,
    output: Path,
) -> dict[str, Any]:
    """Train and judge the classifiers of a protocol; see :func:`sslfast.evaluation.linear_probe.evaluate_linear`."""
    epochs = protocol.epochs if epochs is None else epochs
    check_training(epochs, batch_size, seeds)
    layers = tuple(layers) or protocol.layers
    unknown = [layer for layer in layers if layer not in protocol.layers]
    if unknown:
        raise ValueError(f"layers of {protocol.name} must be some of {', '.join(protocol.layers)}, got {unknown[0]!r}")
    manifests = load_manifests(data, on_bad_image=on_bad_image)
    loaded = load_run(run)
    chosen = trunk_encoders(loaded, encoders)
    size = loaded.size if size is None else size
    reader = ImageReader(manifests[1], size, batch_size, workers, on_bad_image)
    maps = FrozenMaps(chosen, layers, device=device, precision=resolve_precision(precision, device))
    facts = {
        **run_facts(run, loaded, size),
        **protocol.facts(epochs, batch_size),
        "precision": str(maps.precision).removeprefix("torch."),
        "seeds": list(seeds),
        "source": protocol.source,
    }
    name = protocol.full_name(epochs)
    scores: dict[str, list[tuple[float, float]]] = {}
    count = 0
    for seed in seeds:
        progress = Progress(
            output.with_name(f"{output.stem}-seed{seed}.partial.pt"),
            {**facts, "seeds": seed, "layers": layers, "encoders": encoders, "data": manifests[0].digest()},
        )
        images = TrainingImages(
            manifests[0],
            size=size,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            on_bad_image=on_bad_image,
            device=device,
        )
        with closing(images):
            heads = train_heads(
                maps,
                images,
                protocol,
                size=size,
                classes=len(manifests[0].classes),
                epochs=epochs,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        found, count = judge(maps, heads, reader, manifests[1])
        for key, pair in found.items():
            scores.setdefault(key, []).append(pair)
    rows = [
        {
            "encoder": key.partition("/")[0],
            "layer": key.partition("/")[2],
            "protocol": f"{name}-{key.partition('/')[2]}",
            **score_row(pairs, count),
        }
        for key, pairs in scores.items()
    ]
    best = {encoder: max((r for r in rows if r["encoder"] == encoder), key=lambda r: r["top1"]) for encoder in chosen}
    result = {
        "protocol": name,
        "results": rows,
        "best": [{**row, "protocol": f"{name}-best-of-{len(layers)}"} for row in best.values()],
        **facts,
        "data": data_facts(data, manifests, [len(manifests[0]), count]),
        "versions": versions(),
    }
    write_result(result, output)
    for seed in seeds:
        Progress(output.with_name(f"{output.stem}-seed{seed}.partial.pt"), {}).remove()
    return result


def judge(
    maps: FrozenMaps, heads: Heads, reader: ImageReader, manifest: Manifest
) -> tuple[dict[str, tuple[float, float]], int]:
    """Top-1 and top-5 of every classifier on centre crops, and the number of images."""
    labels = torch.from_numpy(manifest.labels)
    return count_hits(lambda images: heads(maps(images)), heads.names, reader, labels, maps.device)


def score_row(pairs: Sequence[tuple[float, float]], count: int) -> dict[str, Any]:
    """Mean top-1 and top-5 over seeds, their spread and the binomial standard error on ``count`` images."""
    top1, spread1 = mean_and_spread([pair[0] for pair in pairs])
    top5, spread5 = mean_and_spread([pair[1] for pair in pairs])
    return {
        "top1": top1,
        "top1_standard_error": standard_error(top1, count),
        "top1_spread": spread1,
        "top5": top5,
        "top5_standard_error": standard_error(top5, count),
        "top5_spread": spread5,
        "top1_of_seeds": [pair[0] for pair in pairs],
        "top5_of_seeds": [pair[1] for pair in pairs],
    }


def _blank(size: int, device: torch.device) -> Tensor:
    return torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
