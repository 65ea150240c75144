"""Pictures of a run while it trains. They are drawn by a function from outside: drawing lies above training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslfast.data import Manifest
from sslfast.distributed import own_rows, rank
from sslfast.evaluation import TRAINED, NearestImages, bank_neighbours, extract_all, resolve_preprocessing
from sslfast.methods import Method
from sslfast.runs import RunDirectory, print_error
from sslfast.training.logging import Recorder
from sslfast.training.probe import method_encoder

if TYPE_CHECKING:
    from sslfast.training.config import TrainConfig

MOST_IMAGES = 512
"""Images that are computed embeddings of where the method keeps none."""
QUERIES, NEIGHBOURS = 8, 6


Draw = Callable[["TrainConfig", Manifest, NearestImages | None, Path], dict[str, Path]]
"""Draws the pictures of a configuration, its images and their neighbours, unless they are too few, into a folder; PNG
files by name."""


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
        if self._draw is None or self._manifest is None:
            return
        try:
            found = self._nearest(self._manifest)
        except ValueError as error:  # an image that is gone, or features that are not finite: training goes on
            print_error(f"step {step}: no pictures drawn: {error}")
            return
        if rank() == 0:
            draw = partial(self._draw, self._config, self._manifest, found)
            recorder.write_pictures(lambda: draw(run.pictures), step)

    def _nearest(self, manifest: Manifest) -> NearestImages | None:
        """Neighbours among the images of the rows that the method keeps, each rank searching those that it has; else
        among some images, evenly spread, by features that a copy of the trunk has for them."""
        kept, is_split, first = self._method.embeddings(), self._method.embeddings_are_split, 0
        if kept is None:
            manifest, kept = self._computed(manifest)
        elif is_split:
            first = own_rows(len(manifest)).start
        if len(manifest) <= NEIGHBOURS or (rank() and not is_split):
            return None
        count = min(QUERIES, len(manifest))
        queries = torch.arange(count) * len(manifest) // count
        similarity, rows = bank_neighbours(kept, queries, NEIGHBOURS, first_row=first, is_split=is_split)
        return NearestImages(images=manifest, queries=queries, neighbours=rows.cpu(), similarity=similarity.cpu())

    def _computed(self, manifest: Manifest) -> tuple[Manifest, Tensor]:
        count = min(MOST_IMAGES, len(manifest))
        some = manifest.take([number * len(manifest) // count for number in range(count)])
        crop = self._config.method.image_view.crop.size
        features = extract_all(
            {TRAINED: method_encoder(self._config.method, self._method)},
            some,
            size=crop,
            preprocessing=resolve_preprocessing("auto", crop, "centre-crop"),
            batch_size=max(1, min(256, self._config.batch_size)),
            device=next(self._method.parameters()).device,
            workers=0,
            on_bad_image="skip",
        )
        return some.take(features.rows.tolist()), features.values[TRAINED]
