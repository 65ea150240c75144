"""``sslfast embed``: the embeddings of any images, as a file for search, clustering or another classifier."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.data import Manifest
from sslfast.distributed import distributed_device, together
from sslfast.evaluation.cache import FeatureCache
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.encoders import TRAINED, extract_all, extract_layers, load_run, trunk_encoders
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.layers import check_layers
from sslfast.evaluation.preprocessing import describe
from sslfast.evaluation.results import cache_folder
from sslfast.files import OUTPUT, open_regular, replacing, write_file

SUFFIXES = (".parquet", ".npy")
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ImageConfig):
    """Settings of :func:`embed`."""

    layer: str | None = None
    """In place of the trunk's output, the pooled map of conv1, res2, res3, res4, res5 or res5avg, flattened."""
    head: bool = False
    """The projection head's unit vectors, of a method or file that has one."""
    cache: bool = True
    """Keep features in RUN/evaluation/features and read them from there; the folder may be deleted. Without it they
    must fit into memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layers((self.layer,))
            if self.head:
                raise ValueError(f"layer and head exclude each other, got layer={self.layer} and head")


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of images, in the order of their paths."""

    values: Tensor
    """``[N, D]`` float32; of a cache: a mapped file."""
    paths: list[str]
    """Of each image, relative to the data."""
    rows: Tensor
    """``[N]`` int64: its number among all images of the data."""
    classes: list[str | None]
    """Its class (its folder, or a label of a list); None where it has none."""
    preprocessing: str = ""
    """What was seen of an image; empty where a file does not say it."""


def embed(
    run: Path | str, data: Path | str, config: EmbedConfig = EmbedConfig(), *, output: Path | None = None
) -> Embeddings:
    """Embeddings of all images of a folder, labelled or not, by a run's encoder.

    Args:
        run: run directory, or a file of weights.
        data: folder of images, flat or with a folder for each class, archive or list.
        config: settings.
        output: file to write. FILE.parquet: columns path, row, class and embedding (needs pyarrow). FILE.npy: the
            embeddings [N, D], with path, row and class in FILE.csv. The command needs it.

    Under torchrun the processes share the images.

    Raises:
        ValueError: data that cannot be used, a layer or head that is not there, another suffix.
        ImportError: pyarrow is missing.
    """
    if output is not None:
        check_suffix(output)
    with distributed_device(config.device) as device:
        manifest = Manifest.scan(data, on_bad_image=config.on_bad_image).decoded(config.decoding(run))
        loaded = load_run(run, head=config.head, prefix=config.prefix)
        size = loaded.size if config.size is None else config.size
        seen, cache = config.seen(size), FeatureCache(cache_folder(run) if config.cache else None)
        if config.layer is None:
            features = extract_all(
                {TRAINED: loaded.encoders[TRAINED]},
                manifest,
                size=size,
                batch_size=config.batch_size,
                device=device,
                workers=config.workers,
                on_bad_image=config.on_bad_image,
                preprocessing=seen,
                cache=cache,
            )
        else:
            reader = ImageReader(manifest, size, config.batch_size, config.workers, config.on_bad_image, seen)
            trunk = trunk_encoders(loaded, (TRAINED,))
            features = extract_layers(trunk, (config.layer,), reader, device=device, cache=cache)
        (values,) = features.values.values()
        labels = manifest.labels[features.rows.numpy()].tolist()
        found = Embeddings(
            values=values,
            paths=[manifest.paths[row] for row in features.rows.tolist()],
            rows=features.rows,
            classes=[manifest.classes[label] if label >= 0 else None for label in labels],
            preprocessing=describe(seen, size),
        )
        if output is not None:
            together(lambda: write_embeddings(found, output), only_main=True)
        return found


def embed_command(
    run: Path, data: Path, config: EmbedConfig = EmbedConfig(), *, output: Path = Path("embeddings.npy")
) -> str:
    """Embeddings of all images of a folder, labelled or not, by a run's encoder.

    Args:
        run: run directory, or a file of weights.
        data: folder of images, flat or with a folder for each class, archive or list.
        config: settings.
        output: file to write. FILE.parquet: columns path, row, class and embedding (needs pyarrow). FILE.npy: the
            embeddings [N, D], with path, row and class in FILE.csv.

    Under torchrun the processes share the images.
    """
    found = embed(run, data, config, output=output)
    return f"{output}: {len(found.values):,} images, {found.values.shape[1]:,} columns"


