"""``sslfast bench step``: how fast a recipe trains here, and where the time of a step goes.

The whole step is timed as training runs it (loader, views, forward, backward, optimizer, bank). Then its parts are
timed alone on one recorded batch, each with the device idle before and after, so parts that overlap in training add up
to more than the step. Calls of ``sslfast`` ops are recorded and replayed, whatever the method. A supervised step of the
same trunk on the image view is the yardstick; FLOPs are counted by torch's ``FlopCounterMode``, and the matrix product
rate is measured in the same run.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sslfast.bench.loader import forever
from sslfast.data import parse_data
from sslfast.device import wait_for
from sslfast.models import build_trunk
from sslfast.optim import build_optimizer
from sslfast.recipes import RECIPES
from sslfast.training import TrainConfig, Trainer
from sslfast.views import Batch, View

_WARM_UP = 3  # steps before anything is timed: workers start, cuDNN chooses its algorithms
_CLASSES = 1000


@dataclass(kw_only=True)
class StepReport:
    """What ``sslfast bench step`` found; times in seconds, all of one process."""

    recipe: str
    device: str
    batch_size: int
    precision: str
    loader: str
    steps: int
    step: float
    """Median time of a whole step."""
    synthetic_step: float | None
    """The same without a loader: one batch again and again."""
    parts: dict[str, float]
    """Part -> time alone."""
    step_flops: int
    """Matrix products and convolutions of a step, forward and backward."""
    supervised_step: float
    """Cross-entropy step of the same trunk on the image view, same batch, optimizer and precision."""
    supervised_flops: int
    matmul_flops: float
    """FLOP/s of a large matrix product in the run's precision."""
    busy_share: float | None
    """Share of the steps' time in which the GPU ran a kernel; None on a CPU."""
    peak_bytes: int | None
    """Most CUDA memory of a step; None on a CPU."""

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.step

    @property
    def against_supervised(self) -> float:
        """Speed for the work: (samples/s of this step) / (samples/s of the supervised step, less its FLOPs share)."""
        return (self.supervised_step / self.step) * (self.step_flops / self.supervised_flops)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with what follows from them."""
        return {
            **self.__dict__,
            "samples_per_second": self.samples_per_second,
            "supervised_samples_per_second": self.batch_size / self.supervised_step,
            "flops_ratio": self.step_flops / self.supervised_flops,
            "against_supervised": self.against_supervised,
            "share_of_matmul_rate": self.step_flops / self.step / self.matmul_flops,
            "loader_share_of_synthetic": None if self.synthetic_step is None else self.synthetic_step / self.step,
        }


class _RecordOps(TorchDispatchMode):
    """Calls of ``sslfast`` ops inside, with detached arguments; what is changed in place is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sslfast":
            changed = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            self.calls.append((func, _detached(args, copy=changed), _detached(kwargs, copy=changed)))
        return func(*args, **kwargs)


def _detached(value: Any, *, copy: bool) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if copy else value.detach()
    if isinstance(value, list | tuple):
        return type(value)(_detached(item, copy=copy) for item in value)
    if isinstance(value, dict):
        return {name: _detached(item, copy=copy) for name, item in value.items()}
    return value


