"""The emulation that runs CUDA kernels on the CPU detects faults: kernels with one each (cuda_emulation/faults.cu)."""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation import INCLUDE, configure, fence, load

ORDERS = [0, 1, 2, 3, 4, 5]
NAMES = [
    "none", "missing_syncthreads", "missing_syncwarp", "divergent_shuffle", "exit_before_barrier",
    "read_behind_tensor", "write_behind_result", "misaligned", "missing_copy_wait", "shared_too_small",
    "spin_forever", "unwritten", "missing_box_wait", "stage_released_early", "missing_product_wait",
    "missing_proxy_fence",
]  # fmt: skip


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load([INCLUDE.parent / "faults.cu"])[0]


def run(library: ctypes.CDLL, kernel: str, fault: str, order: int, x: Tensor | None = None) -> Tensor:
    configure(library, order=order)
    x = fence(torch.arange(64.0)) if x is None else x
    return getattr(torch.ops.sslfast_emulated, kernel)(x, NAMES.index(fault))


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_without_a_fault(library: ctypes.CDLL, order: int) -> None:
    x = torch.arange(64.0)
    assert torch.equal(run(library, "faulty_reverse", "none", order), x.flip(0))
    assert torch.equal(run(library, "faulty_warp", "none", order), x.view(2, 32).flip(1).flatten())
    assert torch.equal(run(library, "faulty_copy", "none", order), x)
    a = torch.randint(-4, 5, (64, 64), generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(run(library, "faulty_product", "none", order, fence(a)), 4 * a.float() @ a.float().t())


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("faulty_reverse", "missing_syncthreads"),
        ("faulty_warp", "missing_syncwarp"),
        ("faulty_copy", "missing_copy_wait"),
        ("faulty_reverse", "unwritten"),
    ],
)
def test_wrong_results(library: ctypes.CDLL, kernel: str, fault: str) -> None:
    """Values read too early or never written are NaN in every order."""
    for order in ORDERS:
        assert run(library, kernel, fault, order).isnan().any(), order


@pytest.mark.parametrize("fault", ["stage_released_early", "missing_product_wait", "missing_proxy_fence"])
def test_wrong_products(library: ctypes.CDLL, fault: str) -> None:
    a = torch.ones(64, 64).bfloat16()
    assert any(
        not torch.equal(run(library, "faulty_product", fault, order, a), 4 * a.float() @ a.float().t())
        for order in (0, 2)
    )


@pytest.mark.parametrize(
    ("kernel", "fault", "message"),
    [
        ("faulty_reverse", "divergent_shuffle", r"31 .*wait at __shfl_xor_sync in reverse_kernel \(faults.cu:\d+\)"),
        ("faulty_reverse", "exit_before_barrier", r"1 \(the first thread \(5, 0, 0\) of block \(0, 0, 0\)\) exited"),
        ("faulty_reverse", "read_behind_tensor", r"illegal memory access at 0x\w+, thread \(63, 0, 0\)"),
        ("faulty_reverse", "write_behind_result", "write outside of a tensor of 64 elements, at element 64"),
        ("faulty_reverse", "misaligned", r"misaligned address.*thread \(\d+, 0, 0\)"),
        ("faulty_reverse", "spin_forever", "spins without end at __nanosleep in reverse_kernel"),
        ("faulty_copy", "shared_too_small", "cp.async in copy_kernel .* outside of shared memory"),
    ],
)
def test_errors(library: ctypes.CDLL, kernel: str, fault: str, message: str) -> None:
    for order in ORDERS[:3]:
        with pytest.raises(RuntimeError, match=message):
            run(library, kernel, fault, order)
    assert not run(library, kernel, "none", 0).isnan().any()  # the device goes on after an error


def test_missing_wait_for_a_box(library: ctypes.CDLL) -> None:
    a = torch.ones(64, 64).bfloat16()
    for order in (1, 3, 5):  # products as they are issued
        assert run(library, "faulty_product", "missing_box_wait", order, a).isnan().any()
