"""Loader registry: which loaders exist, which can be used here, and the one that a configuration names."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from sslfast.config import resumable
from sslfast.data import LIMIT_SECONDS
from sslfast.distributed import local_world_size
from sslfast.views import Batch, ViewConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from sslfast.data import Decoding, Manifest, Patience
    from sslfast.loaders.base import ImageLoader

LOADERS = {
    "pillow": "PillowLoader",
    "dali": "DaliLoader",
    "ffcv": "FFCVLoader",
    "synthetic": "SyntheticLoader",
}
"""Loader name, which is its module in ``sslfast.loaders`` -> class: an :class:`~sslfast.loaders.base.ImageLoader`. The
module also has ``status() -> (usable, what it runs on or why it cannot, remedy)``."""

LoaderName = Literal["auto", "pillow", "dali", "ffcv", "synthetic"]
ReaderName = Literal["auto", "pillow", "dali", "ffcv"]
"""Loaders that read images: for evaluations."""

DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Import name -> name on PyPI, where they differ."""

_MAX_WORKERS = 16


@dataclass(kw_only=True)
class LoaderConfig:
    """Where batches come from."""

    name: LoaderName = "auto"
    """auto: ffcv for a .beton file, pillow for image files. dali: JPEGs decoded on the GPU, not measured there yet.
    synthetic: synthetic images, to time everything else."""
    workers: int | None = resumable(None)
    """Decoding processes (dali, ffcv: threads) of each rank; 0: decode in the training process; None: the cores, shared
    by the ranks of this machine, at most 16."""
    on_bad_image: Literal["error", "skip"] = resumable("error")
    """error: stop at an image that cannot be used, naming it. skip: leave it out, put another one in its place, and
    list it at the end."""
    white_level: int | None = None
    """Sample value that is white in images of 16 bits a channel, often 1023, 4095 or 16383; None: as recorded with DATA
    by `sslfast data verify` or `prepare`, else 65535. Evaluations of the run use the same."""
    max_pixels: int | None = resumable(None)
    """Images of more pixels are unusable; None: 89,478,485, which take 0.3 to 2.3 GB of memory each, in every loader
    process at once."""
    shuffle: Literal["full", "shards"] = "full"
    """Order of an epoch. full: all rows. shards: tar shards, or row groups of Parquet files, are shuffled, then the
    rows of ``mixed_shards`` of them at a time, so that caches need hold no more; less random where a shard holds few
    classes. Parquet files are slow in full order, which decodes a whole row group for nearly every image."""
    mixed_shards: int = 16
    """Tar shards, or row groups of Parquet files, that ``shuffle shards`` mixes at a time."""
    timeout: float = resumable(LIMIT_SECONDS)
    """Seconds to wait for a batch when the storage does not answer or a process hangs; then the run saves a checkpoint
    and stops."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"loader.timeout must be a number of seconds above 0, got {self.timeout}")

    def decoding(self) -> "Decoding":
        """What the policy for images leaves to the user; ValueError out of range."""
        from sslfast.data import Decoding

        return Decoding(white_level=self.white_level, max_pixels=self.max_pixels)

    def decode(self, manifest: "Manifest") -> "Manifest":
        """The manifest with these options; ValueError where they contradict what is recorded in it."""
        from sslfast.data import combined

        asked = self.decoding()
        is_final = manifest.source.loader is not None
        return manifest.decoded(combined(manifest.source.decoding, asked, where=manifest.source, is_final=is_final))

    @classmethod
    def migrate(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Configurations of earlier versions: the pillow loader was called torch."""
        return {**data, "name": "pillow"} if data.get("name") == "torch" else dict(data)


class Loader(Protocol):
    """The interface of every loader."""

    @property
    def num_rows(self) -> int:
        """Rows of the manifest."""

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """Path and reason of every image left out so far."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of this rank from ``start_step`` on."""

    patience: "Patience"
    """With every batch: its limit, and what breaks a wait off."""

    def set_order(self, orders: "Callable[[int], NDArray[np.int64]]") -> None:
        """Take the rows of every epoch from a function of it."""

    def check(self) -> None:
        """Check that the loader can start, without reading an image."""

    def close(self) -> None:
        """End worker processes."""