def median_seconds(function: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """Median wall time of ``function()``, the device idle before and after each call; one call is not counted."""
    times = []
    for _ in range(rounds + 1):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_step(config: TrainConfig, data: Path | str | int, *, steps: int, rounds: int) -> StepReport:
    """Time a recipe's step and its parts.

    Args:
        config: what would be trained; its epochs do not matter.
        data: as ``Trainer``'s.
        steps: whole steps that are timed.
        rounds: calls of each part.

    Raises:
        ValueError, FileNotFoundError: as ``Trainer`` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, progress="off", tensorboard=False)
        trainer = Trainer(config, data, Path(folder) / "run", report=lambda _line: None)
        try:
            return _measure(trainer, is_synthetic=isinstance(data, int), steps=steps, rounds=rounds)
        finally:
            trainer.close()


def _measure(trainer: Trainer, *, is_synthetic: bool, steps: int, rounds: int) -> StepReport:
    device, config = trainer.device, trainer.config
    trainer.method.train()
    batches = forever(trainer.loader)
    for _ in range(_WARM_UP):
        trainer.train_step(batches)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = median_seconds(lambda: trainer.train_step(batches), device, rounds=steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    busy = _busy_share(lambda: trainer.train_step(batches), device, rounds=rounds)
    loading = median_seconds(lambda: next(batches), device, rounds=rounds)

    batch = next(batches)
    again = _repeat(batch)
    synthetic = None if is_synthetic else median_seconds(lambda: trainer.train_step(again), device, rounds=steps)
    parts, flops = _parts(trainer, batch, rounds=rounds)
    supervised, supervised_flops = _supervised(trainer, batch, rounds=rounds)
    return StepReport(
        recipe=config.recipe,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        batch_size=config.batch_size,
        precision=str(trainer.dtype),
        loader=type(trainer.loader).__name__,
        steps=steps,
        step=step,
        synthetic_step=synthetic,
        parts={"loader, not hidden by anything": loading, **parts},
        step_flops=flops,
        supervised_step=supervised,
        supervised_flops=supervised_flops,
        matmul_flops=_matmul_rate(device, trainer.dtype, rounds=rounds),
        busy_share=busy,
        peak_bytes=peak,
    )


def _repeat(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def _parts(trainer: Trainer, batch: Batch, *, rounds: int) -> tuple[dict[str, float], int]:
    """Time of each part on one batch, and the FLOPs of forward and backward."""
    device, method, step = trainer.device, trainer.method, trainer.device_step
    views: dict[str, View] = trainer.stage(batch)

    def losses(model: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
            loss: Tensor = model(views, batch.sample_ids, step=step)["loss"]
        return loss

    def train(model: nn.Module) -> None:
        losses(model).backward()

    inputs: list[Tensor] = []
    hook = method.trunk.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].detach()))
    with FlopCounterMode(display=False) as counter, _RecordOps() as recorded:
        train(method)
    hook.remove()
    method.after_step()

    def trunk() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
            outputs = [method.trunk(x) for x in inputs]
        sum(y.float().sum() for y in outputs).backward()

    def replay() -> None:
        for function, arguments, options in recorded.calls:
            function(*arguments, **options)

    def update() -> None:
        for function, arguments, options in after.calls:
            function(*arguments, **options)

    train(method)
    with _RecordOps() as after:
        method.after_step()

    def forward_backward(model: nn.Module) -> None:
        train(model)
        method.after_step()

    whole = median_seconds(lambda: forward_backward(method), device, rounds=rounds)
    together = median_seconds(lambda: forward_backward(trainer.model), device, rounds=rounds)
    parts = {
        "views": median_seconds(lambda: trainer.stage(batch), device, rounds=rounds),
        "trunk, forward and backward": median_seconds(trunk, device, rounds=rounds) if inputs else 0.0,
        "sslfast ops in the loss": median_seconds(replay, device, rounds=rounds),
        "sslfast ops after the step": median_seconds(update, device, rounds=rounds),
        "optimizer": median_seconds(trainer.optimizer.step, device, rounds=rounds),
    }
    known = sum(parts[name] for name in list(parts)[1:4])
    parts["heads and the rest"] = max(0.0, whole - known)
    if trainer.model is not method:
        parts["gradient exchange, not hidden"] = max(0.0, together - whole)
    trainer.optimizer.zero_grad()
    return parts, counter.get_total_flops()


def _supervised(trainer: Trainer, batch: Batch, *, rounds: int) -> tuple[float, int]:
    """Time and FLOPs of a cross-entropy step on the first view of whole images, with a ``_CLASSES``-way layer."""
    device, config = trainer.device, trainer.config
    layout = torch.channels_last if trainer.channels_last else torch.contiguous_format
    trunk = build_trunk(config.model, seed=config.seed)
    net = nn.Sequential(trunk, nn.Linear(trunk.out_features, _CLASSES)).to(device)
    net.to(memory_format=layout)  # type: ignore[call-overload]
    size = config.method.image_view.crop.size
    pixels = torch.randn(len(batch.sample_ids), 3, size, size, device=device, dtype=trainer.dtype)
    pixels = pixels.contiguous(memory_format=layout)
    labels = batch.sample_ids % _CLASSES
    optimizer = build_optimizer(net, config.optim, lr=config.optim.peak_lr(config.batch_size))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
            loss = nn.functional.cross_entropy(net(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    return median_seconds(step, device, rounds=rounds), counter.get_total_flops()


def _matmul_rate(device: torch.device, dtype: torch.dtype, *, rounds: int) -> float:
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device, rounds=max(rounds, 10))


def _busy_share(step: Callable[[], None], device: torch.device, *, rounds: int) -> float | None:
    """Union of kernel and copy times over the time of the steps, from torch's profiler.

    Named ranges, such as the optimizer's, span their kernels and the gaps between: they do not count.
    """
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(rounds):
            step()
        wait_for(device)
        wall = time.perf_counter() - start
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    return covered(spans) / 1e6 / wall


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def render(report: StepReport) -> str:
    """The report as a table."""
    facts = report.as_dict()
    lines = [
        f"{report.recipe}, batch {report.batch_size}, {report.precision}, {report.device}, {report.loader}",
        "",
        f"whole step       {1e3 * report.step:10.2f} ms   {report.samples_per_second:10.1f} samples/s",
    ]
    if report.synthetic_step is not None:
        lines.append(
            f"  without loader {1e3 * report.synthetic_step:10.2f} ms   "
            f"{report.batch_size / report.synthetic_step:10.1f} samples/s; with it "
            f"{facts['loader_share_of_synthetic']:.1%} of that rate"
        )
    lines += ["", "parts, each alone"]
    lines += [
        f"  {name:34} {1e3 * seconds:10.2f} ms   {seconds / report.step:6.1%} of the step"
        for name, seconds in report.parts.items()
    ]
    lines += [
        "",
        f"supervised step  {1e3 * report.supervised_step:10.2f} ms   "
        f"{facts['supervised_samples_per_second']:10.1f} images/s",
        f"  work of this step over the supervised one {facts['flops_ratio']:.2f} (FLOPs); speed for the work "
        f"{report.against_supervised:.1%}",
        f"  share of the measured matrix product rate ({report.matmul_flops / 1e12:.2f} TFLOP/s): "
        f"{facts['share_of_matmul_rate']:.1%}",
    ]
    if report.busy_share is not None:
        lines.append(f"  GPU busy {report.busy_share:.1%} of the time")
    if report.peak_bytes is not None:
        each = report.peak_bytes / report.batch_size / 2**20
        lines.append(f"  peak memory {report.peak_bytes / 2**30:.2f} GiB, {each:.1f} MiB a sample")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """``sslfast bench step [DATA|synthetic:N] [--recipe NAME]``."""
    parser = argparse.ArgumentParser(prog="sslfast bench step", description=__doc__)
    parser.add_argument("data", nargs="?", default="synthetic:100000", help="folder, manifest, .beton or synthetic:N")
    parser.add_argument("--recipe", choices=RECIPES, default="pirl-paper")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--loader", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--steps", type=int, default=20, help="whole steps that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each part")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--chart", type=Path, help="also draw the parts (.png)")
    chosen = parser.parse_args(sys.argv[1:] if argv is None else argv)
    config = RECIPES[chosen.recipe]()
    data = parse_data(chosen.data)
    config = replace(
        config,
        batch_size=chosen.batch_size or config.batch_size,
        device=chosen.device,
        precision=chosen.precision,
        loader=replace(
            config.loader, name="synthetic" if isinstance(data, int) else chosen.loader, workers=chosen.workers
        ),
    )
    report = measure_step(config, data, steps=chosen.steps, rounds=chosen.rounds)
    print(render(report))
    if chosen.json is not None:
        facts = {"torch": str(torch.__version__), "platform": platform.platform()}
        chosen.json.write_text(json.dumps({**facts, **report.as_dict()}, indent=2) + "\n")
    if chosen.chart is not None:
        from sslfast.report import draw_bars

        milliseconds = {name: 1e3 * seconds for name, seconds in report.parts.items()}
        title = f"{report.recipe}, batch {report.batch_size}, {report.device}: parts of a step"
        draw_bars({"whole step": 1e3 * report.step, **milliseconds}, chosen.chart, title=title, unit="ms")
    return 0
