"""The data of a run: a manifest that all ranks agree on, and the loaders of its images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sslfast import distributed
from sslfast.data import Manifest, check_run_apart, open_data, reopen_data
from sslfast.loaders import Loader, build_loader
from sslfast.runs import RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.views import ViewConfig


class RunData:
    """The data of a run.

    Args:
        config: of the run.
        data: whatever ``sslfast.data.open_data`` takes, or a number of synthetic images.
        run: directory whose manifest, if it has one, is checked against the data. With several ranks rank 0 finds the
            images, and the others check that they have the same.
        device: of the batches.
    """

    def __init__(self, config: TrainConfig, data: Any, run: RunDirectory, *, device: torch.device) -> None:
        self.config, self.device = config, device
        self.synthetic_rows = data if isinstance(data, int) else None
        self.manifest = None if isinstance(data, int) else self._manifest(data, run).packed()
        self._digest: str | None = None

    def _manifest(self, data: Any, run: RunDirectory) -> Manifest:
        check_run_apart(run.path, data)
        if distributed.world_size() == 1:
            return self.config.loader.decode(self._open(data, run.manifest))
        text, error, manifest = b"", None, None
        with TemporaryDirectory(prefix="sslfast-") as place:
            copy = Path(place) / "manifest.tsv"
            try:
                if distributed.is_main():
                    manifest = self._open(data, run.manifest)
                    manifest.save(copy)
                    text = copy.read_bytes()
            except (ValueError, OSError) as problem:
                error = str(problem)
            distributed.raise_together(error)
            text = distributed.broadcast_object(text)
            try:
                if manifest is None:
                    copy.write_bytes(text)
                    manifest = reopen_data(data, copy, on_bad_image=self.config.loader.on_bad_image)
                manifest = self.config.loader.decode(manifest)
            except (ValueError, OSError) as problem:
                error = f"rank {distributed.rank()}: {problem}"
            distributed.raise_together(error)
        assert manifest is not None
        return manifest

    def _open(self, data: Any, known: Path) -> Manifest:
        if known.exists():
            return reopen_data(data, known, on_bad_image=self.config.loader.on_bad_image)
        progress = self.config.progress in ("auto", "bar") and sys.stderr.isatty()
        return open_data(data, on_bad_image=self.config.loader.on_bad_image, progress=progress)

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
        """Identity of the data set: digest of the manifest, which every row takes part in, or the number of synthetic
        images."""
        if self._digest is None:
            self._digest = f"synthetic-{self.synthetic_rows}" if self.manifest is None else self.manifest.digest()
        return self._digest
