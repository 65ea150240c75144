"""What the protocols that train by SGD share: published settings, augmented images, resuming, counting hits."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslfast.data import Manifest, OnBadImage
from sslfast.distributed import (
    barrier,
    gather_objects,
    is_main,
    own_rows,
    raise_together,
    rank,
    sum_over_ranks,
    world_size,
)
from sslfast.evaluation.cache import load_whole, save_optional
from sslfast.evaluation.extract import ImageReader
from sslfast.evaluation.results import departures
from sslfast.loaders import Loader, LoaderConfig, ReaderName, build_loader
from sslfast.ops import ViewParameter
from sslfast.optim import LearningRate, OptimConfig, build_optimizer
from sslfast.views import AugmentConfig, CropConfig, ViewConfig, draw_view


@dataclass(frozen=True, kw_only=True)
class SGDProtocol:
    """Settings of a published protocol: SGD with momentum 0.9, learning rate divided by 10 at some epochs, or along a
    cosine."""

    name: str
    """First part of the protocol's name in a result."""
    epochs: int
    """As published."""
    drops: tuple[int, ...]
    """Epochs, of ``epochs``, at which the learning rate is divided by 10."""
    lr_per_256_images: float
    """Learning rate at batch size 256; scales with the batch size."""
    weight_decay: float
    """L2 penalty, on biases too, not on BatchNorm."""
    nesterov: bool
    layers: tuple[str, ...]
    """Layers that have a classifier."""
    source: str
    batch_size: int = 256
    """As published; the learning rate scales with it."""
    shape: Literal["steps", "cosine"] = "steps"
    """How the learning rate falls: at ``drops``, between epochs, or along a cosine to 0, at every step."""
    norm_batch: int | None = None
    """Images that BatchNorm normalises together, as published; None: all of a process."""

    def full_name(self, epochs: int) -> str:
        """``name``, with the number of epochs if it is not the published one."""
        return self.name if epochs == self.epochs else f"{self.name}-{epochs}ep"

    def drops_of(self, epochs: int) -> list[int]:
        """``drops`` scaled to another number of epochs and rounded: 4, 8, 12 of 14 for 8, 16, 24 of 28."""
        return [round(drop * epochs / self.epochs) for drop in self.drops]

    def learning_rate(self, epoch: float, *, epochs: int, batch_size: int) -> float:
        """Rate after that many epochs: ``lr * batch_size / 256 * 0.1 ** (drops so far)``, or that times
        ``(1 + cos(pi * epoch / epochs)) / 2``."""
        peak = self.lr_per_256_images * batch_size / 256
        if self.shape == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return LearningRate(peak=peak, shape="steps", milestones=tuple(self.drops_of(epochs)))(int(epoch))

    def optimizer(self, module: nn.Module, *, batch_size: int) -> torch.optim.Optimizer:
        """SGD over a module's parameters."""
        config = OptimConfig(momentum=0.9, nesterov=self.nesterov, weight_decay=self.weight_decay, decay_bias=True)
        return build_optimizer(module, config, lr=self.lr_per_256_images * batch_size / 256)

    def facts(self, epochs: int, batch_size: int) -> dict[str, Any]:
        """The settings, as JSON values for the result."""
        return {
            "epochs": epochs,
            "published_epochs": self.epochs,
            "drops": self.drops_of(epochs) if self.shape == "steps" else [],
            "learning_rate": "divided by 10 at drops" if self.shape == "steps" else "cosine to 0, by step",
            "batch_size": batch_size,
            "lr": self.lr_per_256_images * batch_size / 256,
            "momentum": 0.9,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
            "augmentation": "random resized crop (0.08 to 1), flip",
        }

    def departures(self, epochs: int, batch_size: int, seen: str, **more: tuple[Any, Any]) -> list[str]:
        """How a training departs from this protocol; ``more``: name = (used, published)."""
        pairs = {
            "epochs": (epochs, self.epochs),
            "batch_size": (batch_size, self.batch_size),
            "preprocessing": (seen, "centre-crop"),
            **more,
        }
        return departures(
            {name: then for name, (_, then) in pairs.items()}, {name: now for name, (now, _) in pairs.items()}
        )


