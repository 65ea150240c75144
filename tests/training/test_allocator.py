import platform
import resource

import torch

from sslfast.training.allocator import keep_freed_memory


def _faults() -> int:
    """Pages that a tensor of 64 MB costs when equal ones were freed before, several since glibc sets small remainders
    of the first ones aside."""
    for _ in range(16):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_freed_tensor_costs_no_pages_again() -> None:
    with keep_freed_memory(torch.device("cpu")):
        inside = _faults()
    if platform.libc_ver()[0] == "glibc":
        assert inside < (1 << 26) / resource.getpagesize() / 8
