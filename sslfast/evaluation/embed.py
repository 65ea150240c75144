"""Embeddings of any images as a file: a row for each usable image, with its path and class.

Images are preprocessed as in evaluations (a centre crop); features are written batch by batch, so memory does not grow
with the number of images.
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslfast.data import Manifest, open_data
from sslfast.device import resolve_device
from sslfast.distributed import world_size
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.encoders import TRAINED, TrunkEncoder, load_run, run_head
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.layers import check_layers, pooled_layers
from sslfast.files import OUTPUT, replacing

_NPY_HEADER = 128  # bytes, enough for the shape of any file


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ImageConfig):
    """Settings of :func:`embed`."""

    layer: str | None = None
    """conv1, res2, res3, res4, res5 (average-pooled to about 9,000 values, as Goyal et al. 2019 do) or res5avg; by
    default the trunk's output."""
    head: bool = False
    """The output of the method's projection head, whose vectors the loss compares, in place of the trunk's features;
    RUN must be a run directory or a checkpoint in one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layers([self.layer])
        if self.layer is not None and self.head:
            raise ValueError(f"head takes the trunk's output, got layer={self.layer} too; give one of them")


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What :func:`sslfast.embed` returns."""

    values: Tensor
    """``[N, D]`` float32 on the CPU, not normalised."""
    rows: Tensor
    """``[N]`` int64: row of each image in the data set, ascending."""
    paths: list[str]
    """``[N]``, relative to the data set's root."""
    classes: list[str | None]
    """``[N]`` class names; None for images without a label."""
    left_out: list[tuple[str, str]]
    """Path and reason of each image that could not be used."""


def embed(run: Path, data: Path, config: EmbedConfig = EmbedConfig(), *, output: Path = Path("embeddings.npy")) -> str:
    """Write the embeddings of every image, labelled or not, to a file.

    Args:
        run: run directory, or a file of weights.
        data: images: a folder with or without class folders, .tar files, a list, ...: whatever sslfast pretrain takes.
        config: settings.
        output: .npy: float32 [N, D], with row, path and class of each in a .csv beside it; .parquet: one table with
            the columns row, path, class and embedding.

    Raises:
        ValueError, FileNotFoundError: the weights, the data or the settings cannot be used.
    """
    writers = {".npy": _npy_file, ".parquet": _parquet_file}
    if output.suffix not in writers:
        raise ValueError(f"output must end in {' or '.join(writers)}, got {str(output)!r}")
    source = _Source(run, data, config)
    count = 0
    with ExitStack() as open_files:
        write: Callable[[list[int], Tensor], None] | None = None
        for rows, values in source:
            if write is None:
                write = open_files.enter_context(writers[output.suffix](output, source.manifest, values.shape[1]))
            write(rows, values)
            count += len(rows)
        if write is None:
            raise ValueError(f"no usable image in {data}; name a folder that holds images")
    left_out = f", {len(source.left_out)} images left out" if source.left_out else ""
    return f"{output}: {count:,} x {values.shape[1]:,}{left_out}"


def embed_all(run: Path | str, data: Path | str, **options: Any) -> Embeddings:
    """Embeddings of every image, labelled or not, in memory.

    Args:
        run: run directory, or a file of weights.
        data: images: a folder with or without class folders, .tar files, a list, ...: whatever pretraining takes.
        options: fields of :class:`EmbedConfig`: ``layer``, ``head``, ``size``, ``batch_size``, ``workers``,
            ``device``, ``on_bad_image``.

    Raises:
        ValueError, FileNotFoundError: the weights, the data or the settings cannot be used.
    """
    unknown = options.keys() - EmbedConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}; embed takes {', '.join(EmbedConfig.__dataclass_fields__)}"
        )
    source = _Source(Path(run), Path(data), EmbedConfig(**options))
    rows, parts = [], []
    for some, values in source:
        rows += some
        parts.append(values)
    if not parts:
        raise ValueError(f"no usable image in {data}; name a folder that holds images")
    return Embeddings(
        values=torch.cat(parts),
        rows=torch.tensor(rows, dtype=torch.int64),
        paths=[source.manifest.paths[row] for row in rows],
        classes=[_class_name(source.manifest, row) for row in rows],
        left_out=source.left_out,
    )


