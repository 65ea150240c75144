"""The content of a sharded checkpoint: raw tensors in one file a rank, and an index of them in JSON.

The index (``index.json``, its SHA-256 beside it) holds the state with a number in place of every tensor, dtype and
shape of each, and of every file its blocks in their order: which tensor, first element, number of elements, SHA-256. A
block has at most ``BLOCK_BYTES``, so that any part of a tensor is read and verified without the rest. Files are
little-endian elements and nothing else; no byte of a checkpoint is executed.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.distributed import Shard, shard_bounds
from sslfast.files import open_regular, reason_of, write_file
from sslfast.runs.checkpoint_store import CorruptCheckpointError

INDEX = "index.json"
BLOCK_BYTES = 1 << 25
"""Largest block, and largest buffer that reading and writing need."""
_FORMAT = "sslfast sharded checkpoint 1"
_FILE = re.compile(r"rank_\d{5,}\.bin")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
Block = tuple[int, int, int, str]
"""Number of the tensor, first element, number of elements, SHA-256."""


class Part(NamedTuple):
    """Elements of a tensor that a rank writes."""

    tensor: int
    first: int
    values: Tensor
    """``[n]``."""


def part_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.bin"


def pack(state: Mapping[str, Any]) -> tuple[Any, list[tuple[str, Tensor | Shard]]]:
    """The state in JSON's types with a number in place of every tensor, and these tensors with their names.

    Raises:
        TypeError: it holds something else than dicts, lists, tuples, tensors, shards, texts and numbers.
    """
    tensors: list[tuple[str, Tensor | Shard]] = []

    def packed(value: Any, name: str) -> Any:
        if isinstance(value, Tensor | Shard):
            tensors.append((name, value))
            return {"tensor": len(tensors) - 1}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return {"dict": [[packed(key, name), packed(inner, f"{name}/{key}")] for key, inner in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [packed(inner, f"{name}/{i}") for i, inner in enumerate(value)]}
        if isinstance(value, list):
            return [packed(inner, f"{name}/{i}") for i, inner in enumerate(value)]
        raise TypeError(f"a checkpoint cannot hold {name}, which is of type {type(value).__name__}")

    return packed(state, ""), tensors


def own_parts(tensors: Sequence[tuple[str, Tensor | Shard]], *, is_main: bool) -> Iterator[Part]:
    """What this rank writes: its shards, and on rank 0 every whole tensor."""
    for number, (_, value) in enumerate(tensors):
        if isinstance(value, Shard):
            yield Part(number, value.first, value.values)
        elif is_main:
            yield Part(number, 0, value.detach().reshape(-1))


def layout(tensors: Sequence[tuple[str, Tensor | Shard]]) -> list[dict[str, Any]]:
    """Name, dtype and shape of each tensor, as the index has them.

    Raises:
        TypeError: a dtype that checkpoints do not hold.
    """
    found = []
    for name, value in tensors:
        dtype = str((value.values if isinstance(value, Shard) else value).dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TypeError(f"a checkpoint cannot hold {name} of type {dtype}; known: {', '.join(_DTYPES)}")
        found.append({"name": name.removeprefix("/"), "dtype": dtype, "shape": list(value.shape)})
    return found


def write_part(path: Path, parts: Iterable[Part]) -> list[Block]:
    """Write a rank's file durably, block by block; on the host it takes a block of memory. Raises OSError."""
    blocks: list[Block] = []
    with path.open("wb") as file:
        for number, first, values in parts:
            for block in values.split(_block_length(values)) if len(values) else ():
                data = memoryview(block.cpu().contiguous().view(torch.uint8).numpy())
                file.write(data)
                blocks.append((number, first, len(block), hashlib.sha256(data).hexdigest()))
                first += len(block)
        file.flush()
        os.fsync(file.fileno())
    return blocks


