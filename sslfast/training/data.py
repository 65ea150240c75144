"""The data of a run: a manifest that all ranks agree on, and the loaders of its images."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from sslfast import distributed
from sslfast.data import Manifest, open_data, reopen_data
from sslfast.loaders import Loader, build_loader
from sslfast.runs import RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.views import ViewConfig


class RunData:
    """The data of a run.

    Args:
        config: of the run.
        data: folder of images, manifest (.tsv), .beton file, or a number of synthetic images.
        run: directory whose manifest, if it has one, is checked against the data. With several ranks rank 0 writes this
            file and the others read it.
        device: of the batches.
    """

    def __init__(self, config: TrainConfig, data: Path | str | int, run: RunDirectory, *, device: torch.device) -> None:
        self.config, self.device = config, device
        self.synthetic_rows = data if isinstance(data, int) else None
        self.manifest = None if isinstance(data, int) else self._manifest(Path(data), run)

    def _manifest(self, folder: Path, run: RunDirectory) -> Manifest:
        is_main = distributed.rank() == 0
        if not is_main:
            distributed.barrier()  # until rank 0 has scanned the images and saved the manifest
        if run.manifest.exists():
            manifest = reopen_data(folder, run.manifest, on_bad_image=self.config.loader.on_bad_image)
        else:
            progress = self.config.progress in ("auto", "bar") and sys.stderr.isatty()
            manifest = open_data(folder, on_bad_image=self.config.loader.on_bad_image, progress=progress)
        manifest = self.config.loader.decode(manifest)
        if distributed.world_size() > 1 and is_main:
            run.create()
            if not run.manifest.exists():
                manifest.save(run.manifest)
            distributed.barrier()
        return manifest

    def loader(self, views: Mapping[str, ViewConfig]) -> Loader:
        """A loader of these views. All loaders of a run yield the same samples in the same epochs."""
        return build_loader(
            self.config.loader,
            views=views,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            manifest=self.manifest,
            synthetic_rows=self.synthetic_rows,
            device=self.device,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def digest(self) -> str:
        """Identity of the data set: digest of the manifest, or the number of synthetic images."""
        return f"synthetic-{self.synthetic_rows}" if self.manifest is None else self.manifest.digest()
