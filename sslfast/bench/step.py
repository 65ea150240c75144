"""``sslfast bench step``: how fast a recipe trains here, and where the time of a step goes.

The whole step is timed as training runs it (loader, views, forward, backward, optimizer, bank). Then its parts are
timed alone on one recorded batch, each with the device idle before and after, so parts that overlap in training add up
to more than the step. Calls of ``sslfast`` ops are recorded and replayed, whatever the method. A supervised step of the
same trunk on the image view is measured for comparison; FLOPs are counted by torch's ``FlopCounterMode``, and the rate
of a large matrix product is measured in the same run.
"""

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
from sslfast.bench.timing import WARM_UP, device_name, median_seconds
from sslfast.device import wait_for
from sslfast.models import build_trunk
from sslfast.optim import build_optimizer
from sslfast.training import TrainConfig, Trainer
from sslfast.views import Batch, View

_CLASSES = 1000  # of the supervised step


@dataclass(kw_only=True)
class StepReport:
    """What ``sslfast bench step`` measures; times in seconds, all of one process."""

    recipe: str
    device: str
    batch_size: int
    precision: str
    loader: str
    steps: int
    step: float
    """Median time of a whole step."""
    synthetic_step: float | None
    """The same without a loader, repeating one batch; None where the data are synthetic."""
    parts: dict[str, float]
    """Part -> its time when run alone."""
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
    """Peak CUDA memory of a step; None on a CPU."""

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.step

    @property
    def against_supervised(self) -> float:
        """Speed for the work: FLOP/s of this step over FLOP/s of the supervised step."""
        return (self.supervised_step / self.step) * (self.step_flops / self.supervised_flops)

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields and what is computed from them."""
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
    """Records calls of ``sslfast`` ops with detached arguments; those of ops that work in place are copied."""

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


def measure_step(config: TrainConfig, data: Path | str | int, *, steps: int, rounds: int) -> StepReport:
    """Time a recipe's step and its parts.

    Args:
        config: the run; its epochs do not matter.
        data: as ``Trainer`` takes it.
        steps: timed steps.
        rounds: timed calls of each part.

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
    for _ in range(WARM_UP):
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
        device=device_name(device),
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
    """Time and FLOPs of a cross-entropy step on the image view, with a linear layer of ``_CLASSES`` classes."""
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

    Named ranges, such as the optimizer's, are not counted: they span the gaps between their kernels too.
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
        f"  FLOPs of this step over the supervised one {facts['flops_ratio']:.2f}; speed for the work "
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
