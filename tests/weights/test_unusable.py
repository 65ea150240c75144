"""Weights files whose tensors are no ordinary numbers: one line that names the entry, never features from them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sslfast.cli.main import main
from sslfast.models import ResNetConfig, build_trunk
from sslfast.weights import read_weights

CONFIG = ResNetConfig(name="resnet18", stem="small", width=0.125)
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "meta": (lambda x: x.to("meta"), "on the meta device, without values"),
    "sparse": (lambda x: x.to_sparse(), "sparse or nested"),
    "complex": (lambda x: x.to(torch.complex64), r"complex \(torch.complex64\)"),
    "int8": (lambda x: (100 * x).to(torch.int8), r"of integers \(torch.int8\)"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_no_ordinary_numbers_are_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_trunk(CONFIG, seed=0).state_dict()
    path = tmp_path / "a.pth"
    torch.save(state, path)
    read_weights(path)
    change, words = KINDS[kind]
    torch.save({**state, "conv1.weight": change(state["conv1.weight"])}, path)
    with pytest.raises(ValueError, match=f"conv1.weight in .* is {words}; give a file of ordinary floating weights"):
        read_weights(path)
    assert main(["export", str(path), str(tmp_path / "b.safetensors"), "--format", "safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
