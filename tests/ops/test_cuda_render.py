"""render_views' CUDA kernel, run on the CPU (tests/cuda_emulation), against the CPU op."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.ops import ViewParameter
from tests.cuda_emulation import emulate, fence, load, source_of
from tests.ops.test_render_views import make

NORMAL = (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    load([source_of("library"), source_of("render_views")])


def arguments(
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    photometric: bool = True,
    blur: bool = True,
    **shape: Any,
) -> list[Any]:
    crops, parameters, options = make(torch.device("cpu"), **shape)
    if not photometric:
        parameters[..., ViewParameter.PHOTOMETRIC] = 0
    if not blur:
        parameters[..., ViewParameter.BLUR_SIGMA] = 0
    placement = [options.get(name) for name in ("quarter_turns", "permutation", "offsets")]
    sizes = [options.get("grid", 0), options.get("patch_size", 0)]
    return [crops, parameters, *placement, *sizes, *NORMAL, dtype, channels_last, photometric, blur]


def assert_agrees(args: list[Any], order: int = 0, **device: int) -> None:
    """Equal up to rounding; a level of the photometric set may differ by one."""
    expected = torch.ops.sslfast.render_views(*args)
    fenced = [fence(arg) if isinstance(arg, Tensor) else arg for arg in args]
    result = emulate("render_views", *fenced, order=order, **device)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    tolerance = 1e-4 if expected.dtype == torch.float32 else 4 * torch.finfo(expected.dtype).eps
    different = (result.double() - expected.double()).abs() > tolerance
    assert different.float().mean() < (2e-3 if args[-2] else 1e-9)


@pytest.mark.parametrize("photometric", [False, True])
@pytest.mark.parametrize("side", [1, 2, 3, 17, 40])
def test_whole_crops(side: int, photometric: bool) -> None:
    for order in (0, 2):
        assert_agrees(arguments(batch=5, side=side, turns=True, photometric=photometric), order)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_jigsaw(dtype: torch.dtype, channels_last: bool) -> None:
    args = arguments(dtype=dtype, channels_last=channels_last, batch=2, side=40, grid=3, patch=11, turns=True)
    for order in (1, 3):
        assert_agrees(args, order)


def test_several_warps() -> None:
    assert_agrees(arguments(batch=1, side=75), 2)


@pytest.mark.parametrize(("compute_capability", "side"), [(80, 240), (89, 185)])
def test_levels_that_shared_memory_does_not_hold(compute_capability: int, side: int) -> None:
    """172,800 bytes of 163 KiB, 102,675 bytes of 99 KiB: they go to global memory."""
    args = arguments(batch=1, side=side)
    args[1][..., ViewParameter.PHOTOMETRIC] = 1
    assert_agrees(args, 0, compute_capability=compute_capability)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [1, 2, 14, 33, 70])
def test_blur_of_every_radius(side: int, channels_last: bool) -> None:
    args = arguments(batch=7, side=side, channels_last=channels_last, photometric=False)
    args[1][:, 0, ViewParameter.BLUR_SIGMA] = torch.tensor([0.1, 0.5, 1.0, 0.0, 2.0, 3.1, 5.0])
    args[1][:, 0, ViewParameter.GRAYSCALE] = torch.tensor([0, 0, 1, 1, 1, 0, 0])
    for order in (0, 3):
        assert_agrees(args, order)


@pytest.mark.parametrize("photometric", [False, True])
def test_without_blur(photometric: bool) -> None:
    assert_agrees(arguments(batch=3, side=20, photometric=photometric, blur=False), 1)


@pytest.mark.parametrize(("argument", "value"), [(1, float("nan")), (3, 9), (4, 3)])
def test_bad_values_trap(argument: int, value: float) -> None:
    args = arguments(batch=2, side=40, grid=3, patch=11)
    args[argument][1, 4] = value
    with pytest.raises(RuntimeError, match="render_views: device trap in"):
        emulate("render_views", *args)


@pytest.mark.parametrize("column", [ViewParameter.PHOTOMETRIC, ViewParameter.BLUR_SIGMA])
def test_an_operation_that_was_declared_absent_traps(column: ViewParameter) -> None:
    args = arguments(batch=2, side=12, photometric=False, blur=False)
    args[1][1, 0, column] = 1
    with pytest.raises(RuntimeError, match="render_views: device trap in"):
        emulate("render_views", *args)
