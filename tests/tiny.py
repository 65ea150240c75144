"""A method of a few milliseconds per step with every kind of state that a checkpoint must hold (weights, BatchNorm, a
bank), and child processes that start in a fraction of a second."""

import importlib
import importlib.util
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.distributed.collectives import gather_rows
from sslfast.loaders.registry import LoaderConfig
from sslfast.methods.base import BaseConfig, Method, MethodContext
from sslfast.models.build import TrunkConfig
from sslfast.runs.log import read_log
from sslfast.training.config import TrainConfig
from sslfast.views.types import CropConfig, View, ViewConfig

# The mark by which the command line leaves an option out. Machines without its library run the tests of training too.
HIDDEN: Any = importlib.import_module("tyro").conf.Suppress if importlib.util.find_spec("tyro") else None


class Tiny(Method):
    """Pulls every embedding to its bank vector, away from the others."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        name: ClassVar[str] = "tiny"
        bank_momentum: float = 0.5
        bad_step: int = -1
        """The loss of this step (0-based) is NaN; -1: of none."""
        image_view: Annotated[ViewConfig, HIDDEN] = field(default_factory=lambda: ViewConfig(crop=CropConfig(size=8)))
        """Not an option of the command: its help stays short."""

        def build(self, context: MethodContext) -> "Tiny":
            return Tiny(self, context.num_rows, context.seed)

    bank: Tensor

    def __init__(self, config: Config, num_rows: int, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
            self.head = nn.Linear(8, 4)
            self.register_buffer("bank", normalize(torch.randn(num_rows, 4), dim=1))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        query = normalize(self.head(self.trunk(views["image"].pixels).flatten(1)).float(), dim=1)
        self.pending.append((sample_ids, query.detach()))
        positive = (query * self.bank[sample_ids]).sum(1)
        loss = (torch.logsumexp(query @ self.bank.T, 1) - positive).mean()
        is_bad = torch.as_tensor(step, device=loss.device) == self.config.bad_step
        return {"loss": torch.where(is_bad, torch.nan, loss), "positive": positive.mean().detach()}

    def embeddings(self) -> Tensor:
        return self.bank

    def after_step(self) -> None:
        sample_ids, query = (gather_rows(torch.cat(column)) for column in zip(*self.pending, strict=True))
        self.pending.clear()
        keep = self.config.bank_momentum
        self.bank[sample_ids] = normalize(keep * self.bank[sample_ids] + (1 - keep) * query, dim=1)


@dataclass(kw_only=True)
class TinyConfig(TrainConfig):
    """24 steps: 6 epochs of 4 steps where there are 16 to 19 rows."""

    method: Tiny.Config = field(default_factory=Tiny.Config)  # type: ignore[assignment]
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(workers=0))
    epochs: int = 6
    batch_size: int = 4
    log_every_steps: int = 3
    checkpoint_every_steps: int = 5
    device: str = "cpu"
    tensorboard: bool = False
    progress: str = "off"  # type: ignore[assignment]


def context(
    model: TrunkConfig, num_rows: int, *, seed: int = 0, epochs: int = 2, steps_per_epoch: int = 3
) -> MethodContext:
    """What a test builds a method for."""
    return MethodContext(
        model=model,
        num_rows=num_rows,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
        total_steps=epochs * steps_per_epoch,
    )


def log_values(output: Path) -> list[dict[str, Any]]:
    """The records in the log of a run directory, without their times; none may be damaged."""
    records = read_log(output / "log.jsonl", report=pytest.fail)
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def same(a: Any, b: Any) -> bool:
    """Bit-equal, through dicts and lists; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        is_number = ~a.isnan()
        return (
            (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and torch.equal(is_number, ~b.isnan())
            and torch.equal(a[is_number], b[is_number])
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def write_images(folder: Path, count: int) -> None:
    """``count`` images of 24 x 20 random pixels in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def fork_server() -> ForkServerContext:
    """Children forked from a server that has already imported what they need.

    A process has one such server; if another test has started it without these modules, it is restarted. torch._dynamo
    is among them because the first optimizer step imports it, which takes seconds in every child.
    """
    context = multiprocessing.get_context("forkserver")
    needed = [
        "tests.runs.test_checkpoint",
        "tests.runs.test_resume",
        "tests.runs.test_kill_methods",
        "tests.distributed.test_elastic",
        "sslfast.cli.pretrain",
        "torchvision",
        "torch._dynamo",
    ]
    server = forkserver._forkserver  # type: ignore[attr-defined]
    if server._preload_modules != needed:
        server._stop()
        context.set_forkserver_preload(needed)
    return context
