"""In a notebook: progress is in the cell's output, and an interrupt saves a checkpoint before it ends the cell."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

CELL = """
import sslfast
sslfast.pretrain(
    "synthetic:64", "rotation-small", {output!r}, epochs={epochs}, batch_size=8, device="cpu", log_every_steps=1,
    tensorboard=False, **{{"model.width": 0.125, "method.image_view.crop.size": 16}}
)
"""


@pytest.fixture
def kernel() -> Iterator[tuple[KernelManager, Any]]:
    manager = KernelManager()
    manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: Any, code: str, stop: Any = None) -> tuple[str, str]:
    """What a cell prints, and the name of the exception that ends it."""
    request, text, error, end = client.execute(code), "", "", time.monotonic() + 180
    while time.monotonic() < end:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != request:
            continue
        content = message["content"]
        text += content.get("text", "")
        error = content.get("ename", error)
        if stop is not None and text.count("samples/s") > 8:
            stop()
            stop = None
        if content.get("execution_state") == "idle":
            break
    return text, error


def test_an_interrupt_saves_and_the_same_cell_continues(tmp_path: Path, kernel: tuple[KernelManager, Any]) -> None:
    manager, client = kernel
    output = str(tmp_path / "run")
    text, error = run(client, CELL.format(output=output, epochs=2000), manager.interrupt_kernel)
    assert "samples/s" in text
    assert error == "RunInterruptedError", text[-2000:]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*.pt")
    step = int(saved.stem.removeprefix("step_"))
    assert step >= 8
    text, error = run(client, CELL.format(output=output, epochs=2000), manager.interrupt_kernel)
    assert f"resumed from {saved}" in text
    assert error == "RunInterruptedError"
