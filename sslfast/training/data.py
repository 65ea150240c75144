"""The data of a run: a manifest that all ranks agree on, and the loaders of its images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sslfast import distributed
from sslfast.data import Manifest, check_run_apart, is_named, mapped_pickle, open_data, reopen_data, write_pickle
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
        """Rank 0 finds the images, or checks those of a resumed run; where the others do not see the files of its
        machine, the first rank of every other machine checks that it has the same, and ranks of a machine share one
        copy of the rows."""
        check_run_apart(run.path, data)
        if distributed.world_size() == 1:
            return self.config.loader.decode(self._open(data, run.manifest))
        with TemporaryDirectory(prefix="sslfast-") as place:
            return self._manifest_together(data, run, Path(place))

    def _manifest_together(self, data: Any, run: RunDirectory, place: Path) -> Manifest:
        is_shared = is_named(data)
        first = distributed.first_on_machine(place) if is_shared else distributed.rank()
        text, shared = place / "manifest.tsv", place / "rows"
        found: list[Manifest] = []

        def find() -> None:
            manifest = self._open(data, run.manifest)
            found.append(self.config.loader.decode(manifest))
            manifest.save(text)

        def find_again() -> None:
            if first == distributed.rank() and not distributed.is_main():
                manifest = reopen_data(data, text, on_bad_image=self.config.loader.on_bad_image)
                found.append(self.config.loader.decode(manifest))
            if found and is_shared:
                found[0].digest()  # so that it is known to all
                write_pickle(found[0].packed(), shared)

        distributed.together(find, only_main=True)
        if distributed.max_over_ranks(torch.tensor(first)):  # some do not see the files of rank 0
            distributed.together(lambda: distributed.broadcast_file(text, keep=first == distributed.rank()))
        distributed.together(find_again)
        if is_shared:
            folder = distributed.gather_objects(str(place))[first]
            distributed.together(lambda: found.insert(0, mapped_pickle(Path(folder) / shared.name)))
        return found[0]

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
