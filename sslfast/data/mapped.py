"""Objects with large arrays in a file that several processes of a machine map: they hold the arrays once."""

import mmap
import os
import pickle
import struct
from pathlib import Path
from typing import Any

_ALIGNMENT = 64
_NUMBER = struct.Struct("<q")


def write_pickle(value: Any, path: Path) -> None:
    """Write a file for :func:`mapped_pickle`, which the user alone may read: its arrays lie in it as they are."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(b"".join(map(_NUMBER.pack, (len(parts), *map(len, parts)))))
        for part in parts:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(part)


def mapped_pickle(path: Path) -> Any:
    """The object that a process of the same run has written. The file may be deleted afterwards; what is written to
    the arrays is this process's own."""
    with open(path, "rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    (count,) = _NUMBER.unpack_from(whole)
    parts, place = [], _NUMBER.size * (1 + count)
    for number in range(count):
        (size,) = _NUMBER.unpack_from(whole, _NUMBER.size * (1 + number))
        place += -place % _ALIGNMENT
        parts.append(whole[place : place + size])
        place += size
    return pickle.loads(parts[0], buffers=parts[1:])
