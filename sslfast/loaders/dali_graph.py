"""The DALI graph of the ``dali`` loader (JPEG bytes and boxes in, uint8 crops out), and the pipeline that runs it.

Each image is decoded once, in the region that holds the boxes of all its views. Every view is sliced from that region,
resized with the antialiased triangular filter and transposed to CHW. Nothing in the graph is random, and no orientation
is applied: boxes are in pixels of the image as stored.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


@dataclass
class EncodedImage:
    """One image for the graph."""

    data: NDArray[np.uint8]
    """The JPEG file up to its end marker."""
    boxes: NDArray[np.int32]
    """``[views, 4]`` left, top, right, bottom of each view in the image as stored."""
    orientation: int
    """EXIF orientation, to be applied to the crops."""


def build_graph(
    sizes: Sequence[int],
    *,
    batch_size: int,
    threads: int,
    gpu: bool,
    device_id: int | None = None,
    prefetch: int = 2,
) -> Any:
    """A DALI pipeline, not built yet.

    Inputs: ``encoded`` uint8 ``[bytes]``; int32 ``[2]`` (y, x) ``start``, ``end`` of the region to decode, and
    ``start<k>``, ``end<k>`` of view k inside that region. Outputs: one uint8 ``[3, S, S]`` for each size.

    Args:
        sizes: side of every view's crop.
        batch_size: maximum number of images of a run.
        threads: of the CPU operators and of the host side of the mixed decoder.
        gpu: decode with nvJPEG (operator device "mixed") and process on the GPU; else everything on the CPU.
        device_id: of the GPU; None: no GPU, where a GPU graph can be serialised but not built.
        prefetch: number of runs in flight.
    """
    from nvidia import dali

    # Any: DALI may be missing, and its type stubs accept less than its operators do.
    fn: Any = dali.fn
    types: Any = dali.types

    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch, seed=0
    )

    def corner(name: str) -> Any:
        return fn.external_source(name=name, dtype=types.INT32, ndim=1)

    with pipeline:
        # No affinity: all ranks on a machine would pin their threads to the same cores.
        pinning = {"affine": False} if gpu else {}
        region = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            start=corner("start"),
            end=corner("end"),
            axes=[0, 1],
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # as libjpeg does for every other loader
            **pinning,
        )
        crops = []
        for position, size in enumerate(sizes):
            crop = fn.slice(region, start=corner(f"start{position}"), end=corner(f"end{position}"), axes=[0, 1])
            crop = fn.resize(crop, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
            crops.append(fn.transpose(crop, perm=[2, 0, 1]))
        pipeline.set_outputs(*crops)
    return pipeline


class DaliDecoder:
    """A running pipeline: :meth:`start` up to ``prefetch`` batches, then :meth:`wait` for them in that order.

    When :meth:`wait` raises, the pipeline is unusable and all batches in flight are lost: build a new one.

    Args:
        sizes: side of every view's crop.
        batch_size: maximum number of images in a batch.
        threads: CPU threads.
        device: CPU or CUDA.
        prefetch: number of batches in flight.
    """

    def __init__(
        self, sizes: Sequence[int], *, batch_size: int, threads: int, device: torch.device, prefetch: int = 2
    ) -> None:
        self.prefetch = prefetch
        self._sizes = tuple(sizes)
        self._device = device
        gpu = device.type == "cuda"
        index = (torch.cuda.current_device() if device.index is None else device.index) if gpu else None
        self._pipeline = self._graph(
            sizes, batch_size=batch_size, threads=threads, gpu=gpu, device_id=index, prefetch=prefetch
        )
        self._pipeline.build()
        # The first schedule_run starts as many runs as the pipeline prefetches, every later one a single run.
        for _ in range(prefetch):
            self._feed([self._probe()])
        self._pipeline.schedule_run()
        for _ in range(prefetch):
            self.wait()
            self.release()

    def start(self, images: Sequence[EncodedImage]) -> None:
        """Start a batch of 1 to ``batch_size`` images; returns immediately."""
        self._feed(images)
        self._pipeline.schedule_run()

    def wait(self) -> list[Tensor]:
        """Crops ``[N, 3, S, S]`` uint8 of each view of the oldest batch, in memory of DALI that :meth:`release` frees.

        On CUDA the current stream waits for them, the host does not.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        return [torch.from_dlpack(crops.as_tensor()) for crops in self._pipeline.share_outputs(cuda_stream=stream)]

    def release(self) -> None:
        """Free the memory of the last :meth:`wait`."""
        self._pipeline.release_outputs()

    def _graph(self, sizes: Sequence[int], **options: Any) -> Any:
        return build_graph(sizes, **options)

    def _probe(self) -> EncodedImage:
        return EncodedImage(_probe(), np.tile(np.array([0, 0, 16, 16], dtype=np.int32), (len(self._sizes), 1)), 1)

    def _feed(self, images: Sequence[EncodedImage]) -> None:
        boxes = np.stack([image.boxes for image in images])[:, :, [1, 0, 3, 2]]  # y before x
        start, end = boxes[:, :, :2].min(axis=1), boxes[:, :, 2:].max(axis=1)
        inputs = {"start": start, "end": end}
        for position in range(len(self._sizes)):
            inputs[f"start{position}"] = boxes[:, position, :2] - start
            inputs[f"end{position}"] = boxes[:, position, 2:] - start
        self._pipeline.feed_input("encoded", [image.data for image in images])
        for name, values in inputs.items():
            self._pipeline.feed_input(name, np.ascontiguousarray(values, dtype=np.int32))


