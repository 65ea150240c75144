"""Worker processes that fill batches: tasks and answers through pipes, pixels through memory that they share."""

import mmap
import multiprocessing
import os
import pickle
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection, forkserver, reduction
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslfast.data import (
    BadImageError,
    LostBatchError,
    Patience,
    SourceError,
    cannot_start,
    exit_with_parent,
    ignore_signals,
    refuse_in_bootstrap,
    signals_held,
    silence_pillow,
    why_ended,
)
from sslfast.loaders.decode import BatchDecoder

PREFETCH = 2  # batches in flight per worker
PROCESS_BYTES = 64 << 20  # what a forked worker has for itself: heap, one photograph
_SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT = 64
_REMEDY = "use fewer workers (--loader.workers), a smaller batch, or more memory"
_KILL_SECONDS = 5.0

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape of the crops of a batch, in one process."""


def slot_bytes(shapes: Shapes, batch: int) -> int:
    """Memory of one batch in flight."""
    return _Layout(shapes, batch, slots=1).slot_bytes


class _Layout:
    """Where things lie in the shared memory.

    First int64 numbers: the generation, then the row that each worker reads. Then ``slots`` times: sample ids as
    planned, sample ids as decoded, the crops of each view.
    """

    def __init__(self, shapes: Shapes, batch: int, *, slots: int) -> None:
        self.shapes, self.batch, self.slots = dict(shapes), batch, slots
        self.head_bytes = _aligned(8 * (1 + slots))
        self.slot_bytes = 2 * _aligned(8 * batch) + sum(_aligned(int(np.prod(s))) for s in self.shapes.values())
        self.bytes = self.head_bytes + slots * self.slot_bytes


class _Memory:
    """Anonymous memory that processes share; inherited by fork, sent as a descriptor to others.

    On Linux it is no file of /dev/shm, so that neither its size nor what other programs put there matters.
    """

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        self._descriptor = _anonymous_file(layout.bytes)
        self._map()

    def _map(self) -> None:
        self._close = Finalize(self, os.close, args=(self._descriptor,))
        buffer = mmap.mmap(self._descriptor, self.layout.bytes)
        self._all = np.frombuffer(buffer, dtype=np.uint8)
        self.head = self._all[: 8 * (1 + self.layout.slots)].view(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layout, self._descriptor = state["layout"], state["descriptor"].detach()
        self._map()

    def slot(self, number: int) -> tuple[NDArray[np.int64], Tensor, dict[str, Tensor]]:
        """Sample ids as planned, as decoded, and crops."""
        layout, start = self.layout, self.layout.head_bytes + number * self.layout.slot_bytes

        def take(count: int) -> NDArray[np.uint8]:
            nonlocal start
            part = self._all[start : start + count]
            start += _aligned(count)
            return part

        planned, decoded = (take(8 * layout.batch).view(np.int64) for _ in range(2))
        crops = {name: torch.from_numpy(take(int(np.prod(shape)))).view(shape) for name, shape in layout.shapes.items()}
        return planned, torch.from_numpy(decoded), crops


class _Parcel:
    """An object for worker processes: inherited by fork, else pickled once, into anonymous memory.

    Not through the pipe of a starting process: one that dies early leaves its parent writing into it forever.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self._descriptor is None:
            data = pickle.dumps(self.value, protocol=pickle.HIGHEST_PROTOCOL)
            self._descriptor = _anonymous_file(len(data))
            Finalize(self, os.close, args=(self._descriptor,))
            with mmap.mmap(self._descriptor, len(data)) as buffer:
                buffer[:] = data
        return {"descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        descriptor = state["descriptor"].detach()
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as buffer:
            self.value = pickle.loads(buffer)
        os.close(descriptor)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _anonymous_file(count: int) -> int:
    """Descriptor of a file without a name. LostBatchError where there is no memory or no free descriptor."""
    try:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("sslfast", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, count)
            return descriptor
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, count)  # a page that is not there would kill a worker later
            else:
                os.ftruncate(file.fileno(), count)
            return os.dup(file.fileno())
    except OSError as error:
        raise LostBatchError(
            f"{count / 2**20:.0f} MiB of shared memory cannot be had ({error.strerror}): {_REMEDY}, or free "
            f"{_SHARED_MEMORY} (docker: --shm-size=8g)"
        ) from None


