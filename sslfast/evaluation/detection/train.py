"""Fine-tuning a detector by a published protocol: schedules, training loop, detection on test images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sslfast.data import DEFAULT_DECODING, DaemonPool, Decoding, LostBatchError, Patience
from sslfast.distributed import (
    convert_sync_batchnorm,
    gather_objects,
    is_main,
    own_rows,
    raise_together,
    replicate,
    world_size,
)
from sslfast.evaluation.detection.data import BoxedImage, BoxedImages, TrainingBatches, load_image, storage_hangs
from sslfast.evaluation.detection.model import FasterRCNN, targets_of
from sslfast.evaluation.detection.scores import Detections
from sslfast.evaluation.sgd import ResumeState
from sslfast.models import first_nonfinite
from sslfast.optim import LearningRate, OptimConfig, build_optimizer, set_learning_rate

CHECK_EVERY = 50
"""Iterations between two checks that the loss is finite."""


@dataclass(frozen=True, kw_only=True)
class DetectionProtocol:
    """Settings of a published protocol, for batches of 16 images."""

    name: str
    iterations: int
    """For two sets (VOC07+12)."""
    drops: tuple[int, ...]
    """Iterations, of ``iterations``, at which the learning rate is divided by 10."""
    single: tuple[int, tuple[int, ...]]
    """``iterations`` and ``drops`` for one set (VOC07)."""
    lr: float
    warmup: int
    """Iterations of linear warm-up."""
    warmup_factor: float
    """Fraction of the learning rate at the start of the warm-up."""
    frozen_norm: bool
    """The trunk's BatchNorm is frozen; otherwise it trains, synchronised over all processes."""
    freeze_at: int
    """Number of frozen stages: 2 are conv1 and res2."""
    extra_norm: bool
    """BatchNorm behind res5."""
    precise_norm: int
    """Iterations after training, at most a tenth of it, that recompute BatchNorm's statistics (precise BatchNorm)."""
    source: str

    def schedule(
        self, *, sets: int, iterations: int | None, batch_size: int, lr: float | None, warmup: int | None = None
    ) -> "Schedule":
        """The published schedule for that many sets, scaled to ``iterations`` and ``batch_size``; ``lr`` is for 16,
        ``warmup`` is taken as it is."""
        published, drops = (self.iterations, self.drops) if sets > 1 else self.single
        count = published if iterations is None else iterations
        scale = count / published
        return Schedule(
            iterations=count,
            published_iterations=published,
            drops=tuple(round(drop * scale) for drop in drops),
            warmup=round(self.warmup * scale) if warmup is None else warmup,
            warmup_factor=self.warmup_factor,
            lr=(self.lr if lr is None else lr) * batch_size / 16,
            precise_norm=min(self.precise_norm, -(-count // 10)),
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Iterations and learning rates of one fine-tuning."""

    iterations: int
    published_iterations: int
    drops: tuple[int, ...]
    warmup: int
    warmup_factor: float
    lr: float
    precise_norm: int

    def learning_rate(self, iteration: int) -> float:
        """Rate of an iteration (0-based): ``lr * 0.1 ** (drops so far)``, times ``f + (1 - f) * i / warmup`` before
        ``warmup``."""
        schedule = LearningRate(
            peak=self.lr,
            shape="steps",
            milestones=self.drops,
            warmup=self.warmup,
            warmup_factor=self.warmup_factor,
        )
        return schedule(iteration)


PIRL = DetectionProtocol(
    name="pirl",
    iterations=25_000,
    drops=(17_000,),
    single=(12_500, (9_500,)),
    lr=0.002,
    warmup=1000,
    warmup_factor=0.001,
    frozen_norm=True,
    freeze_at=2,
    extra_norm=False,
    precise_norm=0,
    source="PIRL (arXiv 1912.01991) appendix B.1: frozen BatchNorm, no further norm; rate and warm-up of VISSL's "
    "voc0712/pirl_npid and voc07/pirl_npid, which inherit SyncBN, a norm behind res5 and FREEZE_AT 0",
)
PIRL_PAPER = replace(
    PIRL,
    name="pirl-paper",
    lr=0.003,
    warmup_factor=1 / 3,
    source="PIRL (arXiv 1912.01991) appendix B, PIRL and NPID++: rate 0.003, 1000 iterations of warm-up, from a third",
)
PIRL_SUPERVISED = replace(
    PIRL_PAPER,
    name="pirl-supervised",
    lr=0.02,
    warmup=100,
    source="PIRL (arXiv 1912.01991) appendix B, supervised and Jigsaw baselines: rate 0.02, 100 iterations of warm-up",
)
MOCO = DetectionProtocol(
    name="moco",
    iterations=24_000,
    drops=(18_000, 22_000),
    single=(9_000, (6_750, 8_250)),
    lr=0.02,
    warmup=100,
    warmup_factor=0.001,
    frozen_norm=False,
    freeze_at=0,
    extra_norm=True,
    precise_norm=200,
    source="He et al., CVPR 2020 (MoCo), section 4.2: 24k iterations (settings of pascal_voc_R_50_C4_24k_moco), 9k on "
    "trainval2007 alone with its drops in proportion",
)
PROTOCOLS = {protocol.name: protocol for protocol in (PIRL, PIRL_PAPER, PIRL_SUPERVISED, MOCO)}


def fine_tune(
    model: FasterRCNN,
    batches: TrainingBatches,
    schedule: Schedule,
    *,
    frozen_norm: bool,
    device: torch.device,
    precision: torch.dtype,
    resume: ResumeState,
    save_every: int,
    report: Callable[[str], None] | None = None,
    title: str = "detection",
) -> None:
    """Train the detector; gradients are averaged over ranks. Starts from the state in ``resume``, if there is one.

    Args:
        model: on ``device``.
        batches: training images.
        schedule: iterations and learning rates.
        frozen_norm: BatchNorm is frozen: its statistics are neither synchronised nor measured at the end.
        device: of the model.
        precision: of the network; losses are float32.
        resume: where the state is saved.
        save_every: iterations between two saved states, each with a line to ``report``.
        report: receives these lines, on the first rank; None: there are none.
        title: what is being trained, the beginning of each line.

    Raises:
        ValueError: a loss that is not finite.
    """
    model.train()
    if not frozen_norm and world_size() > 1:
        convert_sync_batchnorm(model, device)
    optimizer = build_optimizer(model, OptimConfig(decay_bias=True), lr=schedule.lr)
    start = resume.load(model, optimizer)
    replica = replicate(model, device)
    for iteration, sample_ids, samples in batches(start, schedule.iterations):
        set_learning_rate(optimizer, schedule.learning_rate(iteration))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            losses = replica(
                [sample.image.to(device) for sample in samples],
                targets_of(samples, device),
                iteration=iteration,
                sample_ids=sample_ids,
            )
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = iteration + 1
        if done % CHECK_EVERY == 0 or done % save_every == 0 or done == schedule.iterations:
            value = float(loss.detach())  # host sync: once in many iterations
            raise_together(_finite(value, losses, done))
            if done % save_every == 0 or done == schedule.iterations:
                resume.save(model, optimizer, done)
                if is_main() and report is not None:
                    report(f"{title}: iteration {done:,} of {schedule.iterations:,}, loss {value:.3f}")
    broken = first_nonfinite(model.state_dict().items())
    if broken is not None:
        raise ValueError(
            f"the trained detector holds NaN or infinite weights ({broken}), as training that diverged leaves; "
            "lower --lr"
        )
    if schedule.precise_norm:
        measure_norms(model, batches, range(schedule.iterations, schedule.iterations + schedule.precise_norm), device)
    model.eval()


def _finite(value: float, losses: dict[str, torch.Tensor], done: int) -> str | None:
    if np.isfinite(value):
        return None
    parts = ", ".join(f"{name} {float(loss.detach()):.3g}" for name, loss in losses.items())
    return f"the loss is not finite after iteration {done} ({parts}): lower --lr"


@torch.no_grad()
def measure_norms(model: FasterRCNN, batches: TrainingBatches, iterations: range, device: torch.device) -> None:
    """Recompute BatchNorm's running statistics as means over these iterations, without training (precise BatchNorm)."""
    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: cumulative average in place of an exponential one
    for iteration, sample_ids, samples in batches(iterations.start, iterations.stop):
        images = [sample.image.to(device) for sample in samples]
        model(images, targets_of(samples, device), iteration=iteration, sample_ids=sample_ids)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def detect(
    model: FasterRCNN,
    split: BoxedImages,
    *,
    side: int,
    longest: int,
    device: torch.device,
    precision: torch.dtype,
    workers: int,
    decoding: Decoding = DEFAULT_DECODING,
) -> list[Detections]:
    """Detections on every image, in its pixels. Ranks share the images and each returns the detections of all.

    Raises:
        ValueError: an image cannot be decoded; on every rank.
    """
    own, error = own_rows(len(split.images)), None
    found: list[Detections] = []
    try:
        for image, (height, width) in _images(split.images[own.start : own.stop], side, longest, workers, decoding):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                (one,) = model([image.to(device)])
            scale = np.array([width / image.shape[2], height / image.shape[1]] * 2, dtype=np.float32)
            found.append(
                Detections(
                    boxes=one["boxes"].float().cpu().numpy() * scale,
                    scores=one["scores"].cpu().numpy(),
                    labels=one["labels"].cpu().numpy(),
                )
            )
    except (ValueError, LostBatchError) as problem:
        error = str(problem)
    raise_together(error)
    return [one for part in gather_objects(found) for one in part]


def _images(
    images: Sequence[BoxedImage], side: int, longest: int, workers: int, decoding: Decoding
) -> Iterator[tuple[Any, Any]]:
    """:func:`load_image` of each, with prefetching."""

    def load(image: BoxedImage) -> Any:
        return load_image(image.path, side=side, longest=longest, decoding=decoding)

    some = 4 * max(1, workers)
    with DaemonPool(max(1, workers), "sslfast-images") as pool:
        for start in range(0, len(images), some):
            part = images[start : start + some]
            yield from pool.map(load, part, Patience(), partial(storage_hangs, part[0].path))
