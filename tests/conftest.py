"""Shared fixtures. Set SSLFAST_REQUIRE_CUDA=1 on a GPU machine: a missing device is then a failure, not a skip."""

import os
import shutil
import signal
from importlib.util import find_spec

import pytest
import torch

from sslfast.data import ffcv_library

# FFCV is built against system libraries, which not every machine has. SSLFAST_REQUIRE_FFCV=1: it is an error then.
FFCV_TESTS = ["loaders/test_ffcv.py", "data/test_prepare.py"]
FFCV_USABLE, FFCV_REASON, FFCV_REMEDY = ffcv_library.status()
LEFT_OUT: list[tuple[list[str], str]] = []
if not (FFCV_USABLE or os.environ.get("SSLFAST_REQUIRE_FFCV") == "1"):
    LEFT_OUT.append((FFCV_TESTS, f"{FFCV_REASON}; {FFCV_REMEDY}"))
# The report is looked at in Chromium. SSLFAST_REQUIRE_BROWSER=1: it is an error where that is missing.
if not (shutil.which("chromedriver") or os.environ.get("SSLFAST_REQUIRE_BROWSER") == "1"):
    LEFT_OUT.append((["report/test_browser.py"], "no chromedriver; apt-get install -y chromium chromium-driver"))
# SSLFAST_REQUIRE_NVCC=1: as above, for the compiler of the CUDA kernels.
if not (shutil.which("nvcc") or os.environ.get("SSLFAST_REQUIRE_NVCC") == "1"):
    LEFT_OUT.append((["benchmarks/test_kernel_growth.py"], "no nvcc; put the CUDA toolkit's bin folder on PATH"))
if not (find_spec("datasets") or os.environ.get("SSLFAST_REQUIRE_DATASETS") == "1"):
    LEFT_OUT.append((["data/test_hub_dataset.py"], "no package datasets; pip install datasets"))
if not (find_spec("pillow_heif") or os.environ.get("SSLFAST_REQUIRE_HEIF") == "1"):
    LEFT_OUT.append((["data/test_heif.py"], "no package pillow_heif; pip install pillow-heif"))
collect_ignore = [name for names, _ in LEFT_OUT for name in names]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for names, reason in LEFT_OUT:
        terminalreporter.write_line(f"left out: {', '.join(names)}: {reason}")


# Under nohup and in background jobs Ctrl-C is ignored, and children inherit that: tests of Ctrl-C need it as it is in a
# terminal.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _devices() -> list[str]:
    if os.environ.get("SSLFAST_REQUIRE_CUDA") == "1":
        return ["cpu", "cuda"]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has; tests that take it run on each."""
    return torch.device(request.param)
