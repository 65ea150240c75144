"""Training on a GPU: no step waits for the device, and results are those of a CPU.

Tests with ``device`` run on every device of the machine; on CUDA torch forbids the host to wait during a step. On any
machine a step is also traced with fake tensors that claim to be on a GPU, which detects reads and copies between host
and device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslfast.loaders.registry import build_loader
from sslfast.methods.base import Method
from sslfast.optim.optimizers import OptimConfig, build_optimizer
from sslfast.optim.state import load_optimizer
from sslfast.recipes import RECIPES
from sslfast.recipes.pirl import pirl_small
from sslfast.training.config import TrainConfig
from sslfast.training.nonfinite import FiniteMeans
from sslfast.training.prefetch import Prefetcher
from sslfast.training.trainer import Trainer
from sslfast.views.stage import ViewStage
from sslfast.views.types import Batch
from tests.methods.harness import BATCH, ROWS, build, final, losses, tiny, tiny_trunks, train

METHOD_CHANGES: dict[str, dict[str, Any]] = {
    "cpc-small": {"patch_size": 8, "patch_stride": 4},
    "deepcluster-small": {"clusters": 4},
    "dino-small": {"dimensions": 64},
    "sela-small": {"clusters": 4},
}
STEPS = 12
"""Batches that are prefetched."""
SMALL = sorted(name for name in RECIPES if name.endswith("-small") and name not in ("moco-v1-small", "npid-small"))
MORE = {
    "pirl-shared": {"negatives": "shared"},
    "pirl-full-bf16": {"negatives": "full", "bank_dtype": "bf16"},
    "pirl-rotation-running": {"pretext": "rotation", "loss": "nce", "z": "running"},
    "pirl-exact-separate": {"loss": "nce", "z": "exact", "separate_draws": True},
}


@pytest.fixture(autouse=True)
def without_faiss() -> Iterator[None]:
    """DeepCluster imports it when it is built; steps do not use it."""
    with patch("sslfast.methods.deepcluster.import_faiss"):
        yield


def small(name: str) -> TrainConfig:
    if name in MORE:
        return tiny(pirl_small(), num_negatives=12, **MORE[name])
    return tiny(RECIPES[name](), **METHOD_CHANGES.get(name, {}))


class HostCopies(TorchDispatchMode):
    """Notes every copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name in ("aten::_to_copy", "aten::copy_"):
            to, source = (result, args[0]) if name == "aten::_to_copy" else (args[0], args[1])
            if to.device.type != source.device.type:
                self.found.append(f"{name} of {list(source.shape)} from {source.device} to {to.device}")
        return result


