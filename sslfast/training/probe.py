"""Accuracy on a labelled data set during training: kNN and a linear layer on the trunk's frozen features."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sslfast.evaluation import (
    TRAINED,
    FeatureCache,
    TrunkEncoder,
    encoder_of,
    extract_all,
    load_manifests,
    probe_scores,
    resolve_preprocessing,
    scratch_folder,
    shared_knn_accuracy,
    train_probe,
)
from sslfast.loaders import default_workers
from sslfast.methods import BaseConfig, Method

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig

K = 20
STRENGTH = 1e-3
"""λ of the linear layer: one, so that a measurement is one fit."""


def method_encoder(config: BaseConfig, method: Method) -> TrunkEncoder:
    """A copy of the trunk as evaluations see it, so that training is the same to the bit with and without."""
    patches = config.evaluation_patches()
    return encoder_of(
        copy.deepcopy(getattr(method, "teacher_trunk", method.trunk)),  # DINO's is the better one
        patches if patches is not None and patches.by_default else None,
        mean=config.image_view.augment.mean,
        std=config.image_view.augment.std,
        colours=config.trunk_input,
    )


class OnlineProbe:
    """``val_knn_top1`` and ``val_linear_top1`` at the end of every ``probe_every_epochs``-th epoch.

    Both are those of ``sslfast evaluate knn`` (k = 20, τ = 0.07) and ``sslfast evaluate linear --protocol probe``
    (λ = 0.001 alone) on centre crops of ``probe_data``. The trunk is copied for it, so that training is the same to the
    bit with and without. Features are files in the run's folder while it measures, as in the evaluations.

    Args:
        config: of the run.
        method: holds the trunk.
        steps_per_epoch: of the run.
        device: of the trunk.
        folder: gives the folder of the run, which may be renamed while it trains.
        report: takes one line for the user.

    Raises:
        ValueError: ``probe_data`` is no labelled set, or has too few images.
    """

    def __init__(
        self,
        config: "TrainConfig",
        method: Method,
        *,
        steps_per_epoch: int,
        device: torch.device,
        folder: Callable[[], Path],
        report: Callable[[str], None],
    ) -> None:
        self._config, self._method, self._device, self._report = config, method, device, report
        self._folder = folder
        self._every_steps = config.probe_every_epochs * steps_per_epoch
        if not self._every_steps or config.probe_data is None:
            return
        self._train, self._val = load_manifests(config.probe_data, on_bad_image="skip")
        if len(self._train) < K:
            raise ValueError(
                f"probe_data={config.probe_data} has {len(self._train)} training images, and kNN needs {K}: give more, "
                "or leave probe_data out"
            )

    def is_due(self, step: int) -> bool:
        """Whether the record of ``step`` (steps done) includes the accuracies."""
        return self._every_steps > 0 and step % self._every_steps == 0

    def read(self, step: int) -> dict[str, float]:
        """The accuracies where they are due, else an empty dict. Every rank calls it, and reads its share of images."""
        if not self.is_due(step):
            return {}
        try:
            with scratch_folder(self._folder() / ".probe_features") as folder:
                return self._measure(FeatureCache(folder))
        except ValueError as error:  # a file of the probe's data, or features that are not finite: training goes on
            self._report(f"step {step}: not measured on probe_data: {error}")
            return {}

    def _measure(self, cache: FeatureCache) -> dict[str, float]:
        view, workers = self._config.method.image_view, self._config.loader.workers
        encoder = method_encoder(self._config.method, self._method)
        found = [
            extract_all(
                {TRAINED: encoder},
                manifest,
                size=view.crop.size,
                preprocessing=resolve_preprocessing("auto", view.crop.size, "centre-crop"),
                batch_size=max(1, min(256, self._config.batch_size)),
                device=self._device,
                workers=default_workers() if workers is None else workers,
                on_bad_image="skip",
                cache=cache,
            )
            for manifest in (self._train, self._val)
        ]
        train, val = (part.values[TRAINED] for part in found)
        train_labels, val_labels = (
            torch.from_numpy(manifest.labels)[part.rows]
            for manifest, part in zip((self._train, self._val), found, strict=True)
        )
        classes, device = len(self._train.classes), self._device
        probe = train_probe(train, train_labels, classes=classes, strengths=(STRENGTH,), device=device)
        linear, _, _ = probe_scores(probe, val, val_labels, classes=classes)
        knn = shared_knn_accuracy(val, val_labels, train, train_labels, k=(K,), device=device)[K]
        return {"val_knn_top1": knn.top1, "val_linear_top1": linear}