class WorkerPool:
    """Processes that decode batches, in order: batch ``n`` by worker ``n % workers``, two in flight for each.

    All memory is reserved when the first batch is asked for. A worker that dies is noticed at once, one that hangs
    after the limit of ``patience``. The start method is multiprocessing's: fork, spawn or forkserver.

    Args:
        decoder: of the batches.
        shapes: of their crops, uint8 ``[B, 3, S, S]`` by name.
        batch: B.
        workers: processes.
        where: row -> path, for messages.
        patience: with every batch.
    """

    def __init__(
        self,
        decoder: BatchDecoder,
        *,
        shapes: Shapes,
        batch: int,
        workers: int,
        where: Callable[[int], str],
        patience: Patience,
    ) -> None:
        refuse_in_bootstrap()
        self._parcel, self._workers, self._where, self._patience = _Parcel(decoder), workers, where, patience
        self._layout = _Layout(shapes, batch, slots=workers * PREFETCH)
        self._memory: _Memory | None = None
        self.processes: list[BaseProcess] = []
        self._pipes: list[connection.Connection] = []
        self._started: set[int] = set()
        self._generation = self._given = 0
        self._asked: deque[tuple[int, int]] = deque()
        # Also at interpreter exit, before multiprocessing waits for its children.
        self._kill = Finalize(self, _kill, args=(self.processes, self._pipes), exitpriority=100)

    def start(self) -> None:
        """Start the processes, once. LostBatchError where the system refuses."""
        if self._memory is not None:
            return
        self._memory = _Memory(self._layout)
        context = multiprocessing.get_context()
        is_main_thread = threading.current_thread() is threading.main_thread()
        if context.get_start_method() == "forkserver":
            forkserver.ensure_running()  # before signals are held: the server serves others too
        for number in range(self._workers):
            what = f"loader process {number + 1} of {self._workers}"
            try:
                own, other = context.Pipe()
                process = context.Process(
                    target=_serve, args=(other, self._memory, self._parcel, number, is_main_thread), daemon=True
                )
                with signals_held():
                    process.start()
                    self.processes.append(process)
            except (EOFError, OSError) as error:
                raise cannot_start(error, what, _REMEDY) from None
            other.close()
            self._pipes.append(own)

    def check(self) -> None:
        """Start the processes and wait until each of them could begin."""
        self.start()
        for number in range(self._workers):
            why = f"loader process {number + 1} of {self._workers} to start: {_REMEDY}"
            self._patience.wait(partial(self._has_started, number), partial(str, why))

    def _has_started(self, number: int, seconds: float) -> bool:
        if number not in self._started:
            self._hear(number, seconds)
        return number in self._started

    def restart(self) -> None:
        """Drop everything that was asked for."""
        self._asked.clear()
        self._generation += 1
        if self._memory is not None:
            self._memory.head[0] = self._generation

    @property
    def room(self) -> int:
        """How many more batches can be asked for."""
        return self._layout.slots - len(self._asked)

    def ask(self, epoch: int, sample_ids: NDArray[np.int64]) -> None:
        """Ask for a batch."""
        self.start()
        assert self._memory is not None
        self._memory.head[0] = self._generation
        token, number = self._given, self._given % self._workers
        slot = token % self._layout.slots
        self._memory.slot(slot)[0][:] = sample_ids
        self._given += 1
        self._asked.append((token, number))
        with suppress(OSError):  # a dead worker, which next() reports
            self._pipes[number].send((token, slot, self._generation, epoch))

    def next(self, *, pinned: bool) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, str]]]:
        """The batch asked for first: copies of its sample ids and crops, and the bad rows found.

        Raises:
            ValueError: an image that must not train.
            LostBatchError, WaitInterruptedError: see :class:`Patience`.
        """
        assert self._memory is not None
        token, number = self._asked[0]
        answer: list[Any] = []

        def ready(seconds: float) -> bool:
            message = self._hear(number, seconds)
            if message is not None and message[0] == token:
                answer.append(message[1])
            return bool(answer)

        self._patience.wait(ready, lambda: self._hang(number))
        self._asked.popleft()
        kind, value = answer[0]
        if kind == "error":
            raise ValueError(value)
        if kind == "failed":
            raise RuntimeError(f"loader process {number + 1} failed:\n{value}")
        _, sample_ids, crops = self._memory.slot(token % self._layout.slots)
        copies = {name: torch.empty(crop.shape, dtype=crop.dtype, pin_memory=pinned) for name, crop in crops.items()}
        for name, crop in crops.items():
            # Not copy_: its second thread then spins for milliseconds, on a core that a worker needs.
            np.copyto(copies[name].numpy(), crop.numpy())
        return (sample_ids.pin_memory() if pinned else sample_ids.clone()), copies, value

    def _hear(self, number: int, seconds: float) -> tuple[int, Any] | None:
        """What a worker says next, waiting for at most ``seconds``; LostBatchError where it has died."""
        pipe, process = self._pipes[number], self.processes[number]
        connection.wait([pipe, process.sentinel], timeout=seconds)
        try:
            if pipe.poll():
                message: tuple[int, Any] | None = pipe.recv()
                self._started.add(number)
                return message
        except (EOFError, OSError):
            process.join(_KILL_SECONDS)  # its pipe is closed before it is gone
        if process.is_alive():
            return None
        raise self._died(number)

    def _died(self, number: int) -> LostBatchError:
        code = self.processes[number].exitcode
        return LostBatchError(
            f"loader process {number + 1} of {self._workers} died{self._last(number)}: {why_ended(code or 0, _REMEDY)}"
        )

    def _hang(self, number: int) -> str:
        return (
            f"a batch of loader process {number + 1} of {self._workers}{self._last(number)}: the storage does not "
            "answer or the process is stopped; see that the data can be read, or raise --loader.timeout"
        )

    def _last(self, number: int) -> str:
        assert self._memory is not None
        row = int(self._memory.head[1 + number]) - 1
        return f" (last file {self._where(row)})" if row >= 0 else ""

    def close(self) -> None:
        """Kill the processes, whatever they do."""
        self._kill()
        self._memory = None


