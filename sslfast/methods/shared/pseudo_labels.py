"""Parts of the methods that train on pseudo-labels: features of all rows, the loss.

Labels come from a feature pass at fixed weights: of the largest central square of each image without augmentation, as
DeepCluster does it, or of augmented images by their batch's statistics, as SeLa's code does. Features stored during the
steps of an epoch, of augmented crops and changing weights (DeepCluster-v2, Caron et al. 2020), do not work in short
runs: k-means then groups rows by the time they were stored and by their jitter. The pass covers the samples that its
epoch trains on. A row that has never been in one has no label and weight 0.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryFile, gettempdir
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.distributed import gather_rows, mean_over_ranks, own_rows, raise_together, rank, world_size
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views import AugmentConfig, CropConfig, ViewConfig

UNLABELLED = -1


def central_view(view: ViewConfig) -> ViewConfig:
    """The largest central square of each image at the size and in the units of ``view``, not augmented."""
    augment = AugmentConfig(
        flip_probability=0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        mean=view.augment.mean,
        std=view.augment.std,
    )
    crop = CropConfig(size=view.crop.size, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    return replace(view, crop=crop, rotation=False, augment=augment)


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm inside normalises by its batch, and neither its running statistics nor their count change."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks


def has_initial_statistics(module: nn.Module) -> bool:
    """Whether some BatchNorm inside has not seen a batch, so that its running mean is 0 and its variance 1. Waits for
    the device."""
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0 for norm in norms)


def row_storage(rows: int, columns: int, *, dtype: torch.dtype, on_disk: bool, device: Any = "cpu") -> Tensor:
    """``[rows, columns]``: any values on ``device``, or zeros in a mapped file that goes with its process.

    The file is in the folder for temporary files ($TMPDIR) and has no name; its space is reserved. Every rank calls it.

    Raises:
        ValueError: on every rank, where one of them has no space.
    """
    if not on_disk:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    count, found, error = rows * columns * dtype.itemsize, torch.empty(rows, columns, dtype=dtype), None
    if count:
        try:
            with TemporaryFile(prefix="sslfast-") as file:
                os.posix_fallocate(file.fileno(), 0, count)
                found = torch.frombuffer(mmap.mmap(file.fileno(), count), dtype=dtype).view(rows, columns)
        except OSError as problem:
            error = (
                f"{count / 1e9:.2f} GB of features of rank {rank()} find no place in {gettempdir()} "
                f"({problem.strerror}): name a folder on a larger disk in TMPDIR, or set "
                "method.feature_storage to device"
            )
    raise_together(error)
    return found


class CollectedFeatures(nn.Module):
    """Features of each row from the last feature pass that it was in; each rank holds those of its part of the rows.

    Buffers: ``vectors`` ``[n, D]``, rows from :attr:`first_row` on, and ``seen`` ``[N]`` bool, the same on every rank,
    False until a row's first pass.

    Args:
        num_rows: N, which ranks share as :func:`~sslfast.distributed.shard_bounds` says.
        columns: D.
        dtype: of the vectors.
        on_disk: they are in a mapped file (:func:`row_storage`), and stay on the host.
    """

    vectors: Tensor
    seen: Tensor

    def __init__(
        self, num_rows: int, columns: int, *, dtype: torch.dtype = torch.float32, on_disk: bool = False
    ) -> None:
        super().__init__()
        self.num_rows, self.on_disk, self.is_split = num_rows, on_disk, world_size() > 1
        own = own_rows(num_rows)
        self.first_row = own.start
        vectors = row_storage(len(own), columns, dtype=dtype, on_disk=on_disk)
        self.register_buffer("vectors", vectors if on_disk else vectors.zero_())
        self.register_buffer("seen", torch.zeros(num_rows, dtype=torch.bool))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        vectors = self.vectors
        if self.on_disk:
            self.vectors = vectors[:0]
        super()._apply(fn, recurse)
        if self.on_disk:
            self.vectors = vectors
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "rows" in state_dict:  # name in older checkpoints
            state_dict[prefix + "vectors"] = state_dict.pop(prefix + "rows")
        whole = state_dict.get(prefix + "vectors")
        if whole is not None and len(whole) == self.num_rows:
            state_dict[prefix + "vectors"] = whole[self.first_row : self.first_row + len(self.vectors)]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def split_rows(self, name: str) -> dict[str, tuple[int, int]]:
        """What ``Method.split_rows`` says of this module, called ``name``."""
        return {f"{name}.vectors": (self.first_row, self.num_rows)} if self.is_split else {}

    def own_seen(self) -> Tensor:
        """Those of the rows of :attr:`vectors` that a pass has seen, by their place in it. Waits for the device."""
        return self.seen[self.first_row : self.first_row + len(self.vectors)].nonzero()[:, 0].to(self.vectors.device)

    @torch.no_grad()
    def store_(self, sample_ids: Tensor, features: Tensor) -> None:
        """Store ``features`` ``[B, D]`` of ``sample_ids`` ``[B]`` of every rank. Of a repeated sample, which replaces
        an unreadable image, the last one stays. Waits for the device where rows are split or on disk."""
        gathered = gather_rows(sample_ids)
        positions = torch.arange(len(gathered), device=gathered.device)
        last = torch.where(gathered[:, None] == gathered, positions, -1).amax(dim=1)
        features = gather_rows(features.float())[last]
        self.seen[gathered] = True
        local = gathered - self.first_row
        if self.is_split:
            here = (local >= 0) & (local < len(self.vectors))
            local, features = local[here], features[here]
        place = self.vectors.device
        self.vectors[local.to(place)] = features.to(device=place, dtype=self.vectors.dtype)


def pseudo_label_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """``Σ_i w_i · -log softmax(logits_i)_{labels_i} / Σ_i w_i``, 0-d; samples labelled -1 have ``w_i = 0``.

    The sum of weights is the mean over ranks, so that averaged gradients are those of the whole batch. 0 where no
    sample has a label.

    Args:
        logits: ``[B, K]``.
        labels: ``[B]`` int64, -1 for none.
        weights: ``[B]`` fp32.
    """
    weights = weights * (labels != UNLABELLED)
    losses = cross_entropy(logits.float(), labels.clamp_min(0), reduction="none")
    return (weights * losses).sum() / mean_over_ranks(weights.sum()).clamp_min(1e-12)


def label_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled samples whose label has the largest score, 0-d; 0 where there is none."""
    right = (logits.argmax(dim=-1) == labels).float().sum()
    return right / (labels != UNLABELLED).sum().clamp_min(1)