GOYAL = SGDProtocol(
    name="linear-goyal",
    epochs=28,
    drops=(8, 16, 24),
    lr_per_256_images=0.01,
    weight_decay=5e-4,
    nesterov=True,
    layers=("conv1", "res2", "res3", "res4", "res5", "res5avg", "res5avg-plain"),
    source="PIRL (arXiv 1912.01991) appendix C; VISSL's in1k linear benchmark, after Goyal et al., ICCV 2019",
)
"""VISSL's and PIRL's form of Goyal et al.'s benchmark, not that of its Caffe2 original, which decays and schedules
otherwise. 28 epochs for ImageNet; Places205 takes 14 and iNaturalist 2018 takes 84."""
MOCO = SGDProtocol(
    name="linear-moco",
    epochs=100,
    drops=(60, 80),
    lr_per_256_images=30.0,
    weight_decay=0.0,
    nesterov=False,
    layers=("res5avg-plain",),
    source="He et al., CVPR 2020 (MoCo), section 4.1; settings of main_lincls.py",
)
SEMISUP = SGDProtocol(
    name="semisup",
    epochs=70,
    drops=(30,),
    lr_per_256_images=0.01,
    weight_decay=0.0,
    nesterov=True,
    layers=("res5avg-plain",),
    norm_batch=32,
    source="PIRL (arXiv 1912.01991) section 4.3; VISSL's in1k semi_sup_fulltune, 32 images on each of 8 GPUs",
)
SEMISUP_VISSL = replace(
    SEMISUP,
    name="semisup-vissl",
    lr_per_256_images=0.05,
    source="VISSL's in1k semi_sup_fulltune on SimCLR's lists (dataset/simclr_in1k_per01, per10), 32 images on each of "
    "8 GPUs; its pirl_in1k_per01 and per10 set PIRL's 0.01 in place of 0.05",
)
SEMISUP_SIMCLR = SGDProtocol(
    name="semisup-simclr",
    epochs=60,
    drops=(),
    lr_per_256_images=0.05,
    weight_decay=0.0,
    nesterov=True,
    layers=("res5avg-plain",),
    batch_size=4096,
    shape="cosine",
    source="Chen et al., ICML 2020 (SimCLR), appendix B.5; cosine of its model_util.learning_rate_schedule",
)
"""60 epochs for 1 % of the labels; 10 % takes 30."""


class TrainingImages:
    """Random resized crops with random flips of labelled images: functions of (seed, epoch, sample id).

    With several processes each gets its part of every batch. ``loader``: any that can read the images; auto: ffcv for a
    .beton file, else pillow.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        size: int,
        batch_size: int,
        seed: int,
        workers: int,
        on_bad_image: OnBadImage,
        device: torch.device,
        loader: ReaderName = "auto",
    ) -> None:
        augment = AugmentConfig(flip_probability=0.5, jitter_probability=0.0, grayscale_probability=0.0)
        self.view = ViewConfig(crop=CropConfig(size=size), augment=augment)
        self.seed = seed
        self.labels = torch.from_numpy(manifest.labels).to(device)
        self.loader: Loader = build_loader(
            LoaderConfig(name=loader, workers=workers, on_bad_image=on_bad_image),
            views={"image": self.view},
            batch_size=batch_size,
            seed=seed,
            manifest=manifest,
            device=device,
            rank=rank(),
            world_size=world_size(),
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(uint8 [B, 3, S, S], labels [B])`` of this rank."""
        for batch in self.loader.epoch(epoch):
            drawn = draw_view(batch.sample_ids, self.view, seed=self.seed, position=0, epoch=epoch)
            crops = batch.crops["image"]
            flip = drawn.pixel[:, :, ViewParameter.FLIP, None, None] != 0  # [B, 1, 1, 1]
            yield torch.where(flip, crops.flip(3), crops), self.labels[batch.sample_ids]

    def close(self) -> None:
        self.loader.close()


