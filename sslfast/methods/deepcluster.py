"""DeepCluster: predict the k-means clusters of the trunk's own features (Caron et al., ECCV 2018).

Objective, alternately (eqs. 1 and 2): before every epoch ``min_C Σ_n min_y |φ(f(x_n)) - C_y|²`` gives labels ``y_n``,
where φ whitens and normalises; then ``min_θ,W Σ_n -log softmax(W f_θ(x_n))_{y_n}`` over the epoch, with W
re-initialised.

Implementation and departures:

- A feature pass before the clustering (``pseudo_labels.py``) computes the features in evaluation mode. The paper crops
  the central 224 px of an image resized to 256, here it is the whole central square.
- Principal components are those of all features of the trunk, as in the authors' code, fitted on ``pca_sample`` rows.
  A ``feature_columns`` below their number stores a random orthonormal projection in place of them: less memory, but on
  features whose spectrum falls like a power law k-means then finds other clusters (NMI with the classes 0.4 in place of
  0.97 on 100 synthetic ones).
- ``sampling="clusters"`` draws an epoch's samples uniformly over clusters, as the paper: as many of each, without
  replacement where a cluster has more (``util.py``, UnifLabelSampler). A sample that is drawn several times has the
  same crop each time. ``sampling="rows"`` has each sample once and weights its loss by ``N / (K n_k)``, with ``n_k``
  rows in its cluster: the same expectation, except for the division by the batch's own sum of weights.
- W is re-initialised after each clustering. With ``head_momentum`` the optimizer's momentum of W is kept and decays
  within about ten steps; the authors' code and mmselfsup train W without momentum.
- The Sobel filter before the trunk is an option of the trunk: ``model.input``.

Under several processes every rank holds the features of its share of the rows, which it assigns, and all labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslfast.distributed import gather_uneven, ignore_in_ddp
from sslfast.methods.base import BaseConfig, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.kmeans import import_faiss, kmeans, whiten
from sslfast.methods.shared.pseudo_labels import (
    UNLABELLED,
    CollectedFeatures,
    central_view,
    label_accuracy,
    pseudo_label_loss,
    row_storage,
    uniform_over_clusters,
)
from sslfast.models import build_trunk, seeded
from sslfast.optim import ParameterOptions
from sslfast.views import View, ViewConfig

IMAGE = "image"


@register_method
class DeepCluster(Method):
    """The method as a module.

    State in buffers: ``features``, ``labels`` ``[N]`` int32 (-1: none yet) and ``weights`` ``[K]`` fp32, the
    loss weight of each cluster's samples, 1 where they are drawn uniformly over clusters.
    """

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """k-means pseudo-labels."""

        name: ClassVar[str] = "deepcluster"

        clusters: int = 10000
        """K of k-means and classes of the classifier."""
        every_epochs: int = 1
        """Epochs between two clusterings."""
        iterations: int = 20
        """Updates of the centroids in one clustering."""
        feature_columns: int = 0
        """Columns of the feature buffer; wider features are projected at random. 0: those of the trunk."""
        feature_dtype: Literal["fp32", "bf16"] = "fp32"
        """Storage of the features of all rows, which ranks share; 10.5 GB in fp32 for ImageNet and a ResNet-50."""
        feature_storage: Literal["device", "disk"] = "device"
        """disk: features, and what is clustered, are in mapped files in the folder for temporary files ($TMPDIR), which
        go with their process; checkpoints hold the features."""
        pca_dimensions: int = 256
        """Principal components kept, whitened and L2-normalised before k-means; 0: the features as they are."""
        pca_sample: int = 0
        """Rows, evenly spaced, that the components are fitted on; 0: all."""
        sampling: Literal["rows", "clusters"] = "rows"
        """Samples of an epoch. rows: each once, weighted by the inverse size of its cluster. clusters: as many of every
        cluster, as published."""
        head_momentum: bool = True
        """False: the classifier is trained without the optimizer's momentum."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The image."""

        def feature_views(self) -> dict[str, ViewConfig]:
            """What is clustered: the central square of each image."""
            return {IMAGE: central_view(self.image_view)}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_whole_image()
            self.check_at_least(2, "clusters")
            self.check_at_least(1, "every_epochs", "iterations")
            self.check_at_least(0, "feature_columns", "pca_dimensions", "pca_sample")
            if self.feature_columns and self.pca_dimensions > self.feature_columns:
                raise ValueError(
                    f"method.pca_dimensions must be in [0, feature_columns={self.feature_columns}], "
                    f"got {self.pca_dimensions}"
                )

        def build(self, context: MethodContext) -> "DeepCluster":
            """The module for a run.

            Raises:
                ValueError: a bad field, or too few samples for the clusters.
                ImportError: faiss is missing.
            """
            return DeepCluster(self, context)

    labels: Tensor
    weights: Tensor
    projection: Tensor | None

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        import_faiss()
        num_rows = context.num_rows
        if num_rows < 4:
            raise ValueError(f"DeepCluster needs at least 4 images, 2 for each of 2 clusters, got {num_rows}")
        if config.clusters > num_rows // 2:
            raise ValueError(
                f"method.clusters must be at most {num_rows // 2}, half of the {num_rows} images, "
                f"got {config.clusters}; lower it"
            )
        self.config, self.seed = config, context.seed
        self.orders_epochs = config.sampling == "clusters"
        self.trunk = build_trunk(context.model, seed=context.seed)
        width = self.trunk.out_features
        columns = min(width, config.feature_columns or width)
        with seeded(context.seed + 1):
            self.head = nn.Linear(width, config.clusters)
            projection = torch.linalg.qr(torch.randn(width, columns))[0] if columns < width else None
        self.register_buffer("projection", projection, persistent=False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.feature_dtype]
        self.features = CollectedFeatures(num_rows, columns, dtype=dtype, on_disk=config.feature_storage == "disk")
        ignore_in_ddp(self, ["features.vectors"])
        self.register_buffer("labels", torch.full((num_rows,), UNLABELLED, dtype=torch.int32))
        self.register_buffer("weights", torch.ones(config.clusters))
        self._restart_head(0)

    def needs_feature_pass(self, epoch: int) -> bool:
        """Every ``every_epochs`` epochs, from the first on."""
        return epoch % self.config.every_epochs == 0

    def store_features(self, views: Mapping[str, View], sample_ids: Tensor) -> None:
        """Stores the features of a batch, projected where they are wider than the buffer."""
        features = self.trunk(views[IMAGE].pixels).float()
        self.features.store_(sample_ids, features if self.projection is None else features @ self.projection)

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Clusters the features and re-initialises the classifier where :meth:`needs_feature_pass` says so.

        Waits for the device.
        """
        config = self.config
        if not self.needs_feature_pass(epoch):
            return
        seen = self.features.seen.nonzero()[:, 0]
        if len(seen) < config.clusters:
            raise RuntimeError(
                f"only {len(seen)} images could be read, fewer than method.clusters={config.clusters}: "
                "lower it, or replace the images that cannot be read"
            )
        vectors = self.features.vectors.cpu()  # this rank's; on disk, itself
        own = self.features.own_seen().cpu()
        columns = min(config.pca_dimensions, vectors.shape[1])
        if columns:
            points = row_storage(len(own), columns, dtype=torch.float32, on_disk=self.features.on_disk)
            points = whiten(vectors, columns, sample=config.pca_sample, rows=own, target=points)
        else:
            points = vectors if len(own) == len(vectors) else vectors[own]
        labels = kmeans(points, config.clusters, iterations=config.iterations, seed=self.seed, epoch=epoch)
        labels = gather_uneven(labels.int())
        counts = labels.bincount(minlength=config.clusters)
        self.labels.fill_(UNLABELLED)
        self.labels[seen] = labels.to(self.labels.device)
        if config.sampling == "rows":
            self.weights.copy_(len(seen) / (config.clusters * counts.float()))
        self._restart_head(epoch)

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """As many rows of every cluster, shuffled: a function of labels, seed and epoch. Waits for the device."""
        return uniform_over_clusters(self.labels.cpu(), self.config.clusters, seed=self.seed, epoch=epoch)

    @torch.no_grad()
    def _restart_head(self, epoch: int) -> None:
        """Normal weights of standard deviation 0.01, a function of (seed, epoch), as in the paper's code."""
        generator = torch.Generator().manual_seed((self.seed + 2 + epoch) % 2**63)
        self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
        self.head.bias.zero_()

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of correct labels.

        Args:
            views: "image".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: not used.
        """
        features = self.trunk(views[IMAGE].pixels)
        logits, labels = self.head(features), self.labels[sample_ids].long()
        loss = pseudo_label_loss(logits, labels, self.weights[labels.clamp_min(0)])
        return {"loss": loss, "accuracy": label_accuracy(logits, labels)}

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The classifier's momentum."""
        return {} if self.config.head_momentum else {"head": ParameterOptions(momentum=0.0)}

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
        return [self.features.seen, self.labels, self.weights]