def uniform_over_clusters(labels: Tensor, clusters: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """``[N]`` rows in random order, ``N // K' + 1`` of each of the K' clusters that are not empty, cut to N.

    Those of a cluster are drawn without replacement where it has more rows, else with it (facebookresearch/deepcluster,
    ``util.py``, UnifLabelSampler).

    Args:
        labels: ``[N]`` integers on the CPU, -1 for rows without a label, which are not drawn.
        clusters: K.
        seed, epoch: of the draws.

    Raises:
        ValueError: no row has a label.
    """
    rows = (labels != UNLABELLED).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("no row has a label to draw an epoch by")
    counts = labels[rows].bincount(minlength=clusters)
    share = len(labels) // int((counts > 0).sum()) + 1
    keys = _keys(rows, seed=seed, epoch=epoch)
    by_cluster = rows[torch.from_numpy(np.lexsort((keys.numpy(), labels[rows].numpy())))]
    filled = (counts > 0).nonzero()[:, 0]
    slot = torch.arange(len(filled) * share)
    size = counts[filled].repeat_interleave(share)
    start = (counts.cumsum(0) - counts)[filled].repeat_interleave(share)
    draws = random_uint32(len(labels) + slot, 1, seed=seed, stream=Stream.CLUSTERS, step=epoch)[:, 0]
    place = torch.where(size > share, slot % share, draws * size >> 32)
    drawn = by_cluster[start + place]
    order = _keys(len(labels) + slot, seed=seed, epoch=epoch).argsort(stable=True)[: len(labels)]
    return drawn[order].numpy()


def _keys(ids: Tensor, *, seed: int, epoch: int) -> Tensor:
    """63 random bits of each id; the first words of the stream are those of k-means."""
    bits = random_uint32(ids, 4, seed=seed, stream=Stream.CLUSTERS, step=epoch)
    return (bits[:, 2] << 31) | (bits[:, 3] >> 1)