def _block_length(values: Tensor) -> int:
    return max(1, BLOCK_BYTES // values.element_size())


def write_index(folder: Path, state: Any, tensors: list[dict[str, Any]], blocks: Sequence[Sequence[Block]]) -> None:
    """Write the index of the files of all ranks, durably, once they are complete.

    Raises:
        OSError: the disk fails; a file is not there or not whole, as where ranks do not share the folder.
    """
    files = [{"name": part_file(rank), "blocks": own} for rank, own in enumerate(blocks)]
    sizes = [_DTYPES[entry["dtype"]].itemsize for entry in tensors]
    for rank, own in enumerate(blocks):
        path, size = folder / part_file(rank), sum(count * sizes[number] for number, _, count, _ in own)
        if not path.is_file() or path.stat().st_size != size:
            raise OSError(errno.ENOENT, f"rank 0 does not see the file of rank {rank} there")
    text = json.dumps({"format": _FORMAT, "tensors": tensors, "files": files, "state": state})
    write_file(folder / INDEX, text)
    write_file(folder / f"{INDEX}.sha256", f"{hashlib.sha256(text.encode()).hexdigest()}  {INDEX}\n")


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """Some elements of a tensor in a file."""

    path: Path
    offset: int
    first: int
    count: int
    sha256: str

    def read(self, dtype: torch.dtype) -> Tensor:
        """``[count]`` on the CPU, verified.

        Raises:
            CorruptCheckpointError, FileNotFoundError: it is damaged, or gone.
        """
        data = bytearray(self.count * dtype.itemsize)
        where = f"checkpoint {self.path.parent}: {self.path.name}"
        try:
            with open_regular(self.path) as file:
                file.seek(self.offset)
                size = file.readinto(data)
        except FileNotFoundError:
            raise FileNotFoundError(f"{where} does not exist; copy the whole folder or use another") from None
        except OSError as error:
            raise CorruptCheckpointError(f"{where} cannot be read ({reason_of(error)})") from None
        if size != len(data) or hashlib.sha256(data).hexdigest() != self.sha256:
            raise CorruptCheckpointError(f"{where} is damaged or truncated (block at byte {self.offset})")
        return torch.frombuffer(data, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in the files of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: list[StoredBlock]
    """In the order of elements, which they cover without gaps."""

    def read(self) -> Tensor:
        """The whole tensor on the CPU, verified; errors as of :meth:`StoredBlock.read`."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.read_into_(whole)
        return whole

    @torch.no_grad()
    def read_into_(self, target: Tensor, *, first: int = 0) -> None:
        """Fill ``target``, on any device, with the elements from ``first`` on; on the host it takes a block of memory.

        Errors as of :meth:`StoredBlock.read`.
        """
        if not target.is_contiguous():
            whole = torch.empty(target.shape, dtype=target.dtype)
            self.read_into_(whole, first=first)
            target.copy_(whole)
            return
        flat = target.detach().view(-1)
        for block in self.blocks:
            start, end = max(block.first, first), min(block.first + block.count, first + len(flat))
            if start < end:
                values = block.read(self.dtype)
                flat[start - first : end - first].copy_(values[start - block.first : end - block.first])


class TensorTable(Mapping[Any, Any]):
    """A table of a checkpoint whose tensors are read when they are asked for, each time anew."""

    def __init__(self, stored: dict[Any, Any]) -> None:
        self.stored = stored
        """With a :class:`StoredTensor` for each tensor."""

    def __getitem__(self, key: Any) -> Any:
        value = self.stored[key]
        return value.read() if isinstance(value, StoredTensor) else value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, key: object) -> bool:
        return key in self.stored


def read_sharded(folder: Path, *, verify: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """The state of a sharded checkpoint, with a :class:`TensorTable` for each dict of tensors.

    Args:
        folder: of the checkpoint.
        verify: (r, R): also read and verify the r-th of R parts of all blocks; R = 0: none. The index and the sizes of
            all files are always verified, and every block when it is read.

    Raises:
        FileNotFoundError: there is no such folder.
        CorruptCheckpointError: something is damaged or missing.
    """
    content = _read_index(folder)
    try:
        tensors, blocks = _tensors(folder, content)
        state = _unpacked(content["state"], tensors)
    except CorruptCheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError):
        raise CorruptCheckpointError(f"{folder / INDEX} is not the index of a checkpoint of sslfast") from None
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{folder} is not a checkpoint of sslfast (no step in it); use another")
    number, parts = verify
    if parts:
        bounds = shard_bounds(len(blocks), parts)
        for block, dtype in blocks[bounds[number] : bounds[number + 1]]:
            block.read(dtype)
    return state


def _read_index(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist; give the path of a step_* checkpoint")
    try:
        with open_regular(folder / INDEX) as file, open_regular(folder / f"{INDEX}.sha256") as sums:
            data, expected = file.read(), sums.read(64).decode("ascii", "replace")
    except OSError as error:
        raise CorruptCheckpointError(f"{folder / INDEX} cannot be read ({reason_of(error)})") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise CorruptCheckpointError(f"{folder / INDEX} is damaged or truncated ({len(data)} bytes)")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CorruptCheckpointError(f"{folder / INDEX} is not the index of a checkpoint of this version of sslfast")
    return content


def _tensors(folder: Path, content: Any) -> tuple[list[StoredTensor], list[tuple[StoredBlock, torch.dtype]]]:
    """All tensors, and all blocks in the order of files, with sizes checked."""
    dtypes = [_DTYPES[entry["dtype"]] for entry in content["tensors"]]
    found: list[list[StoredBlock]] = [[] for _ in dtypes]
    blocks: list[tuple[StoredBlock, torch.dtype]] = []
    for file in content["files"]:
        name, offset = str(file["name"]), 0
        if not _FILE.fullmatch(name):
            raise ValueError(name)
        path = folder / name
        for number, first, count, sha256 in file["blocks"]:
            if min(number, first) < 0 or count < 1:
                raise ValueError(name)
            block = StoredBlock(path=path, offset=offset, first=first, count=count, sha256=str(sha256))
            found[number].append(block)
            blocks.append((block, dtypes[number]))
            offset += count * dtypes[number].itemsize
        _check_size(path, offset)
    tensors = []
    for entry, dtype, own in zip(content["tensors"], dtypes, found, strict=True):
        shape = tuple(int(side) for side in entry["shape"])
        own.sort(key=lambda block: block.first)
        end = 0
        for block in own:
            if block.first != end:
                raise ValueError(entry["name"])
            end += block.count
        if min(shape, default=0) < 0 or end != torch.Size(shape).numel():
            raise ValueError(entry["name"])
        tensors.append(StoredTensor(name=str(entry["name"]), dtype=dtype, shape=shape, blocks=own))
    return tensors, blocks


def _check_size(path: Path, size: int) -> None:
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise CorruptCheckpointError(
            f"checkpoint {path.parent} lacks {path.name} ({reason_of(error)}); copy the whole folder or use another"
        ) from None
    if found != size:
        raise CorruptCheckpointError(
            f"checkpoint {path.parent} is damaged: {path.name} has {found} bytes in place of {size}"
        )


def _unpacked(value: Any, tensors: list[StoredTensor]) -> Any:
    if isinstance(value, list):
        return [_plain(_unpacked(inner, tensors)) for inner in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_plain(_unpacked(inner, tensors)) for inner in content)
    if kind != "dict":
        raise ValueError(kind)
    table = {key: _unpacked(inner, tensors) for key, inner in content}
    return TensorTable(table) if any(isinstance(inner, StoredTensor) for inner in table.values()) else table


def _plain(value: Any) -> Any:
    return value.read() if isinstance(value, StoredTensor) else value


def restored(stored: Any, current: Any, first_rows: Mapping[str, int] | None = None) -> Any:
    """``stored``, of a checkpoint, with every tensor in memory: what a ``load_state_dict`` takes.

    A tensor that has its shape and dtype in ``current`` too is read into that one, which becomes the value: nothing is
    held twice. Of an entry named in ``first_rows`` the rows from that one on are read.

    Args:
        stored: table of a checkpoint of any store.
        current: state of the same object as it is, of which this rank may hold a part.
        first_rows: name -> first row that this rank holds.
    """
    if not isinstance(stored, Mapping):
        return stored
    own = current if isinstance(current, Mapping) else {}
    found = {}
    for key, value in (stored.stored if isinstance(stored, TensorTable) else stored).items():
        if isinstance(value, StoredTensor):
            found[key] = _read_where_it_fits(value, own.get(key), (first_rows or {}).get(key))
        else:
            found[key] = restored(value, own.get(key))
    return found


def _read_where_it_fits(stored: StoredTensor, target: Any, first_row: int | None) -> Tensor:
    if isinstance(target, Tensor) and target.dtype == stored.dtype:
        if first_row is None and target.shape == stored.shape:
            stored.read_into_(target)
            return target
        if (
            first_row is not None
            and target.shape[1:] == stored.shape[1:]
            and first_row + len(target) <= stored.shape[0]
        ):
            stored.read_into_(target, first=first_row * torch.Size(stored.shape[1:]).numel())
            return target
    return stored.read()
