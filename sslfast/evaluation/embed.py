"""Embeddings of any images as a file: a row for each usable image, with its path and class.

Images are preprocessed as in evaluations; features go to the disk batch by batch and into the file a part at a time, so
memory does not grow with the number of images. Under torchrun the processes share them.
"""

import csv
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslfast.data import check_apart, open_data
from sslfast.distributed import distributed_device, together
from sslfast.evaluation.cache import FeatureCache, scratch_folder
from sslfast.evaluation.config import ImageConfig
from sslfast.evaluation.encoders import TRAINED, extract_images, extract_layers, load_run, trunk_encoders
from sslfast.evaluation.layers import check_layers
from sslfast.files import OUTPUT, make_folder, open_regular, replacing, temporary_beside, writing
from sslfast.text import csv_lines, printable

SUFFIXES = (".npy", ".parquet")
_ROWS_AT_ONCE = 1 << 12
"""Written together: 33 MB of 2048 columns, and a row group of a .parquet file."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ImageConfig):
    """Settings of :func:`embed`."""

    layer: str | None = None
    """conv1, res2, res3, res4, res5 (average-pooled to about 9,000 values, as Goyal et al. 2019 do) or res5avg; by
    default the trunk's output."""
    head: bool = False
    """The output of the projection head, whose vectors the loss compares (DINO: of the teacher's, before its last
    layer), in place of the trunk's features. RUN must hold one: a run, or a file such as MoCo's."""

    features_dir: Path | None = None
    """Folder for the features until they are written, in place of that of the output: on a disk of each machine, where
    the processes of torchrun share no files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_layers([self.layer])
        if self.layer is not None and self.head:
            raise ValueError(f"head takes the trunk's output, got layer={self.layer} too; give one of them")


@dataclass(frozen=True, kw_only=True, repr=False)
class Embeddings:
    """What :func:`sslfast.embed` returns."""

    values: Tensor
    """``[N, D]`` float32 on the CPU, not normalised; of a .npy file: mapped, not read."""
    rows: Tensor
    """``[N]`` int64: row of each image in the data set, ascending."""
    paths: list[str]
    """``[N]``, relative to the data set's root."""
    classes: list[str | None]
    """``[N]`` class names; None for images without a label."""
    left_out: list[tuple[str, str]]
    """Path and reason of each image that could not be used; empty for those of a file."""
    preprocessing: str
    """What was seen of an image; empty for those of a .npy file."""

    def __repr__(self) -> str:
        """Sizes: a list of a million paths is no help on a screen."""
        named = len({name for name in self.classes if name is not None})
        return (
            f"Embeddings({len(self.values)} x {self.values.shape[1]}, {named} classes, {len(self.left_out)} left out)"
        )


def embed(run: Path, data: Path, config: EmbedConfig = EmbedConfig(), *, output: Path = Path("embeddings.npy")) -> str:
    """Write the embeddings of every image, labelled or not, to a file.

    Args:
        run: run directory, or a file of weights.
        data: images: a folder with or without class folders, .tar files, a list, ...: whatever sslfast pretrain takes.
        config: settings.
        output: .npy: float32 [N, D], with row, path and class of each in a .csv beside it; .parquet: one table with
            the columns row, path, class and embedding.

    Under torchrun the processes share the images. Until the file is written its disk holds the features twice.

    Raises:
        ValueError, FileNotFoundError: the weights, the data or the settings cannot be used.
        WriteError: a file cannot be written.
    """
    found, remarks = _embed(run, data, config, output)
    left_out = f", {len(found.left_out)} images left out" if found.left_out else ""
    summary = f"{output}: {len(found.values):,} x {found.values.shape[1]:,}{left_out}"
    return "\n".join([summary, *(f"classes: {printable(line)}" for line in remarks)])


