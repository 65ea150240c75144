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


def test_memory_is_kept_inside_and_given_back_behind() -> None:
    outside = _faults()
    with keep_freed_memory(torch.device("cpu")):
        inside = _faults()
    if platform.libc_ver()[0] == "glibc":
        assert inside < outside / 8
    assert _faults() > outside / 2
    with keep_freed_memory(torch.device("cuda")):
        assert _faults() > outside / 2
