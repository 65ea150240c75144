"""What a log record holds besides the losses: statistics of features, and accuracies where they are due."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sslfast.data import Manifest
from sslfast.methods import Method
from sslfast.runs import RunDirectory
from sslfast.training.features import FeatureWatch
from sslfast.training.online import OnlineKnn
from sslfast.training.probe import OnlineProbe

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig


class Measurements:
    """:class:`FeatureWatch`, :class:`OnlineKnn` and :class:`OnlineProbe` of a run.

    Args:
        config: of the run.
        method: whose trunk and embeddings are measured.
        manifest: of the run; None for synthetic images.
        run: its directory.
        per_epoch: steps of an epoch.
        device: of the method.
        report: takes one line for the user.

    Raises:
        ValueError: an accuracy is wanted that cannot be measured, with the remedy.
    """

    def __init__(
        self,
        config: "TrainConfig",
        method: Method,
        manifest: Manifest | None,
        run: RunDirectory,
        per_epoch: int,
        *,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self.features = FeatureWatch(method, stop=config.on_collapse == "error", report=report)
        self._knn = OnlineKnn(method, manifest, every_epochs=config.knn_every_epochs, steps_per_epoch=per_epoch)
        self._probe = OnlineProbe(
            config, method, steps_per_epoch=per_epoch, device=device, folder=lambda: run.path, report=report
        )

    def is_due(self, step: int) -> bool:
        """Whether an accuracy belongs to the record of ``step`` (steps done), which there must then be."""
        return self._knn.is_due(step) or self._probe.is_due(step)

    def read(self, step: int) -> dict[str, float]:
        """The values of the record of ``step``. Waits for the device; every rank calls it.

        Raises:
            CollapseError: with ``on_collapse=error``.
        """
        return {**self.features.read(step), **self._knn.read(step), **self._probe.read(step)}
