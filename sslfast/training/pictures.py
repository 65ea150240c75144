"""Pictures of a run while it trains. They are drawn by a function from outside: drawing lies above training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sslfast.data import Manifest
from sslfast.distributed import gather_to_rank0, rank, shard_bounds, world_size
from sslfast.methods import Method
from sslfast.runs import RunDirectory
from sslfast.training.logging import Recorder

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig

Draw = Callable[["TrainConfig", Manifest, Tensor | None, Path], dict[str, Path]]
"""Draws the pictures of a configuration, its images and their embeddings ``[N, D]`` (None: the method keeps none) into
a folder; PNG files by name."""


class Pictures:
    """Draws every ``pictures_every_epochs``-th epoch.

    Raises:
        ValueError: there are no image files to draw.
    """

    def __init__(
        self, config: "TrainConfig", method: Method, manifest: Manifest | None, draw: Draw | None, per_epoch: int
    ) -> None:
        self._config, self._method, self._manifest, self._draw = config, method, manifest, draw
        self._every_steps = config.pictures_every_epochs * per_epoch if draw is not None else 0
        if self._every_steps and (manifest is None or manifest.source.loader is not None):
            raise ValueError(
                f"pictures_every_epochs={config.pictures_every_epochs} draws image files, and there are none "
                "(synthetic images, .beton); set it to 0"
            )

    def after_step(self, step: int, run: RunDirectory, recorder: Recorder) -> None:
        """Draw into the run's folder where it is due, and hand to its logs; every rank calls it.

        Waits for the device. A picture that cannot be drawn is one line.
        """
        if self._every_steps == 0 or step % self._every_steps:
            return
        embeddings = self._method.embeddings()
        if embeddings is not None and self._manifest is not None and len(embeddings) < len(self._manifest):
            embeddings = gather_to_rank0(embeddings, shard_bounds(len(self._manifest), world_size()))
        if rank() == 0 and self._draw is not None and self._manifest is not None:
            draw = partial(self._draw, self._config, self._manifest, embeddings)
            recorder.write_pictures(lambda: draw(run.pictures), step)
