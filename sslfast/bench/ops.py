"""``sslfast bench ops``: every op beside the plain torch form that it replaces, in one process, checked before timed.

``benchmarks/bench_<op>.py`` measure the same functions with pytest-benchmark and more sizes.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast import ops
from sslfast.bench.peers import gather_infonce, loop_ema_, matmul_infonce, scatter_update_, slice_enqueue_
from sslfast.bench.timing import milliseconds, peak_extra_bytes, seconds_in_turns
from sslfast.device import wait_for
from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, ViewConfig, draw_view


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's 161 parameters (He et al. 2016, 25.6 million values), in the order of its layers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            kernels += [(4 * width, inputs, 1, 1)] if block == 0 else []
            for kernel in kernels:
                shapes += [kernel, kernel[:1], kernel[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


@dataclass
class Case:
    """One op at one size."""

    op: str
    size: str
    implementations: dict[str, Callable[[], Any]]
    """Name -> one call; the plain form first, it is what the others are compared with."""
    floor_bytes: int
    """Bytes that one call must move at least."""
    check: Callable[[], None]
    """Compares the results of the implementations; raises AssertionError."""


def bank_nce_case(
    device: torch.device,
    *,
    batch: int = 256,
    num_negatives: int = 4096,
    dimensions: int = 128,
    num_rows: int = 100_000,
    views: int = 1,
    dtype: torch.dtype = torch.float32,
    loss: str = "infonce",
) -> Case:
    """Forward and backward of the loss, negatives drawn anew in every call."""
    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(num_rows, dimensions, generator=generator), dim=1).to(device)
    query = normalize(torch.randn(views, batch, dimensions, generator=generator), dim=-1).to(device).requires_grad_()
    index = torch.randperm(num_rows, generator=generator)[:batch].to(device)
    stored = bank.to(dtype)
    options: dict[str, Any] = {"num_negatives": num_negatives, "loss": loss}
    if loss == "nce":
        options["z"] = 2.2 * num_rows

    def fused() -> Tensor:
        query.grad = None
        value = ops.bank_nce(query, stored, index, **options)
        assert isinstance(value, Tensor)
        value.mean().backward()
        return value.mean().detach()

    def gather(negatives: Tensor | None = None) -> Tensor:
        query.grad = None
        if negatives is None:
            negatives = torch.randint(num_rows, (batch, num_negatives), device=device)
        # One gather per view, as VISSL and PyContrast do.
        losses = [gather_infonce(view[None], bank, index, negatives, temperature=0.07) for view in query]
        value = torch.stack(losses).mean()
        value.backward()
        return value.detach()

    def check() -> None:
        negatives = ops.negative_rows(index, num_negatives=num_negatives, num_rows=num_rows, seed=0, step=0)
        value, gradient = fused(), query.grad
        if loss == "infonce":
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # a bf16 bank has 8 bits of mantissa
            torch.testing.assert_close(value, gather(negatives), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(gradient, query.grad, rtol=tolerance, atol=tolerance)

    peers: dict[str, Callable[[], Any]] = {"eager gather": gather} if loss == "infonce" else {}
    size = f"B={batch} V={views} K={num_negatives} D={dimensions} N={num_rows} {str(dtype)[6:]} {loss}"
    floor = batch * (num_negatives + 1) * dimensions * stored.element_size()
    return Case("bank_nce", size, {**peers, "sslfast": fused}, floor, check)


def bank_nce_dense_case(
    device: torch.device,
    *,
    batch: int = 256,
    num_rows: int = 100_000,
    dimensions: int = 128,
    num_negatives: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Forward and backward of InfoNCE against the whole bank, or against ``num_negatives`` rows for the whole batch."""
    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(num_rows, dimensions, generator=generator), dim=1).to(device, dtype)
    query = normalize(torch.randn(1, batch, dimensions, generator=generator), dim=-1).to(device).requires_grad_()
    index = torch.randperm(num_rows, generator=generator)[:batch].to(device)
    negatives = (
        None if num_negatives is None else torch.randint(num_rows, (num_negatives,), generator=generator).to(device)
    )

    def fused() -> Tensor:
        query.grad = None
        value = ops.bank_nce_dense(query, bank, index, negatives=negatives)[0].mean()
        value.backward()
        return value.detach()

    def eager() -> Tensor:
        query.grad = None
        value = matmul_infonce(query, bank, index, negatives, temperature=0.07, exclude_self=False).mean()
        value.backward()
        return value.detach()

    def check() -> None:
        value, gradient = fused(), query.grad
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # a bf16 bank has 8 bits of mantissa
        torch.testing.assert_close(value, eager(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, query.grad, rtol=tolerance, atol=tolerance)

    rest = "whole bank" if negatives is None else f"K={len(negatives)} shared"
    size = f"B={batch} D={dimensions} N={num_rows} {str(dtype)[6:]} {rest}"
    floor = (num_rows if negatives is None else len(negatives)) * dimensions * bank.element_size()
    return Case("bank_nce_dense", size, {"eager [B, N] scores": eager, "sslfast": fused}, floor, check)


def bank_update_case(device: torch.device, *, batch: int = 1024, num_rows: int = 100_000) -> Case:
    """The momentum update of one batch."""
    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(num_rows, 128, generator=generator), dim=1).to(device)
    features = normalize(torch.randn(batch, 128, generator=generator), dim=1).to(device)
    index = torch.randperm(num_rows, generator=generator)[:batch].to(device)

    def check() -> None:
        ours, theirs = bank.clone(), bank.clone()
        ops.bank_update_(ours, index, features, momentum=0.5)
        scatter_update_(theirs, index, features, momentum=0.5)
        torch.testing.assert_close(ours, theirs)

    implementations = {
        "eager gather": lambda: scatter_update_(bank, index, features, momentum=0.5),
        "sslfast": lambda: ops.bank_update_(bank, index, features, momentum=0.5),
    }
    return Case("bank_update_", f"B={batch} D=128 N={num_rows} float32", implementations, 3 * batch * 512, check)


