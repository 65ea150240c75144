"""SeLa: self-labelling under equal clusters (Asano, Rupprecht & Vedaldi, ICLR 2020).

Objective, alternately (section 3), for each of H heads with its own weights: the labels solve

``min_Q <Q, -log P>`` over ``Q >= 0`` with rows that sum to 1/N and columns that sum to 1/K,

smoothed by an entropy of weight 1/λ, so that ``Q = diag(α) P^λ diag(β)`` by Sinkhorn and Knopp (``sinkhorn.py``), and
``y_n = argmax_k Q_nk``; then the trunk and all heads minimise ``mean_h mean_n -log softmax(W_h f(x_n))_{y_n^h}``.

As here: a pass over the data before a labelling keeps features (``pseudo_labels.py``), and the heads make logits of
them as they are needed, so the memory is N x D for all heads and not N x K for each. The pass shows central squares in
evaluation mode. The first labels come from the untrained network, as in the paper. Labels change at the start of
epochs; the paper's schedule of labellings, dense at the beginning, is rounded to them.

Under several processes every rank holds all features and labels, and works on its share of the rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sslfast.distributed import gather_uneven, own_rows
from sslfast.methods.base import BaseConfig, Method
from sslfast.methods.shared.pseudo_labels import (
    UNLABELLED,
    CollectedFeatures,
    central_view,
    label_accuracy,
    pseudo_label_loss,
)
from sslfast.methods.shared.sinkhorn import sinkhorn
from sslfast.models import ResNetConfig, build_trunk, seeded
from sslfast.views import View, ViewConfig

IMAGE = "image"
_CACHE_BYTES = 1 << 30
"""Logits of one head up to this size are kept during a labelling instead of being computed in every iteration."""


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
        """λ: the larger, the nearer to the unsmoothed transport and the slower."""
        every_epochs: int = 1
        """Epochs between two labellings, where ``labellings`` is 0."""
        labellings: int = 0
        """n: labellings over ``labelling_epochs`` epochs, the k-th at the share ((k - 1) / n)² of them, rounded down;
        several in one epoch are one. 0: every ``every_epochs``."""
        labelling_epochs: int = 0
        """Epochs that ``labellings`` are spread over: those of the run."""
        tolerance: float = 1e-2
        """Relative error of the clusters' masses at which the transport is solved."""
        max_iterations: int = 500
        """Sinkhorn iterations at the most."""
        feature_dtype: Literal["fp32", "bf16"] = "fp32"
        """Storage of the features of all rows; 10.5 GB in fp32 for ImageNet and a ResNet-50."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The image."""

        def labels_in(self, epoch: int) -> bool:
            """Whether the rows are labelled before this epoch; always before the first."""
            if not self.labellings:
                return epoch % self.every_epochs == 0
            times = ((k / self.labellings) ** 2 for k in range(self.labellings))
            return any(epoch == math.floor(self.labelling_epochs * time) for time in times)

        def feature_views(self) -> dict[str, ViewConfig]:
            """What is labelled: the central square of each image."""
            return {IMAGE: central_view(self.image_view)}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_whole_image()
            self.check_at_least(1, "heads", "every_epochs", "max_iterations")
            self.check_at_least(2, "clusters")
            self.check_at_least(0, "labellings")
            self.check_positive("sharpness", "tolerance")
            if self.labellings and self.labelling_epochs < 1:
                raise ValueError(
                    f"method.labelling_epochs must be the epochs of the run, 1 or more, where labellings="
                    f"{self.labellings}, got {self.labelling_epochs}"
                )

        def build(self, *, model: ResNetConfig, num_rows: int, seed: int) -> "SeLa":
            """The module for a data set of ``num_rows`` samples.

            Raises:
                ValueError: a bad field, or fewer samples than clusters.
            """
            return SeLa(self, model=model, num_rows=num_rows, seed=seed)

    labels: Tensor

    def __init__(self, config: Config, *, model: ResNetConfig, num_rows: int, seed: int) -> None:
        super().__init__()
        config.validate()
        if config.clusters > num_rows:
            raise ValueError(f"method.clusters must be at most the {num_rows} images, got {config.clusters}; lower it")
        self.config = config
        self.trunk = build_trunk(model, seed=seed)
        width = self.trunk.out_features
        with seeded(seed + 1):
            self.head = nn.Linear(width, config.heads * config.clusters)  # head h has rows h K .. (h + 1) K
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
        self.features = CollectedFeatures(num_rows, width, dtype=dtype)
        self.register_buffer("labels", torch.full((config.heads, num_rows), UNLABELLED, dtype=torch.int32))

    def needs_feature_pass(self, epoch: int) -> bool:
        """Where the schedule labels."""
        return self.config.labels_in(epoch)

    def collect(self, views: Mapping[str, View], rows: Tensor) -> None:
        """Keeps the features of a batch."""
        self.features.store_(rows, self.trunk(views[IMAGE].pixels))

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Labels all rows seen so far, head by head, where the schedule says so. Waits for the device."""
        if not self.config.labels_in(epoch):
            return
        seen = self.features.seen.nonzero()[:, 0]
        part = own_rows(len(seen))
        own = seen[part.start : part.stop]
        weights = self.head.weight.unflatten(0, (self.config.heads, -1))
        biases = self.head.bias.unflatten(0, (self.config.heads, -1))
        self.labels.fill_(UNLABELLED)
        for head, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.labels[head, seen] = gather_uneven(self._label(own, weight, bias)).int()

    def _label(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``[n]`` int64 labels of this rank's ``rows`` ``[n]`` by one head."""
        config = self.config
        cache: dict[int, Tensor] = {}
        caches = len(rows) * config.clusters * 4 <= _CACHE_BYTES

        def scores(part: slice) -> Tensor:
            logits = cache.get(part.start)
            if logits is None:
                logits = linear(self.features.vectors[rows[part]].float(), weight, bias)
                if caches:
                    cache[part.start] = logits
            return config.sharpness * logits.double()  # log-probabilities up to a number of each row

        return sinkhorn(
            scores,
            len(rows),
            config.clusters,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            device=weight.device,
        ).labels

    def forward(self, views: Mapping[str, View], rows: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of labels named right.

        Args:
            views: "image".
            rows: ``[B]`` int64, manifest row of each sample.
            step: not used.
        """
        features = self.trunk(views[IMAGE].pixels)
        logits = self.head(features).view(len(rows) * self.config.heads, -1)  # [B H, K]
        labels = self.labels[:, rows].T.flatten().long()
        loss = pseudo_label_loss(logits, labels, torch.ones_like(labels, dtype=torch.float32))
        return {"loss": loss, "accuracy": label_accuracy(logits, labels)}

    def embeddings(self) -> Tensor:
        """Features of each row, as the last pass made them."""
        return self.features.vectors

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.features.vectors, self.features.seen, self.labels]