def _embed(run: Path, data: Any, config: EmbedConfig, output: Path) -> tuple[Embeddings, list[str]]:
    """The values are mapped from a file that is gone, until they are let go; and remarks about the classes."""
    check_suffix(output)
    check_apart([output, output.with_suffix(".csv")] if output.suffix == ".npy" else [output], [run, data])
    scratch = temporary_beside((config.features_dir or output.parent) / output.name)
    with distributed_device(config.device) as device, scratch_folder(scratch) as folder:
        found, remarks = _extract(run, data, config, device, FeatureCache(folder, needed_for=output))
        together(lambda: write_embeddings(found, output), only_main=True)
    return found, remarks


def embed_all(run: Path | str, data: Any, *, output: Path | str | None = None, **options: Any) -> Embeddings:
    """Embeddings of every image, labelled or not, in memory or in a file.

    Args:
        run: run directory, or a file of weights.
        data: images: a folder with or without class folders, .tar files, a list, a dataset, ...: whatever pretraining
            takes.
        output: .npy or .parquet file to write, as ``sslfast embed`` does; memory then does not grow with the images
            beyond their paths, and the values of a .npy file are mapped from it. None: in memory. Under torchrun every
            process must see the file.
        options: fields of :class:`EmbedConfig`: ``layer``, ``head``, ``size``, ``batch_size``, ``workers``,
            ``loader``, ``device``, ``on_bad_image``, ...

    Raises:
        ValueError, FileNotFoundError: the weights, the data or the settings cannot be used.
        WriteError: the file cannot be written.
    """
    unknown = options.keys() - EmbedConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}; embed takes {', '.join(EmbedConfig.__dataclass_fields__)}"
        )
    config = EmbedConfig(**options)
    if output is not None:
        found, _ = _embed(Path(run), data, config, Path(output))
        return replace(read_embeddings(output), left_out=found.left_out, preprocessing=found.preprocessing)
    with distributed_device(config.device) as device:
        return _extract(Path(run), data, config, device, FeatureCache(config.features_dir, keep=False))[0]


def _extract(
    run: Path, data: Any, config: EmbedConfig, device: torch.device, cache: FeatureCache
) -> tuple[Embeddings, list[str]]:
    """The embeddings, and remarks about the classes."""
    loaded = load_run(run, head=config.head, unit_head=False, prefix=config.prefix, patches=config.patches)
    manifest = open_data(data, on_bad_image=config.on_bad_image).decoded(config.decoding(run))
    size = loaded.size if config.size is None else config.size
    seen = config.seen(size)
    (reader,) = config.readers([manifest], size, seen)
    if config.layer is None:
        features = extract_images({TRAINED: loaded.encoders[TRAINED]}, reader, device=device, cache=cache)
    else:
        trunk = trunk_encoders(loaded, (TRAINED,))
        features = extract_layers(trunk, (config.layer,), reader, device=device, cache=cache)
    (values,) = features.values.values()
    labels = manifest.labels[features.rows.numpy()].tolist()
    found = Embeddings(
        values=values,
        rows=features.rows,
        paths=[manifest.paths[row] for row in features.rows.tolist()],
        classes=[manifest.classes[label] if label >= 0 else None for label in labels],
        left_out=[*manifest.excluded, *features.bad_images],
        preprocessing=reader.describe(),
    )
    return found, manifest.class_remarks()