def claim_cuda(method: Method) -> None:
    """Replaces all state by fake tensors on a GPU; under a FakeTensorMode."""

    def claimed(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    for module in method.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(claimed(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = claimed(buffer)


def trace_step(name: str) -> list[str]:
    """Host copies in the views, the forward pass and the bank update of a step."""
    config = small(name)
    method = build(config)
    views = config.method.views()
    stage = ViewStage(views, seed=config.seed)
    with FakeTensorMode(), HostCopies() as copies:
        claim_cuda(method)
        method._z_is_set = True  # PIRL reads it from the device in the first two steps
        rows = torch.empty(BATCH, dtype=torch.int64, device="cuda")
        crops = {
            name: torch.empty(BATCH, 3, view.crop.size, view.crop.size, dtype=torch.uint8, device="cuda")
            for name, view in views.items()
        }
        step = torch.empty((), dtype=torch.int64, device="cuda")
        loss = method(stage(Batch(sample_ids=rows, crops=crops, epoch=3)), rows, step=step)["loss"]
        method.after_step()
        assert loss.device.type == "cuda"
    return copies.found


@pytest.mark.parametrize("name", [*SMALL, *MORE])
def test_a_step_copies_nothing_between_host_and_device(name: str) -> None:
    assert trace_step(name) == []


def test_tracing_detects_host_syncs() -> None:
    with FakeTensorMode(), HostCopies() as copies:
        x = torch.ones(3, device="cuda")
        torch.tensor([1.0, 2.0], device="cuda")
        torch.zeros(3, device="cuda").copy_(torch.zeros(3))
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0]
    assert [line.partition(" ")[0] for line in copies.found] == ["aten::_to_copy", "aten::copy_"]


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA an error wherever the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trainer_of(config: TrainConfig, output: Path) -> Trainer:
    with tiny_trunks():
        return Trainer(config, ROWS, output, report=lambda _line: None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in (*SMALL, *MORE)),
        ("pirl-small", {"on_nonfinite": "skip", "accumulate_steps": 2}),
        ("simclr-small", {"optim": OptimConfig(name="lars"), "channels_last": False}),
    ],
)
def test_steps_wait_for_nothing(device: torch.device, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Precision auto: bf16 on a GPU."""
    config = replace(small(name), device=str(device), precision="auto", channels_last=True)
    config = replace(config, **changes)
    trainer = trainer_of(config, tmp_path / "run")
    batches = trainer.loader.epoch(0)
    trainer.method.train()
    if trainer.feature_pass is not None:
        trainer.feature_pass.run(0)
    trainer.method.start_epoch(0)

    def step() -> None:
        trainer._set_rates()
        trainer.nonfinite.snapshot()
        trainer.train_step(batches)
        trainer.nonfinite.restore()

    for _ in range(2):  # pinned memory, cuDNN's plans; PIRL reads from the device twice whether Z is known
        step()
    with no_waiting(device):
        step()
    means, bad_step = trainer.means.read()
    assert bad_step is None
    assert all(torch.isfinite(p).all() for p in trainer.method.parameters())
    assert means["loss"] == means["loss"]
    trainer.close()


def test_prefetched_views_are_the_same(device: torch.device) -> None:
    """The side stream renders while the current one is busy; memory of a batch is not reused before it was read."""
    config = small("pirl-small")
    views = config.method.views()

    def batches() -> Iterator[Batch]:
        loader = build_loader(
            config.loader, views=views, batch_size=BATCH, seed=config.seed, synthetic_rows=STEPS * BATCH, device=device
        )
        return iter(loader.epoch(0))

    stage = ViewStage(views, seed=config.seed)
    samples, ahead = Prefetcher(stage, parts=2, device=device), batches()
    load = torch.ones(1024 if device.type == "cuda" else 8, 1024 if device.type == "cuda" else 8, device=device)
    sums = []
    for _ in range(STEPS * 2):
        sample_ids, rendered = samples.take(ahead)
        load = load @ load / len(load)  # work that the views are queued behind
        sums.append([sample_ids.sum(), *(view.pixels.double().sum() for view in rendered.values())])
        del sample_ids, rendered
        samples.ahead(ahead)
    expected = []
    for batch in batches():
        for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
            part = replace(batch, sample_ids=batch.sample_ids[half], crops={n: c[half] for n, c in batch.crops.items()})
            expected.append([part.sample_ids.sum(), *(view.pixels.double().sum() for view in stage(part).values())])
    got, wanted = (
        torch.stack([torch.stack([x.double() for x in line]) for line in lines]) for lines in (sums, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-9)


@contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions in fp32, not TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def assert_same_training(output: Path, reference: Path) -> None:
    assert losses(output) == pytest.approx(losses(reference), rel=2e-3)
    state, expected = final(output), final(reference)
    assert state["step"] == expected["step"]
    for name, value in expected["method"].items():
        torch.testing.assert_close(
            state["method"][name], value, rtol=2e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def pirl(device: torch.device | str, **changes: Any) -> TrainConfig:
    config = replace(tiny(pirl_small(), num_negatives=12, loss="nce"), epochs=7, device=str(device))
    return replace(config, **changes)


def test_twenty_one_steps_of_pirl_are_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    with exact_products():
        train(pirl("cpu"), tmp_path / "cpu")
        train(pirl(device), tmp_path / "device")
    assert_same_training(tmp_path / "device", tmp_path / "cpu")


@pytest.mark.parametrize("to_device", [True, False])
def test_a_run_resumes_on_another_device(device: torch.device, to_device: bool, tmp_path: Path) -> None:
    first, second = (pirl("cpu"), pirl(device)) if to_device else (pirl(device), pirl("cpu"))
    with exact_products():
        train(pirl("cpu"), tmp_path / "whole")
        train(first, tmp_path / "moved", stop_after=5)
        trainer = train(second, tmp_path / "moved")
    assert_same_training(tmp_path / "moved", tmp_path / "whole")
    assert_momentum_has_its_parameters_layout(trainer.optimizer)


def assert_momentum_has_its_parameters_layout(optimizer: torch.optim.Optimizer) -> None:
    for parameter, values in optimizer.state.items():
        assert values["momentum_buffer"].stride() == parameter.stride()
        assert values["momentum_buffer"].device == parameter.device


def test_momentum_of_another_memory_format(device: torch.device) -> None:
    """The fused optimizer requires the memory format of the parameter; a checkpoint has that of its device."""
    first, second = (torch.nn.Conv2d(3, 4, 3) for _ in range(2))
    second = second.to(device).to(memory_format=torch.channels_last)
    optimizers = [build_optimizer(net, OptimConfig(), lr=0.03) for net in (first, second)]
    first(torch.ones(2, 3, 5, 5)).square().mean().backward()
    optimizers[0].step()
    load_optimizer(optimizers[1], optimizers[0].state_dict())
    assert_momentum_has_its_parameters_layout(optimizers[1])
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        momenta = [optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (old, new), strict=True)]
        assert torch.equal(momenta[0], momenta[1].cpu())
    second(torch.ones(2, 3, 5, 5, device=device)).square().mean().backward()
    optimizers[1].step()
    assert all(p.isfinite().all() for p in second.parameters())


def test_means_own_their_memory(device: torch.device) -> None:
    """A captured graph writes the values of every step, such as Z in float64, to the same memory."""
    means = FiniteMeans(device, leave_out=False)
    value, step = (torch.zeros((), dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
    for number in (1.0, 3.0):
        value.fill_(number)
        means.add({"loss": value}, step=step)
    assert means.read() == ({"loss": 2.0}, None)


def test_captured_steps_equal_eager_ones(device: torch.device, tmp_path: Path) -> None:
    """On CUDA by CUDA graphs; compiling for a CPU is tested elsewhere."""
    config = replace(pirl(device), epochs=2)
    captured = replace(config, compile="reduce-overhead") if device.type == "cuda" else config
    with exact_products():
        train(config, tmp_path / "eager")
        train(captured, tmp_path / "captured")
    assert_same_training(tmp_path / "captured", tmp_path / "eager")
