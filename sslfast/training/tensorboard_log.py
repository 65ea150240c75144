"""TensorBoard event files."""

import os
import platform
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslfast.files import AppendFile
from sslfast.training.logging import LogContext, Logger, scalars

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import RecordWriter
except ImportError as error:
    raise ImportError(
        f"it needs the package tensorboard ({error}); pip install tensorboard, or pass --no-tensorboard"
    ) from error


class TensorBoardLog(Logger):
    """The numbers of every record as scalars, in ``tensorboard/`` of the run directory.

    An event file of this start. Its records are encoded by tensorboard and written here: tensorboard's own writer runs
    in a thread, which a full disk ends for good.
    """

    def __init__(self, context: LogContext) -> None:
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{platform.node()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = AppendFile(context.run.tensorboard / name)
        # The session's start hides what an earlier one wrote after the checkpoint that this one resumes from.
        start = SessionLog(status=SessionLog.START)
        self._begin = b"".join(
            map(
                _encoded,
                (
                    Event(wall_time=now, file_version="brain.Event:2"),
                    Event(wall_time=now, step=context.first_step + 1, session_log=start),
                ),
            )
        )

    def write(self, record: Mapping[str, Any]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
        self._add(values, record["step"], record["time"].get("unix_seconds", time.time()))

    def write_picture(self, name: str, path: Path, step: int) -> None:
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add([Summary.Value(tag=name, image=image)], step, time.time())

    def _add(self, values: list[Any], step: int, now: float) -> None:
        event = _encoded(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._file.write(event if self._file.size else self._begin + event)

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class _Bytes:
    """A file of one record, for tensorboard's encoder."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def _encoded(event: Event) -> bytes:
    file = _Bytes()
    RecordWriter(file).write(event.SerializeToString())
    return file.data