class ResumeState:
    """File with the state after an epoch (or iteration), from which a stopped training resumes.

    Args:
        path: the file; None: nothing is stored.
        key: what identifies the training; the state of another key is ignored.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path = path
        self.key = {name: str(value) for name, value in key.items()}

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore module and optimizer if the file is of this training; returns the epochs done.

        Every rank starts at 0 if one of them does not see the file.
        """
        state = self._read()
        done = 0 if state is None else state["epochs_done"]
        seen = gather_objects(done)  # on every rank, before any of them returns
        if state is None or min(seen) < done:
            return 0
        before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
        try:
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
        except Exception:  # whatever torch raises for a state of other shapes; a part of it may be loaded
            module.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            return 0
        return done

    def _read(self) -> dict[str, Any] | None:
        """The state in the file if it is intact and of this training."""
        state = None if self.path is None else load_whole(self.path)
        if state is None or state.get("key") != self.key:
            return None
        done = state.get("epochs_done")
        return state if type(done) is int and done > 0 and {"module", "optimizer"} <= state.keys() else None

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
        """Write the state, on the first rank. Where that fails one line says so, once, and the training goes on."""
        if self.path is not None and is_main():
            state = {
                "key": self.key,
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epochs_done": epochs_done,
            }
            if not save_optional(state, self.path, lost="a stopped evaluation starts again from the beginning"):
                self.path = None
        barrier()

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        if self.path is not None and is_main():
            with suppress(OSError):  # on a disk that became read-only: the next evaluation replaces it
                self.path.unlink(missing_ok=True)


def check_finite(losses: Mapping[str, Tensor], epoch: int, *, remedy: str) -> None:
    """ValueError if the last loss of an epoch is not finite; ``remedy`` ends its message."""
    for name, loss in losses.items():
        if not bool(loss.isfinite()):  # host sync: once an epoch
            raise ValueError(
                f"the loss of {name} is {loss.item()} after epoch {epoch + 1}: the features are far too large for this "
                f"protocol's learning rate; {remedy}"
            )


class Hits:
    """Counts correct predictions of several classifiers over batches and ranks."""

    def __init__(self) -> None:
        self.top1: dict[str, Tensor] = {}
        self.top5: dict[str, Tensor] = {}
        self.count = 0
        self.broken: dict[str, Tensor] = {}
        """Predictions by name that are not finite."""

    def add(self, logits: dict[str, Tensor], labels: Tensor) -> None:
        """``logits`` ``[B, C]`` by name, ``labels`` ``[B]``."""
        self.count += len(labels)
        for name, value in logits.items():
            self.broken[name] = self.broken.get(name, 0) + (~value.isfinite()).any(1).sum()
            hits = value.topk(min(5, value.shape[1]), dim=1).indices == labels[:, None]
            self.top1[name] = self.top1.get(name, 0) + hits[:, 0].sum()
            self.top5[name] = self.top5.get(name, 0) + hits.sum()

    def shares(self, names: Sequence[str], device: torch.device) -> tuple[dict[str, tuple[float, float]], int]:
        """``{name: (top-1, top-5)}`` and the number of images, over all ranks.

        Raises:
            ValueError: there was no image, or a prediction that is not finite; on every rank.
        """
        zero = torch.zeros((), dtype=torch.int64, device=device)
        counts = [torch.as_tensor(self.count, device=device)]
        counts += [of.get(name, zero) for name in names for of in (self.top1, self.top5, self.broken)]
        total, *found = sum_over_ranks(torch.stack(counts)).tolist()
        if not total:
            raise ValueError("val has no usable image; add images, or repair those that are there")
        shares = {}
        for name, a, b, broken in zip(names, found[::3], found[1::3], found[2::3], strict=True):
            if broken:
                raise ValueError(
                    f"{name or 'the classifier'} predicts NaN or infinite values for {broken} of {total} images: "
                    "its features are far too large; name other weights, for example an earlier checkpoint, as RUN"
                )
            shares[name] = (a / total, b / total)
        return shares, total


@torch.no_grad()
def count_hits(
    classify: Any, names: Sequence[str], reader: ImageReader, labels: Tensor, device: torch.device
) -> tuple[dict[str, tuple[float, float]], int]:
    """Top-1 and top-5 of ``classify(images) -> {name: logits}`` on a split; the ranks share its images."""
    hits, error = Hits(), None
    try:
        for rows, images in reader(own_rows(len(reader.manifest)), device):
            hits.add(classify(images), labels[rows].to(device))
    except ValueError as problem:
        error = str(problem)
    raise_together(error)
    return hits.shares(names, device)
