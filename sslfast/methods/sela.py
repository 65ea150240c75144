"""SeLa: self-labelling under equal clusters (Asano, Rupprecht & Vedaldi, ICLR 2020).

Objective, alternately (section 3), for each of H heads with its own weights: the labels solve

``min_Q <Q, -log P>`` over ``Q >= 0`` with rows that sum to 1/N and columns that sum to 1/K,

smoothed by an entropy of weight 1/λ, so that ``Q = diag(α) P^λ diag(β)`` by Sinkhorn and Knopp (``sinkhorn.py``), and
``y_n = argmax_k Q_nk``; then the trunk and all heads minimise ``mean_h mean_n -log softmax(W_h f(x_n))_{y_n^h}``.

Implementation: a feature pass before a labelling stores features (``pseudo_labels.py``), and the heads compute logits
from them when they are needed, so the memory is N x D for all heads and not N x K for each. ``label_views`` says what
is labelled: augmented images by their batch's statistics, as the authors' code does it (``main.py`` gives the training
loader to the labelling and stays in training mode), or central squares by the running statistics. The first labels come
from the untrained network, as in the paper, by batch statistics in either case: with the initial running ones the
logits of a ResNet-50 are spread nine times as widely, and Sinkhorn takes three times the iterations. Labels change at
the start of epochs; the paper's schedule of labellings, dense at the beginning, is rounded to them.

Under several processes every rank holds the features of its share of the rows, which it labels, and all labels.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sslfast.distributed import gather_objects, gather_uneven, ignore_in_ddp
from sslfast.methods.base import BaseConfig, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.pseudo_labels import (
    UNLABELLED,
    CollectedFeatures,
    batch_statistics,
    central_view,
    has_initial_statistics,
    label_accuracy,
    pseudo_label_loss,
    row_storage,
)
from sslfast.methods.shared.sinkhorn import sinkhorn
from sslfast.models import build_trunk, seeded
from sslfast.views import View, ViewConfig

IMAGE = "image"
_CACHE_BYTES = 1 << 30
"""Of a rank's logits of one head that are kept in memory during a labelling. More of them are kept on disk with
``feature_storage="disk"``, and else computed again in every iteration: 2 N D K FLOP for all ranks together."""


@register_method
class SeLa(Method):
    """The method as a module. State in buffers: ``features`` and ``labels`` ``[H, N]`` int32 (-1: none yet)."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """Self-labelling by optimal transport."""

        name: ClassVar[str] = "sela"

        heads: int = 10
        """H, independent clusterings."""
        clusters: int = 3000
        """K of each head."""
        sharpness: float = 25.0
        """λ: the larger, the closer to the transport without entropy and the slower."""
        every_epochs: int = 1
        """Epochs between two labellings, where ``labellings`` is 0."""
        labellings: int = 0
        """n: labellings over ``labelling_epochs`` epochs, the k-th after ((k - 1) / n)² of them, rounded down; several
        in one epoch are one. 0: every ``every_epochs``."""
        labelling_epochs: int = 0
        """Epochs that ``labellings`` are spread over. 0: those of the run."""
        tolerance: float = 1e-2
        """Relative error of the cluster masses at which Sinkhorn stops."""
        max_iterations: int = 500
        """Maximum number of Sinkhorn iterations."""
        feature_dtype: Literal["fp32", "bf16"] = "fp32"
        """Storage of the features of all rows, which ranks share; 10.5 GB in fp32 for ImageNet and a ResNet-50."""
        feature_storage: Literal["device", "disk"] = "device"
        """disk: features, and the logits of one head while it labels, are in mapped files in the folder for temporary
        files ($TMPDIR), which go with their process; checkpoints hold the features."""
        label_views: Literal["central", "augmented"] = "central"
        """What is labelled. central: the central square of each image, in evaluation mode. augmented: the crops that
        the epoch trains on, BatchNorm by their batch, as in the authors' code."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The image."""

        def resolve(self, context: MethodContext) -> Self:
            """With ``labelling_epochs``, which default to the epochs of the run."""
            epochs = self.labelling_epochs or (context.epochs if self.labellings else 0)
            return replace(self, labelling_epochs=epochs)

        def labels_in(self, epoch: int) -> bool:
            """Whether the rows are labelled before this epoch, always before the first; for a resolved
            configuration."""
            if not self.labellings:
                return epoch % self.every_epochs == 0
            n, epochs = self.labellings, self.labelling_epochs
            nearest = round(n * math.sqrt(epoch / epochs)) if epochs else 0  # the k of this epoch, or one beside it
            near = range(max(nearest - 1, 0), min(nearest + 2, n))
            return any(epoch == math.floor(epochs * (k / n) ** 2) for k in near)

        def feature_views(self) -> dict[str, ViewConfig]:
            """What is labelled."""
            return {IMAGE: self.image_view if self.label_views == "augmented" else central_view(self.image_view)}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_whole_image()
            self.check_at_least(1, "heads", "every_epochs", "max_iterations")
            self.check_at_least(2, "clusters")
            self.check_at_least(0, "labellings", "labelling_epochs")
            self.check_positive("sharpness", "tolerance")

        def build(self, context: MethodContext) -> "SeLa":
            """The module for a run.

            Raises:
                ValueError: a bad field, or fewer samples than clusters.
            """
            return SeLa(self, context)

    labels: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        num_rows = context.num_rows
        if num_rows < 2:
            raise ValueError(f"SeLa needs at least 2 images, one for each of 2 clusters, got {num_rows}")
        if config.clusters > num_rows:
            raise ValueError(f"method.clusters must be at most the {num_rows} images, got {config.clusters}; lower it")
        self.config = config.resolve(context)
        self.trunk = build_trunk(context.model, seed=context.seed)
        width = self.trunk.out_features
        with seeded(context.seed + 1):
            self.head = nn.Linear(width, config.heads * config.clusters)  # head h has rows h K .. (h + 1) K
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
        self.features = CollectedFeatures(num_rows, width, dtype=dtype, on_disk=config.feature_storage == "disk")
        ignore_in_ddp(self, ["features.vectors"])
        self.register_buffer("labels", torch.full((config.heads, num_rows), UNLABELLED, dtype=torch.int32))
        self._by_batch: bool | None = None  # of the current feature pass

    def needs_feature_pass(self, epoch: int) -> bool:
        """Where the schedule labels."""
        return self.config.labels_in(epoch)

    def store_features(self, views: Mapping[str, View], sample_ids: Tensor) -> None:
        """Stores the features of a batch."""
        if self._by_batch is None:  # host sync: one a pass
            self._by_batch = self.config.label_views == "augmented" or has_initial_statistics(self.trunk)
        with batch_statistics(self.trunk) if self._by_batch else nullcontext():
            self.features.store_(sample_ids, self.trunk(views[IMAGE].pixels))

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Labels all rows seen so far, head by head, where the schedule says so. Waits for the device."""
        self._by_batch = None
        if not self.config.labels_in(epoch):
            return
        seen = self.features.seen.nonzero()[:, 0]
        own = self.features.own_seen()
        weights = self.head.weight.unflatten(0, (self.config.heads, -1))
        biases = self.head.bias.unflatten(0, (self.config.heads, -1))
        self.labels.fill_(UNLABELLED)
        for head, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.labels[head, seen] = gather_uneven(self._label(own, weight, bias).int())

    def _label(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``[n]`` int64 labels of those rows ``[n]`` of this rank's features, by one head."""
        config, count, vectors = self.config, len(rows), self.features.vectors
        fits = max(gather_objects(count)) * config.clusters * 4 <= _CACHE_BYTES
        on_disk = self.features.on_disk and not fits
        logits: Tensor | None = None
        if fits or on_disk:
            logits = row_storage(count, config.clusters, dtype=torch.float32, on_disk=on_disk, device=weight.device)
        known: set[int] = set()

        def scores(part: slice) -> Tensor:
            if logits is not None and part.start in known:
                found = logits[part].to(weight.device)
            else:
                found = linear(vectors[rows[part]].to(weight.device).float(), weight, bias)
                if logits is not None:
                    logits[part] = found.to(logits.device)
                    known.add(part.start)
            return config.sharpness * found.double()  # log-probabilities up to a constant of each row

        return sinkhorn(
            scores,
            count,
            config.clusters,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            device=weight.device,
        ).labels

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of correct labels.

        Args:
            views: "image".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: not used.
        """
        features = self.trunk(views[IMAGE].pixels)
        logits = self.head(features).view(len(sample_ids) * self.config.heads, -1)  # [B H, K]
        labels = self.labels[:, sample_ids].T.flatten().long()
        loss = pseudo_label_loss(logits, labels, torch.ones_like(labels, dtype=torch.float32))
        return {"loss": loss, "accuracy": label_accuracy(logits, labels)}

    def embeddings(self) -> Tensor:
        """Features of each row, as the last pass computed them."""
        return self.features.vectors

    @property
    def embeddings_are_split(self) -> bool:
        """True where there are several ranks."""
        return self.features.is_split

    def split_rows(self) -> dict[str, tuple[int, int]]:
        """The features."""
        return self.features.split_rows("features")

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.features.seen, self.labels]
