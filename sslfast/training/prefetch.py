"""Prefetching: the views of the next micro-batch are rendered while the current step runs."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from sslfast.views import Batch, View, ViewStage

Part = tuple[Tensor, Mapping[str, View]]
"""Sample ids ``[b]`` and views of a micro-batch."""


class Prefetcher:
    """Splits a loader's batches into micro-batches and renders their views.

    On CUDA everything up to the views is queued on a side stream, and :meth:`ahead`, called once a step has been
    queued, begins the next micro-batch: while the device computes the step, the host waits for the loader, and copies
    and view kernels run. On a CPU :meth:`ahead` does nothing. Results, their order and the call that raises an error
    are the same either way.

    Args:
        stage: batch -> views.
        parts: micro-batches per batch; divides the batch size.
        device: of the batches.
    """

    def __init__(self, stage: ViewStage, *, parts: int, device: torch.device) -> None:
        self.stage, self.parts, self.device = stage, parts, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._source: Iterator[Batch] | None = None
        self._split: Iterator[Batch] = iter(())
        self._ready: Part | BaseException | None = None

    def take(self, batches: Iterator[Batch]) -> Part:
        """The next micro-batch, for use on the current stream. Raises as :meth:`prepare`."""
        self.prepare(batches)
        ready, self._ready = self._ready, None
        assert isinstance(ready, tuple)
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)  # all work queued there so far belongs to these views
            for tensor in _tensors(ready):
                tensor.record_stream(current)  # allocated on the side stream: memory is kept until this one is done
        return ready

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Wait for the next micro-batch, which :meth:`take` then has. Raises what the iterator raises, StopIteration
        included.

        Another iterator than in the last call starts afresh: what was prefetched from the old one is dropped.
        """
        if batches is not self._source:
            self._source, self._split, self._ready = batches, self._micro_batches(batches), None
            if self._stream is not None:  # copies of batches may already be queued on the current stream
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
        if isinstance(self._ready, BaseException):
            error, self._ready = self._ready, None
            raise error
        if self._ready is None:
            self._ready = self._render()

    def ahead(self, batches: Iterator[Batch]) -> None:
        """Begin the next micro-batch now. :meth:`prepare` raises its errors; KeyboardInterrupt is raised at once."""
        if self._stream is None or batches is not self._source or self._ready is not None:
            return
        try:
            self._ready = self._render()
        except Exception as error:
            self._ready = error

    def _render(self) -> Part:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = next(self._split)
            return batch.sample_ids, self.stage(batch)

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            size = len(batch.sample_ids) // self.parts
            for start in range(0, size * self.parts, size):
                chosen = slice(start, start + size)
                crops = {name: crop[chosen] for name, crop in batch.crops.items()}
                yield replace(batch, sample_ids=batch.sample_ids[chosen], crops=crops)


def _tensors(part: Part) -> list[Tensor]:
    sample_ids, views = part
    found = [sample_ids]
    for view in views.values():
        found += [value for value in vars(view).values() if isinstance(value, Tensor)]
    return found