@dataclass
class WholeImage(EncodedImage):
    """One image to be resized first: its one box is in pixels of the resized image."""

    shape: tuple[int, int]
    """Width and height to resize the stored image to."""


def build_whole_graph(
    size: int, *, batch_size: int, threads: int, gpu: bool, device_id: int | None = None, prefetch: int = 2
) -> Any:
    """As :func:`build_graph`, for whole images: decode, resize by the antialiased triangular filter, crop, and where
    the crop is not ``size`` x ``size`` resize it to that.

    Inputs: ``encoded``; float32 ``[2]`` (height, width) ``shape``; int32 ``[2]`` (y, x) ``start`` and ``end`` of the
    crop. Output: one uint8 ``[3, size, size]``.
    """
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    pipeline = dali.Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch, seed=0
    )
    linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
    with pipeline:
        image = fn.decoders.image(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **({"affine": False} if gpu else {}),
        )
        resized = fn.resize(image, size=fn.external_source(name="shape", dtype=types.FLOAT, ndim=1), **linear)
        start, end = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "end"))
        crop = fn.resize(fn.slice(resized, start=start, end=end, axes=[0, 1]), size=[size, size], **linear)
        pipeline.set_outputs(fn.transpose(crop, perm=[2, 0, 1]))
    return pipeline


class WholeDecoder(DaliDecoder):
    """A :class:`DaliDecoder` of :class:`WholeImage`, with one size."""

    def _graph(self, sizes: Sequence[int], **options: Any) -> Any:
        return build_whole_graph(sizes[0], **options)

    def _probe(self) -> EncodedImage:
        return WholeImage(_probe(), np.array([[0, 0, 16, 16]], dtype=np.int32), 1, (16, 16))

    def _feed(self, images: Sequence[EncodedImage]) -> None:
        self._pipeline.feed_input("encoded", [image.data for image in images])
        shapes = [image.shape[::-1] for image in images if isinstance(image, WholeImage)]
        boxes = np.stack([image.boxes[0] for image in images])[:, [1, 0, 3, 2]]  # y before x
        self._pipeline.feed_input("shape", np.array(shapes, dtype=np.float32))
        for name, part in (("start", boxes[:, :2]), ("end", boxes[:, 2:])):
            self._pipeline.feed_input(name, np.ascontiguousarray(part, dtype=np.int32))


def refused_images(
    images: Sequence[EncodedImage],
    sizes: Sequence[int],
    *,
    device: torch.device,
    decoder: type[DaliDecoder] = DaliDecoder,
) -> dict[int, str]:
    """Position and reason of every image that DALI fails on, each decoded alone. Each failure costs a new pipeline."""
    refused: dict[int, str] = {}
    alone: DaliDecoder | None = None
    for position, image in enumerate(images):
        if alone is None:
            alone = decoder(sizes, batch_size=1, threads=1, device=device, prefetch=1)
        try:
            alone.start([image])
            alone.wait()
            alone.release()
        except Exception as error:
            refused[position] = short_reason(error)
            alone = None
    return refused


def short_reason(error: Exception) -> str:
    """The line of a DALI error that states the cause."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Critical error", "Current pipeline", "Error in"))]
    return lines[0] if lines else type(error).__name__


def _probe() -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
