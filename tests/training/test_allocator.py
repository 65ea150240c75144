import os
import platform
import subprocess
import sys

import pytest

# Pages that a tensor of 64 MB costs when equal ones were freed before, several since glibc sets small remainders of the
# first ones aside.
PAGES = """
import contextlib, resource, sys, torch
from sslfast.training.allocator import keep_freed_memory

def pages():
    for _ in range(16):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_freed_memory(torch.device("cpu")):
    print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_freed_tensor_costs_no_pages_again() -> None:
    # In a process of its own: after an allocation that failed, as other tests make, glibc moves the thread to another
    # arena for good, in which no block of this size can be kept.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < (1 << 26) / os.sysconf("SC_PAGESIZE") / 8