def build_loader(
    config: LoaderConfig,
    *,
    views: Mapping[str, ViewConfig],
    batch_size: int,
    seed: int,
    manifest: "Manifest | None" = None,
    synthetic_rows: int | None = None,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The loader that ``config`` names.

    Args:
        config: which loader, and how.
        views: view name -> view, in the order of the method's ``views()``.
        batch_size: global batch over all ranks.
        seed: of the run.
        manifest: the images; ``synthetic`` takes its number of rows when ``synthetic_rows`` is not given.
        synthetic_rows: size of the data set that ``synthetic`` simulates.
        device, rank, world_size: of this process.
    """
    name: str = config.name
    if name == "auto":
        name, _ = choose_loader(manifest, device)
    _check_usable(name)
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "device": device,
    }
    if name == "synthetic":
        rows = len(manifest) if synthetic_rows is None and manifest is not None else synthetic_rows
        if rows is None:
            raise ValueError("no data: name a folder of images, or give the synthetic loader a number of rows")
        if config.shuffle != "full":
            raise ValueError(
                "--loader.shuffle shards is for tar shards and Parquet files, and the synthetic loader reads none"
            )
        from sslfast.loaders.synthetic import SyntheticLoader

        return SyntheticLoader(rows, views, **common)
    if manifest is None:
        raise ValueError(f"loader {name!r} reads images: name a folder, or use --loader.name synthetic")
    manifest = config.decode(manifest)
    check_readable(name, manifest, option="--loader.name")
    loader: type[ImageLoader] = getattr(_module(name), LOADERS[name])
    return loader(
        manifest,
        views,
        workers=default_workers() if config.workers is None else config.workers,
        on_bad_image=config.on_bad_image,
        mixed_shards=config.mixed_shards if config.shuffle == "shards" else None,
        timeout=config.timeout,
        **common,
    )


def choose_reader(name: ReaderName, manifest: "Manifest") -> str:
    """The loader that reads whole images of this data, as ``--loader`` of an evaluation says; auto: see
    :func:`choose_loader`.

    Raises:
        ValueError: it cannot be used here, or cannot read this data.
    """
    found = choose_loader(manifest, "cpu")[0] if name == "auto" else name
    _check_usable(found)
    check_readable(found, manifest, option="--loader")
    return found


def check_readable(name: str, manifest: "Manifest", *, option: str) -> None:
    """ValueError where the loader ``name`` cannot read the data; ``option`` chooses another one."""
    source = manifest.source
    if source.loader not in (None, name):
        raise ValueError(
            f"loader {name!r} reads files and {source} is a .{source.name} file: use {option} {source.loader}"
        )
    if source.loader is None and name not in loaders_for(manifest):
        raise ValueError(f"the {name} loader reads .beton files: make one with `sslfast data prepare {source}`")


def _check_usable(name: str) -> None:
    if name not in LOADERS:
        raise ValueError(f"loader must be one of auto, {', '.join(LOADERS)}, got {name!r}")
    usable, reason, remedy = _status(name)
    if not usable:
        raise ValueError(f"loader {name!r} cannot be used: {reason}; {remedy}")


def choose_loader(manifest: "Manifest | None", device: torch.device | str) -> tuple[str, str]:
    """The loader that ``auto`` stands for, and why, in a few words."""
    if manifest is None:
        return "synthetic", "there is no folder of images"
    if manifest.source.loader is not None:
        return manifest.source.loader, f"the data is a .{manifest.source.name} file"
    if torch.device(device).type == "cuda":
        return "pillow", "dali, which decodes JPEGs on the GPU, has not been measured there yet: --loader.name dali"
    return "pillow", "on a CPU DALI is no faster"


def loaders_for(manifest: "Manifest") -> list[str]:
    """The loaders that can read this data, usable here or not, and ``synthetic``."""
    from sslfast.data import all_sources

    own = manifest.source.loader
    others = {source.loader for source in all_sources()}
    return [name for name in LOADERS if name in (own, "synthetic") or (own is None and name not in others)]


def default_workers() -> int:
    """This rank's share of the machine's cores (torchrun says how many ranks it started here), 1 to 16."""
    from sslfast.data import available_cores

    return max(1, min(available_cores() // local_world_size(), _MAX_WORKERS))


def loader_status() -> dict[str, tuple[bool, str, str]]:
    """Loader name -> (usable, what it runs on or why it cannot, what to do about it)."""
    return {name: _status(name) for name in LOADERS}


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"sslfast.loaders.{name}")


def _status(name: str) -> tuple[bool, str, str]:
    try:
        status: tuple[bool, str, str] = _module(name).status()
    except ImportError as error:
        package = error.name or name
        remedy = f"pip install {DISTRIBUTIONS.get(package, package)}"
        return False, f"Python package {package!r} is not installed", remedy
    return status