def _kill(processes: list[BaseProcess], pipes: Sequence[connection.Connection]) -> None:
    for process in processes:
        process.kill()  # they ignore SIGTERM
    for process in processes:
        process.join(_KILL_SECONDS)  # one in a system call that does not end stays behind
    for pipe in pipes:
        pipe.close()


def _serve(pipe: connection.Connection, memory: _Memory, parcel: _Parcel, number: int, main_thread: bool) -> None:
    """A worker: decode what is asked for until nobody asks any more. One thread per process."""
    ignore_signals()
    exit_with_parent(started_by_main_thread=main_thread)
    torch.set_num_threads(1)
    silence_pillow()
    decoder = parcel.value
    # Nothing here touches another process's state: a worker may be killed at any moment.

    def reading(row: int) -> None:
        memory.head[1 + number] = row + 1

    decoder.reading = reading
    with suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            token, slot, generation, epoch = pipe.recv()
            pipe.send((token, _fill(decoder, memory, slot, epoch) if generation == memory.head[0] else None))


def _fill(decoder: BatchDecoder, memory: _Memory, slot: int, epoch: int) -> tuple[str, Any]:
    planned, sample_ids, crops = memory.slot(slot)
    try:
        batch = decoder(epoch, planned.copy(), crops)
    except (BadImageError, SourceError) as error:
        return "error", str(error)
    except Exception:
        return "failed", traceback.format_exc()
    sample_ids.copy_(batch.sample_ids)
    return "batch", batch.bad