def check_suffix(path: Path) -> None:
    """ValueError unless it is one of :data:`SUFFIXES`; ImportError where its package is missing."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"embeddings are written as {' or '.join(SUFFIXES)}, got {str(path)!r}; name such a file")
    if path.suffix == ".parquet":
        _import_pyarrow()


def write_embeddings(found: Embeddings, path: Path) -> None:
    """Write the file that :func:`embed` describes, a part of the rows at a time, atomically."""
    check_suffix(path)
    if path.suffix == ".parquet":
        _write_parquet(found, path)
        return
    with replacing(path, remedy=OUTPUT) as temporary, temporary.open("wb") as file:
        shape = tuple(found.values.shape)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for first in range(0, len(found.values), _ROWS_AT_ONCE):
            file.write(found.values[first : first + _ROWS_AT_ONCE].contiguous().numpy().astype("<f4").tobytes())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "row", "class"))
    for name, row, label in zip(found.paths, found.rows.tolist(), found.classes, strict=True):
        table.writerow((name, row, "" if label is None else label))
    write_file(path.with_suffix(".csv"), text.getvalue().encode("utf-8", "surrogateescape"), remedy=OUTPUT)


def read_embeddings(path: Path | str) -> Embeddings:
    """A file of :func:`embed`; the embeddings of ``.npy`` are mapped.

    Raises:
        ValueError: no such file, or not of this kind.
    """
    path = Path(path)
    check_suffix(path)
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_npy(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no file of embeddings ({reason}); write it again with sslfast embed") from None


def _read_npy(path: Path) -> Embeddings:
    values = np.load(path, mmap_mode="c", allow_pickle=False)
    if values.ndim != 2 or values.dtype != np.float32:
        raise ValueError(f"it holds {values.dtype} {list(values.shape)}, not float32 [N, D]")
    with open_regular(path.with_suffix(".csv")) as file:
        lines = list(csv.DictReader(io.StringIO(file.read().decode("utf-8", "surrogateescape"), newline="")))
    if len(lines) != len(values):
        raise ValueError(f"{path.with_suffix('.csv').name} has {len(lines)} lines for {len(values)} embeddings")
    return Embeddings(
        values=torch.from_numpy(values),
        paths=[line["path"] for line in lines],
        rows=torch.tensor([int(line["row"]) for line in lines], dtype=torch.int64),
        classes=[line["class"] or None for line in lines],
    )


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"parquet files need pyarrow ({error}): pip install pyarrow, or write FILE.npy in place of it"
        ) from None
    return pyarrow


def _write_parquet(found: Embeddings, path: Path) -> None:
    pa = _import_pyarrow()
    width = found.values.shape[1]
    columns = [("path", pa.string()), ("row", pa.int64()), ("class", pa.string())]
    notes = {"preprocessing": found.preprocessing}
    schema = pa.schema([*columns, ("embedding", pa.list_(pa.float32(), width))], metadata=notes)
    with (
        replacing(path, remedy=OUTPUT) as temporary,
        temporary.open("wb") as file,
        pa.parquet.ParquetWriter(file, schema) as writer,
    ):
        for first in range(0, len(found.values), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            flat = pa.array(found.values[part].contiguous().numpy().ravel())
            arrays = [
                pa.array([name.encode("utf-8", "backslashreplace").decode() for name in found.paths[part]]),
                pa.array(found.rows[part].numpy()),
                pa.array(found.classes[part], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, width),
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _read_parquet(path: Path) -> Embeddings:
    pa = _import_pyarrow()
    with open_regular(path) as file:
        table = pa.parquet.read_table(file)
    embedding = table["embedding"].combine_chunks()
    values = embedding.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return Embeddings(
        values=torch.from_numpy(values.reshape(len(table), embedding.type.list_size).copy()),
        paths=table["path"].to_pylist(),
        rows=torch.tensor(table["row"].to_pylist(), dtype=torch.int64),
        classes=table["class"].to_pylist(),
        preprocessing=(table.schema.metadata or {}).get(b"preprocessing", b"").decode(),
    )