def bank_enqueue_case(device: torch.device, *, batch: int = 256, num_rows: int = 65_536) -> Case:
    """One batch of keys into MoCo's queue (batch 256, 65,536 keys, section 4.1)."""
    generator = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(num_rows, 128, generator=generator), dim=1).to(device)
    keys = normalize(torch.randn(batch, 128, generator=generator), dim=1).to(device)
    head = torch.zeros((), dtype=torch.int64, device=device)

    def check() -> None:
        ours, theirs = (bank.clone(), head.clone()), (bank.clone(), head.clone())
        ops.bank_enqueue_(*ours, keys)
        slice_enqueue_(*theirs, keys)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])

    implementations = {
        "eager slice": lambda: slice_enqueue_(bank, head, keys),
        "sslfast": lambda: ops.bank_enqueue_(bank, head, keys),
    }
    return Case("bank_enqueue_", f"B={batch} D=128 N={num_rows} float32", implementations, 2 * batch * 512, check)


def ema_update_case(
    device: torch.device,
    *,
    source_dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Case:
    """The momentum encoder of a ResNet-50 (of parameters of other ``shapes``, where given): fp32 targets."""
    generator = torch.Generator().manual_seed(0)
    network, shapes = "ResNet-50, " if shapes is None else "", shapes or resnet50_shapes()
    targets = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    sources = [torch.randn(shape, generator=generator).to(device, source_dtype) for shape in shapes]
    momentum = 0.999

    def check() -> None:
        ours, theirs = [t.clone() for t in targets], [t.clone() for t in targets]
        ops.ema_update_(ours, sources, momentum=momentum)
        loop_ema_(theirs, sources, momentum=momentum)
        torch.testing.assert_close(ours, theirs)

    implementations: dict[str, Callable[[], Any]] = {
        "eager loop": lambda: loop_ema_(targets, sources, momentum=momentum)
    }
    if source_dtype == torch.float32:  # one dtype for both lists
        implementations["_foreach_lerp_"] = lambda: torch._foreach_lerp_(targets, sources, 1 - momentum)
    implementations["sslfast"] = lambda: ops.ema_update_(targets, sources, momentum=momentum)
    floor = sum(t.numel() * (8 + s.element_size()) for t, s in zip(targets, sources, strict=True))
    size = f"{network}{len(targets)} tensors, {str(source_dtype)[6:]} to float32"
    return Case("ema_update_", size, implementations, floor, check)


def negative_rows_case(device: torch.device, *, batch: int = 256, num_negatives: int = 4096) -> Case:
    """Drawing negatives alone; the eager form is torch.randint, which cannot exclude the sample or be replayed."""
    index, num_rows = torch.arange(batch, device=device), 1_281_167
    draw: dict[str, Any] = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": 0, "step": 0}

    def check() -> None:
        assert torch.equal(ops.negative_rows(index, **draw), ops.negative_rows_reference(index, **draw))

    implementations = {
        "eager randint": lambda: torch.randint(num_rows, (batch, num_negatives), device=device),
        "sslfast": lambda: ops.negative_rows(index, **draw),
    }
    return Case("negative_rows", f"B={batch} K={num_negatives}", implementations, batch * num_negatives * 8, check)


def pixel_cases(device: torch.device, *, batch: int = 64) -> list[Case]:
    """rotate90 and jigsaw_patches on uint8 crops and rgb_to_lab on floats, beside their references in torch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, 255, 255), generator=generator).to(device, torch.uint8)
    turns = torch.randint(4, (batch,), generator=generator).to(device)
    order = torch.rand(batch, 9, generator=generator).argsort(1).to(device)
    offsets = torch.randint(22, (batch, 9, 2), generator=generator).to(device)
    calls: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], int]] = [
        (ops.rotate90, ops.rotate90_reference, (images, turns), 2 * images.numel()),
        (ops.jigsaw_patches, ops.jigsaw_patches_reference, (images, order, offsets), 2 * batch * 9 * 3 * 64 * 64),
        (ops.rgb_to_lab, ops.rgb_to_lab_reference, (images / 255,), 8 * images.numel()),
    ]
    cases = []
    for op, reference, given, floor in calls:
        ours, eager = partial(op, *given), partial(reference, *given)

        def check(ours: Callable[[], Tensor] = ours, eager: Callable[[], Tensor] = eager) -> None:
            torch.testing.assert_close(ours(), eager(), rtol=0, atol=1e-3)

        size = f"[{batch}, 3, 255, 255] {str(given[0].dtype)[6:]}"
        cases.append(Case(op.__name__, size, {"eager": eager, "sslfast": ours}, floor, check))
    return cases


def render_views_case(device: torch.device, *, batch: int = 64, jigsaw: bool = True, blur: bool = False) -> Case:
    """The view stage of PIRL's jigsaw view (255-pixel crops, nine patches of 64) or image view (224), all colour
    operations on (blur, where asked for, of every picture), beside the same operations one after the other in torch."""
    generator = torch.Generator().manual_seed(0)
    side = 255 if jigsaw else 224
    crops = torch.randint(256, (batch, 3, side, side), generator=generator).to(device, torch.uint8)
    view = ViewConfig(
        crop=CropConfig(size=side),
        jigsaw=JigsawConfig() if jigsaw else None,
        augment=AugmentConfig(hue=0.4, blur_probability=float(blur)),
    )
    drawn = draw_view(torch.arange(batch, device=device), view, seed=0, position=0, epoch=0)
    parameters = drawn.pixel
    options: dict[str, Any] = {"photometric": False, "blur": blur}
    if jigsaw:
        options |= {"permutation": drawn.permutation, "offsets": drawn.offsets}

    def check() -> None:
        ours = ops.render_views(crops, parameters, **options)
        torch.testing.assert_close(ours, ops.render_views_reference(crops, parameters, **options), rtol=0, atol=1e-3)

    implementations = {
        "torch": lambda: ops.render_views_reference(crops, parameters, **options),
        "sslfast": lambda: ops.render_views(crops, parameters, **options),
    }
    written = batch * 3 * (9 * 64 * 64 if jigsaw else 224 * 224)
    size = f"{'jigsaw' if jigsaw else 'image'} view{' with blur' if blur else ''}, B={batch}, float32"
    return Case("render_views", size, implementations, 5 * written, check)


def op_cases(device: torch.device) -> list[Case]:
    """The cases that ``sslfast bench ops`` measures."""
    return [
        bank_nce_case(device),
        bank_nce_case(device, views=2),
        bank_nce_case(device, dtype=torch.bfloat16),
        bank_nce_case(device, loss="nce"),
        bank_nce_dense_case(device),
        bank_nce_dense_case(device, num_negatives=4096),
        negative_rows_case(device),
        bank_update_case(device),
        bank_enqueue_case(device),
        ema_update_case(device),
        ema_update_case(device, source_dtype=torch.bfloat16),
        *pixel_cases(device),
        render_views_case(device),
        render_views_case(device, jigsaw=False),
        render_views_case(device, jigsaw=False, blur=True),
    ]


def measure(case: Case, device: torch.device, *, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table of one case: times of ``rounds`` calls in turns, peak memory of one call."""
    case.check()
    memory = {name: peak_extra_bytes(device, function) for name, function in case.implementations.items()}
    seconds = seconds_in_turns(case.implementations, device, rounds=rounds)
    first = statistics.median(next(iter(seconds.values())))
    return [
        {
            "op": case.op,
            "size": case.size,
            "implementation": name,
            **milliseconds(times),
            "times_faster": round(first / statistics.median(times), 2),
            "floor_gb_per_s": round(case.floor_bytes / statistics.median(times) / 1e9, 2),
            "peak_extra_mib": None if memory[name] is None else round((memory[name] or 0) / 2**20, 2),
        }
        for name, times in seconds.items()
    ]


def time_case(benchmark: Any, case: Case, implementation: str, device: torch.device, *, rounds: int = 15) -> None:
    """One implementation under pytest-benchmark: checked, grouped with the others, memory and bandwidth in its
    ``extra_info``."""
    case.check()
    benchmark.group = f"{case.op} {case.size}, {device}"
    peak = peak_extra_bytes(device, case.implementations[implementation])

    def run() -> None:
        case.implementations[implementation]()
        wait_for(device)

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info["peak_mib"] = None if peak is None else round(peak / 2**20, 2)
        benchmark.extra_info["gb_per_s"] = round(case.floor_bytes / benchmark.stats.stats.median / 1e9, 2)


def render(rows: list[dict[str, Any]]) -> str:
    """The measurements as a table."""
    head = f"{'op':15} {'size':50} {'implementation':15} {'median ms':>10} {'times':>7} {'GB/s':>7} {'MiB':>8}"
    lines = [head]
    for row in rows:
        memory = "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:8.1f}"
        lines.append(
            f"{row['op']:15} {row['size']:50} {row['implementation']:15} {row['median_ms']:10.3f} "
            f"{row['times_faster']:7.2f} {row['floor_gb_per_s']:7.2f} {memory}"
        )
    lines.append(
        "times: speed relative to the op's first row. GB/s: bytes that must move over time. MiB: peak extra memory."
    )
    return "\n".join(lines)