class _Source:
    """Batches ``(rows, float32 [B, D] on the CPU)`` of a data set, in row order."""

    def __init__(self, run: Path, data: Path, config: EmbedConfig) -> None:
        if world_size() > 1:
            raise ValueError(f"embed runs in one process, got {world_size()}; start it without torchrun")
        self._device = resolve_device(config.device)
        loaded = load_run(run)
        encoder = loaded.encoders[TRAINED]
        assert isinstance(encoder, TrunkEncoder)
        self._encoder, self._layer = encoder.to(self._device), config.layer
        self._head = _head(run, loaded.checkpoint).to(self._device) if config.head else None
        self.manifest = open_data(data, on_bad_image=config.on_bad_image).decoded(config.decoding(run))
        size = loaded.size if config.size is None else config.size
        self._reader = ImageReader(
            self.manifest, size, config.batch_size, config.workers, config.on_bad_image, config.seen(size)
        )

    @property
    def left_out(self) -> list[tuple[str, str]]:
        return [*self.manifest.excluded, *self._reader.bad_images]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[list[int], Tensor]]:
        for rows, images in self._reader(range(len(self.manifest))):
            images = images.to(self._device)
            if self._layer is None:
                values = self._encoder(images)
            else:
                pixels = self._encoder.prepare(images)
                values = pooled_layers(self._encoder.trunk, pixels, [self._layer])[self._layer]
            if self._head is not None:
                values = self._head(values)
            values = values.flatten(1).float().cpu()
            if not bool(values.isfinite().all()):
                first = self.manifest.paths[rows[int((~values.isfinite()).any(1).nonzero()[0])]]
                raise ValueError(f"the embedding of {first} is NaN or infinite, so the weights are broken; name others")
            yield rows, values


def _head(run: Path, checkpoint: Path) -> nn.Module:
    head = run_head(checkpoint)
    if head is None:
        raise ValueError(f"head needs a run directory, and {run} holds the trunk alone; leave head out")
    return head


def _class_name(manifest: Manifest, row: int) -> str | None:
    label = int(manifest.labels[row])
    return manifest.classes[label] if label >= 0 else None


@contextmanager
def _npy_file(output: Path, manifest: Manifest, columns: int) -> Iterator[Callable[[list[int], Tensor], None]]:
    """float32 ``[N, D]`` in NumPy's format 1.0, whose header is written last, when N is known."""
    table = output.with_suffix(".csv")
    with (
        replacing(output, remedy=OUTPUT) as values_path,
        replacing(table, remedy=OUTPUT) as table_path,
        values_path.open("wb") as file,
        table_path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as names,
    ):
        file.write(bytes(_NPY_HEADER))
        lines = csv.writer(names, lineterminator="\n")
        lines.writerow(["row", "path", "class"])
        count = 0

        def write(rows: list[int], values: Tensor) -> None:
            nonlocal count
            file.write(np.ascontiguousarray(values.numpy(), dtype="<f4").tobytes())
            lines.writerows([row, manifest.paths[row], _class_name(manifest, row)] for row in rows)
            count += len(rows)

        yield write
        file.seek(0)
        file.write(_npy_header(count, columns))


def _npy_header(rows: int, columns: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    start = b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little")
    return start + text.encode().ljust(_NPY_HEADER - len(start) - 1) + b"\n"


@contextmanager
def _parquet_file(output: Path, manifest: Manifest, columns: int) -> Iterator[Callable[[list[int], Tensor], None]]:
    """A row group for each batch."""
    try:
        pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError("writing .parquet files needs pyarrow: pip install pyarrow, or name a .npy file") from None
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("path", pa.string()),
            ("class", pa.string()),
            ("embedding", pa.list_(pa.float32(), columns)),
        ]
    )
    with replacing(output, remedy=OUTPUT) as path, parquet.ParquetWriter(path, schema) as writer:

        def write(rows: list[int], values: Tensor) -> None:
            flat = pa.array(values.flatten().numpy())
            columns_of = [
                pa.array(rows, pa.int64()),
                pa.array([_text(manifest.paths[row]) for row in rows], pa.string()),
                pa.array([_class_name(manifest, row) for row in rows], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, columns),
            ]
            writer.write_table(pa.Table.from_arrays(columns_of, schema=schema))

        yield write


def _text(path: str) -> str:
    """UTF-8 has no place for the bytes of a name that is not UTF-8: they are shown as escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
