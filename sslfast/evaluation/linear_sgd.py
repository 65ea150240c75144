"""Linear classifiers on layers of frozen trunks, trained by SGD on augmented images: ``linear-goyal``, ``linear-moco``.

Every batch passes through each trunk once, and the classifiers of all its layers train on it at the same time. They
share no weights and each has its own loss, so the result is the same as training them one after the other.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.data import Manifest
from sslfast.distributed import convert_sync_batchnorm, mean_over_ranks, replicate, world_size
from sslfast.evaluation.encoders import TrunkEncoder
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.sgd import ResumeState, SGDProtocol, TrainingImages, check_finite, count_hits
from sslfast.models import seeded
from sslfast.optim import set_learning_rate

PLAIN = "-plain"
"""Suffix of layers without BatchNorm before the classifier."""


class Heads(nn.Module):
    """One linear classifier per encoder and layer, with BatchNorm before it unless the layer is plain.

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
    """Pooled maps of several frozen trunks, float32."""

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
                pooled = encoder.layers(images, self.pools)
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
    resume: ResumeState,
) -> Heads:
    """Train all classifiers at the same time, one pass over the images per epoch.

    With several processes each rank works on its part of a batch, trunk and classifiers alike: BatchNorm normalises
    with the statistics of the whole batch and gradients are averaged, so the result is that of one process but for
    rounding.

    Raises:
        ValueError: a loss that is not finite, naming the classifier.
    """
    shapes = {name: value.shape[1:] for name, value in maps(_blank(size, maps.device)).items()}
    heads = Heads(shapes, classes=classes, seed=seed).to(maps.device).train()
    if world_size() > 1:
        convert_sync_batchnorm(heads, maps.device)
    optimizer = protocol.optimizer(heads, batch_size=batch_size)
    start = resume.load(heads, optimizer)
    replica = replicate(heads, maps.device)
    for epoch in range(start, epochs):
        set_learning_rate(optimizer, protocol.learning_rate(epoch, epochs=epochs, batch_size=batch_size))
        losses: dict[str, Tensor] = {}
        for crops, labels in images.epoch(epoch):
            losses = {name: cross_entropy(value, labels) for name, value in replica(maps(crops)).items()}
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        means = {name: mean_over_ranks(loss.detach()) for name, loss in losses.items()}
        check_finite(means, epoch, remedy="use --protocol probe")
        resume.save(heads, optimizer, epoch + 1)
    return heads.eval()


def judge(
    maps: FrozenMaps, heads: Heads, reader: ImageReader, manifest: Manifest
) -> tuple[dict[str, tuple[float, float]], int]:
    """Top-1 and top-5 accuracy of every classifier on centre crops, and the number of images."""
    labels = torch.from_numpy(manifest.labels)
    return count_hits(lambda images: heads(maps(images)), heads.names, reader, labels, maps.device)


def _blank(size: int, device: torch.device) -> Tensor:
    return torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
