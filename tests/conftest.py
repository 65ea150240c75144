"""Shared fixtures. Set SSLFAST_REQUIRE_CUDA=1 on a GPU machine: a missing device is then a failure, not a skip."""

import os

import pytest
import torch


def _devices() -> list[str]:
    if os.environ.get("SSLFAST_REQUIRE_CUDA") == "1":
        return ["cpu", "cuda"]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has; tests that take it run on each."""
    return torch.device(request.param)