def check_suffix(path: Path) -> None:
    """ValueError unless it is one of :data:`SUFFIXES`; ImportError where its package is missing."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"embeddings are kept in files {' or '.join(SUFFIXES)}, got {str(path)!r}; name such a file")
    if path.suffix == ".parquet":
        _import_pyarrow()


def write_embeddings(found: Embeddings, path: Path) -> None:
    """Write a file as :func:`embed` does, a part of the rows at a time, atomically."""
    check_suffix(path)
    (_write_parquet if path.suffix == ".parquet" else _write_npy)(found, path)


def read_embeddings(path: Path | str) -> Embeddings:
    """The contents of a file that :func:`embed` wrote: .npy is mapped, .parquet read into memory.

    Raises:
        ValueError: there is no such file, or it is of another kind.
    """
    path = Path(path)
    check_suffix(path)
    try:
        return _read_parquet(path) if path.suffix == ".parquet" else _read_npy(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no file of embeddings ({reason}); write it with sslfast embed") from None


def _parts(count: int) -> Iterator[slice]:
    for first in range(0, count, _ROWS_AT_ONCE):
        yield slice(first, first + _ROWS_AT_ONCE)


def _write_npy(found: Embeddings, path: Path) -> None:
    """Both files belong together at any time: between their renames there is no .npy, and one process renames."""
    with (
        _lock_of(path) as lock,
        replacing(path, remedy=OUTPUT) as values_path,
        replacing(path.with_suffix(".csv"), remedy=OUTPUT) as table_path,
        values_path.open("wb") as file,
        table_path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as names,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(found.values.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        names.writelines(csv_lines([["row", "path", "class"]]))
        for part in _parts(len(found.values)):
            file.write(np.ascontiguousarray(found.values[part].numpy(), dtype="<f4").tobytes())
            rows = zip(found.rows[part].tolist(), found.paths[part], found.classes[part], strict=True)
            names.writelines(csv_lines(rows))
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        path.unlink(missing_ok=True)


@contextmanager
def _lock_of(path: Path) -> Iterator[int]:
    """Descriptor of the folder of ``path``, to be locked; no file is left of it."""
    with writing(path, remedy=OUTPUT):
        make_folder(path.parent)
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_npy(path: Path) -> Embeddings:
    with open_regular(path):  # a pipe would be waited for
        values = np.load(path, mmap_mode="c", allow_pickle=False)
    if values.ndim != 2 or values.dtype != np.float32:
        raise ValueError(f"it holds {values.dtype} {list(values.shape)}, not float32 [N, D]")
    table = path.with_suffix(".csv")
    with open_regular(table) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        lines = [(int(line["row"]), line["path"], line["class"] or None) for line in csv.DictReader(text)]
    if len(lines) != len(values):
        raise ValueError(f"{table.name} has {len(lines)} lines for {len(values)} embeddings")
    return Embeddings(
        values=torch.from_numpy(values),
        rows=torch.tensor([row for row, _, _ in lines], dtype=torch.int64),
        paths=[name for _, name, _ in lines],
        classes=[label for _, _, label in lines],
        left_out=[],
        preprocessing="",
    )


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError("files .parquet need pyarrow: pip install pyarrow, or name a .npy file") from None


def _write_parquet(found: Embeddings, path: Path) -> None:
    pa, parquet = _import_pyarrow()
    columns = found.values.shape[1]
    fields = [("row", pa.int64()), ("path", pa.string()), ("class", pa.string())]
    schema = pa.schema(
        [*fields, ("embedding", pa.list_(pa.float32(), columns))], metadata={"preprocessing": found.preprocessing}
    )
    with replacing(path, remedy=OUTPUT) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for part in _parts(len(found.values)):
            arrays = [
                pa.array(found.rows[part].numpy()),
                pa.array([_text(name) for name in found.paths[part]], pa.string()),
                pa.array([None if name is None else _text(name) for name in found.classes[part]], pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(found.values[part].flatten().numpy()), columns),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _read_parquet(path: Path) -> Embeddings:
    _, parquet = _import_pyarrow()
    with open_regular(path) as file:
        table = parquet.read_table(file)
    embedding = table["embedding"].combine_chunks()
    values = embedding.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return Embeddings(
        values=torch.from_numpy(values.reshape(len(table), embedding.type.list_size)),
        rows=torch.tensor(table["row"].to_pylist(), dtype=torch.int64),
        paths=table["path"].to_pylist(),
        classes=table["class"].to_pylist(),
        left_out=[],
        preprocessing=(table.schema.metadata or {}).get(b"preprocessing", b"").decode(),
    )


def _text(path: str) -> str:
    """UTF-8 has no place for the bytes of a name that is not UTF-8: they are shown as escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
