"""Runs every kernel at two sizes or more beside its reference: short enough for compute-sanitizer's tools.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m benchmarks.sanitize_kernels

One size is odd, so that no row is aligned; another takes the vector and tensor-core paths, bf16 and 128 columns; in the
last, for the whole bank alone, a block streams enough tiles for the ring of the warpgroup kernel to wrap on a GPU of up
to 150 multiprocessors. Nothing is captured in a graph: with
PYTORCH_NO_CUDA_MEMORY_CACHING=1, by which every tensor is an allocation of its own, capture fails on purpose.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sslfast import ops
from sslfast.views import AugmentConfig, CropConfig, JigsawConfig, ViewConfig, draw_view

SIZES: tuple[dict[str, Any], ...] = (
    {"batch": 5, "rows": 41, "columns": 23, "negatives": 7, "dtype": torch.float32},
    {"batch": 70, "rows": 1700, "columns": 128, "negatives": 200, "dtype": torch.bfloat16},
    {"batch": 1100, "rows": 8100, "columns": 128, "negatives": 200, "dtype": torch.bfloat16, "only": "bank_nce full"},
)


def calls(device: torch.device, size: dict[str, Any]) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of every op; the check raises AssertionError."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, columns, dtype = size["batch"], size["rows"], size["columns"], size["dtype"]
    bank = normalize(torch.randn(rows, columns, generator=generator), dim=1).to(device, dtype)
    query = normalize(torch.randn(2, batch, columns, generator=generator), dim=-1).to(device)
    index = torch.randperm(rows, generator=generator)[: min(batch, rows)].to(device)
    query = query[:, : len(index)]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2

    def scored(**options: Any) -> None:
        found = []
        for function in (ops.bank_nce, ops.bank_nce_reference):
            leaf = query.detach().clone().requires_grad_()
            loss = function(leaf, bank, index, num_negatives=size["negatives"], **options)
            assert isinstance(loss, Tensor)
            found.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())

    for mode in ("sampled", "shared", "full"):
        for loss in ("infonce", "nce"):
            options = {"negatives": mode, "loss": loss, "z": 2.2 * rows if loss == "nce" else None}
            yield f"bank_nce {mode} {loss}", lambda options=options: scored(**options)

    def same(function: Callable[..., Any], reference: Callable[..., Any], *given: Any, **options: Any) -> None:
        ours, theirs = ([part.clone() if isinstance(part, Tensor) else part for part in given] for _ in range(2))
        results = function(*ours, **options), reference(*theirs, **options)
        if results[0] is None:  # written in place
            results = ours[0], theirs[0]
        torch.testing.assert_close(*results, rtol=tolerance, atol=max(tolerance, 1e-3))

    features = normalize(torch.randn(len(index), columns, generator=generator), dim=1).to(device)
    head = torch.tensor(rows - 2, device=device)
    yield "bank_update_", lambda: same(ops.bank_update_, ops.bank_update_reference, bank, index, features)
    yield "bank_enqueue_", lambda: same(ops.bank_enqueue_, ops.bank_enqueue_reference, bank, head, features)
    draw: dict[str, Any] = {"num_negatives": size["negatives"], "num_rows": rows, "seed": 1, "step": 2}
    yield "negative_rows", lambda: same(ops.negative_rows, ops.negative_rows_reference, index, **draw)

    def averaged() -> None:
        shapes = [(3, 5), (7,), (columns, rows)]
        sources = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        ours, theirs = ([torch.ones_like(source) for source in sources] for _ in range(2))
        ops.ema_update_(ours, sources, momentum=0.9)
        ops.ema_update_reference(theirs, sources, momentum=0.9)
        torch.testing.assert_close(ours, theirs)

    yield "ema_update_", averaged
    side = 27 if dtype == torch.float32 else 96
    images = torch.randint(256, (3, 3, side, side), generator=generator).to(device, torch.uint8)
    turns = torch.tensor([1, 2, 3], device=device)
    yield "rotate90", lambda: same(ops.rotate90, ops.rotate90_reference, images, turns)
    order = torch.rand(3, 9, generator=generator).argsort(1).to(device)
    offsets = torch.randint(2, (3, 9, 2), generator=generator).to(device)
    patches: dict[str, Any] = {"grid": 3, "patch_size": side // 3 - 1}
    yield (
        "jigsaw_patches",
        lambda: same(ops.jigsaw_patches, ops.jigsaw_patches_reference, images, order, offsets, **patches),
    )
    yield "rgb_to_lab", lambda: same(ops.rgb_to_lab, ops.rgb_to_lab_reference, images / 255)
    augment = AugmentConfig(hue=0.4, photometric_probability=1.0, blur_probability=1.0)
    for jigsaw in (None, JigsawConfig(patch_size=side // 3 - 1)):
        view = ViewConfig(crop=CropConfig(size=side), jigsaw=jigsaw, augment=augment)
        drawn = draw_view(torch.arange(3, device=device), view, seed=0, position=0, epoch=0)
        place: dict[str, Any] = {}
        if jigsaw is not None:
            place = {"permutation": drawn.permutation, "offsets": drawn.offsets, "patch_size": side // 3 - 1}
        name = "render_views" + (" jigsaw" if jigsaw else "")
        yield name, lambda pixel=drawn.pixel, place=place: same_levels(images, pixel, place)


def same_levels(images: Tensor, parameters: Tensor, place: dict[str, Any]) -> None:
    """A rounded level may fall on the other side of an integer: nearly all pixels agree, none is far off."""
    ours, theirs = (
        function(images, parameters, photometric=True, blur=True, **place)
        for function in (ops.render_views, ops.render_views_reference)
    )
    assert (ours - theirs).abs().gt(1e-2).float().mean().item() < 0.02


def main(argv: list[str] | None = None) -> int:
    """Run all calls; prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="calls whose name contains this word")
    chosen = parser.parse_args(argv)
    device = torch.device(chosen.device)
    for size in SIZES:
        for name, check in calls(device, size):
            if chosen.only in name and size.get("only", "") in name:
                check()
                print(f"{name}, {size['rows']} x {size['columns']} {size['dtype']}: agrees", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
