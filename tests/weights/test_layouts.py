"""Every layout in docs/weights.md is built here and read; the table there is written from this list."""

import argparse
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast.cli.main import main
from sslfast.evaluation.encoders import load_run
from sslfast.models import ResNetConfig, build_trunk
from sslfast.weights.export import export_trunk
from sslfast.weights.files import ArrayUnpickler
from sslfast.weights.load import read_weights

ROOT = Path(__file__).resolve().parents[2]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    trunk = build_trunk(ResNetConfig(name="resnet18", width=0.125), seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, value in trunk.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator))
    return dict(trunk.state_dict())


def at(prefix: str, state: State, **more: Tensor) -> State:
    return {f"{prefix}{name}": value for name, value in {**state, **more}.items()}


def other(state: State) -> State:
    """Another network of the same shapes: what is not to be loaded."""
    return {name: torch.ones_like(value) for name, value in state.items()}


def numbered(state: State) -> State:
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{numbers[name.partition('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()}


def detectron2(state: State) -> State:
    names = {}
    for name, value in state.items():
        new = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        new = new if new.startswith("res") else f"stem.{new}"
        new = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", new)
        names[new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    return {name: value for name, value in names.items() if not name.endswith("num_batches_tracked")}


def transformers(state: State) -> State:
    names = {}
    for name, value in state.items():
        new = re.sub(r"^conv1", "embedder.embedder.convolution", name)
        new = re.sub(r"^bn1", "embedder.embedder.normalization", new)
        new = re.sub(r"^layer(\d)\.(\d+)\.", lambda f: f"encoder.stages.{int(f[1]) - 1}.layers.{f[2]}.", new)
        new = re.sub(r"\.conv(\d)\.", lambda f: f".layer.{int(f[1]) - 1}.convolution.", new)
        new = re.sub(r"\.bn(\d)\.", lambda f: f".layer.{int(f[1]) - 1}.normalization.", new)
        new = new.replace("downsample.0", "shortcut.convolution")
        names[new.replace("downsample.1", "shortcut.normalization")] = value
    return names


FC = {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
MLP = {"fc.0.weight": torch.zeros(8, 64), "fc.0.bias": torch.zeros(8), "fc.2.weight": torch.zeros(4, 8)}
OPTIONS = argparse.Namespace(arch="resnet18", lr=0.03)

LAYOUTS: dict[str, tuple[str, str, Callable[[State], Any]]] = {
    "torchvision, timm": (".pth", "conv1.weight", lambda s: {**s, **FC}),
    "DistributedDataParallel": (".pth", "module.conv1.weight", lambda s: at("module.", s, **FC)),
    "torch.compile": (".pth", "_orig_mod.conv1.weight", lambda s: at("_orig_mod.", s)),
    "both": (".pth", "module._orig_mod.conv1.weight", lambda s: at("module._orig_mod.", s)),
    "PyTorch's ImageNet example": (
        ".pth.tar", "state_dict / module.conv1.weight",
        lambda s: {"epoch": 1, "best_acc1": torch.tensor(1.0), "state_dict": at("module.", s, **FC)},
    ),
    "torchvision's references": (
        ".pth", "model / conv1.weight",
        lambda s: {"model": {**s, **FC}, "optimizer": {"state": {}}, "args": OPTIONS, "epoch": 3},
    ),
    "timm's trainer": (
        ".pth.tar", "state_dict / conv1.weight", lambda s: {"arch": "x", "state_dict": s, "args": OPTIONS}
    ),
    "VISSL": (
        ".torch", "classy_state_dict / base_model / model / trunk / _feature_blocks.conv1.weight",
        lambda s: {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": {"trunk": at("_feature_blocks.", s),
                   "heads": {"0.clf.weight": torch.zeros(2, 2)}}}}},
    ),
    "VISSL's model zoo": (
        ".torch", "model_state_dict / _feature_blocks.conv1.weight",
        lambda s: {"model_state_dict": at("_feature_blocks.", s)},
    ),
    "VISSL, base_model": (
        ".torch", "base_model._feature_blocks.conv1.weight", lambda s: at("base_model._feature_blocks.", s)
    ),
    "PyContrast": (
        ".pth", "model / module.encoder.conv1.weight",
        lambda s: {"opt": OPTIONS, "model": {**at("module.encoder.", s), "module.head.0.weight": torch.zeros(2, 2)},
                   "contrast": {"memory": torch.zeros(2, 2)}, "epoch": 200},
    ),
    "lemniscate (NPID)": (
        ".pth.tar", "state_dict / module.conv1.weight",
        lambda s: {"arch": "resnet18", "state_dict": at("module.", s, **FC), "lemniscate": torch.zeros(2),
                   "best_prec1": np.float64(3.5)},
    ),
    "MoCo": (
        ".pth.tar", "state_dict / module.encoder_q.conv1.weight",
        lambda s: {"epoch": 200, "state_dict": {**at("module.encoder_q.", s, **MLP),
                   **at("module.encoder_k.", other(s)), "module.queue": torch.zeros(2, 2)}},
    ),
    "MoCo without DDP": (
        ".pth", "encoder_q.conv1.weight", lambda s: {**at("encoder_q.", s), **at("encoder_k.", other(s))}
    ),
    "MoCo v3": (
        ".pth.tar", "state_dict / module.base_encoder.conv1.weight",
        lambda s: {"state_dict": {**at("module.base_encoder.", s), **at("module.momentum_encoder.", other(s))}},
    ),
    "SimSiam": (
        ".pth.tar", "state_dict / module.encoder.conv1.weight",
        lambda s: {"state_dict": {**at("module.encoder.", s, **MLP), "module.predictor.0.weight": torch.zeros(2, 2)}},
    ),
    "SwAV, Barlow Twins' trunk": (".pth.tar", "module.conv1.weight", lambda s: at("module.", s)),
    "Barlow Twins": (
        ".pth", "model / module.backbone.conv1.weight", lambda s: {"epoch": 9, "model": at("module.backbone.", s)}
    ),
    "DINO": (
        ".pth", "teacher / backbone.conv1.weight",
        lambda s: {"student": at("module.backbone.", other(s)), "teacher": at("backbone.", s), "args": OPTIONS},
    ),
    "BYOL": (
        ".pth", "online_network.conv1.weight",
        lambda s: {**at("online_network.", s), **at("target_network.", other(s))},
    ),
    "SimCLR in PyTorch": (
        ".pth.tar", "state_dict / backbone.conv1.weight",
        lambda s: {"state_dict": {**at("backbone.", s), "backbone.fc.0.weight": torch.zeros(2, 64)}},
    ),
    "solo-learn": (
        ".ckpt", "state_dict / backbone.conv1.weight",
        lambda s: {"state_dict": {**at("backbone.", s), **at("momentum_backbone.", other(s)),
                   "classifier.weight": torch.zeros(10, 64)}},
    ),
    "mmselfsup, mmpretrain": (
        ".pth", "state_dict / backbone.conv1.weight", lambda s: {"meta": {}, "state_dict": at("backbone.", s)}
    ),
    "lightly": (
        ".ckpt", "state_dict / backbone.0.weight",
        lambda s: {"state_dict": at("backbone.", numbered(s)), "hyper_parameters": {"lr": 0.06}},
    ),
    "detectron2, trained there": (
        ".pth", "model / backbone.bottom_up.stem.conv1.weight",
        lambda s: {"model": at("backbone.bottom_up.", detectron2(s)), "iteration": 9},
    ),
    "detectron2's pickle": (
        ".pkl", "model / stem.conv1.weight",
        lambda s: {"model": {name: value.numpy() for name, value in detectron2(s).items()}, "__author__": "x",
                   "matching_heuristics": True},
    ),
    "safetensors": (".safetensors", "conv1.weight", lambda s: {**s, **FC}),
    "timm on the hub": ("folder", "conv1.weight", lambda s: {**s, **FC}),
    "transformers on the hub": (
        "folder", "resnet.embedder.embedder.convolution.weight", lambda s: at("resnet.", transformers(s))
    ),
}  # fmt: skip
"""Name -> suffix (or folder), keys and name of the first convolution, content of a trunk's state dict."""


def write(folder: Path, kind: str, content: Any) -> Path:
    path = folder / f"f{kind}"
    if kind == "folder":
        from safetensors.torch import save_file

        path = folder / "hub"
        path.mkdir()
        save_file({name: value.contiguous() for name, value in content.items()}, path / "model.safetensors")
        card = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5],
                "input_size": [3, 160, 160]}}  # fmt: skip
        (path / "config.json").write_text(json.dumps(card))
    elif kind == ".safetensors":
        from safetensors.torch import save_file

        save_file(content, path)
    elif kind == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def flat(content: Any, path: str = "") -> dict[str, Any]:
    found = {}
    for name, value in content.items():
        found[f"{path}{name}"] = value
        if isinstance(value, dict):
            found |= flat(value, f"{path}{name} / ")
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, state: State, tmp_path: Path) -> None:
    kind, first, build = LAYOUTS[name]
    content = build(state)
    assert first in flat(content), "the table names an entry of the file"
    weights = read_weights(write(tmp_path, kind, content))
    assert weights.model == ResNetConfig(name="resnet18", width=0.125)
    loaded = weights.build().state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert key.endswith("num_batches_tracked") or torch.equal(loaded[key], value), key
    if kind == "folder":
        assert (weights.mean, weights.std, weights.size) == ([0.5, 0.5, 0.5], [0.25, 0.5, 0.5], 160)
    assert export_trunk(weights.path, tmp_path / "again.safetensors", format="safetensors").is_file()


@pytest.mark.parametrize(
    "build",
    [
        lambda s: {"state_dict": {**at("student_backbone.0.", other(s)), **at("teacher_backbone.0.", s)}},
        lambda s: {"state_dict": {**at("anchor_backbone.", other(s)), **at("backbone.", s)}},
        lambda s: {**at("encoder.", s), **at("momentum_encoder.", other(s))},
        lambda s: [at("module.", s)],
        lambda s: {"models": [s, {"fc.weight": torch.zeros(2, 2)}], "optimizer": [0.1] * 1000},
        lambda s: at("_forward_module.", s),
        lambda s: {name: value.double() for name, value in s.items()},
    ],
)
def test_more_layouts(build: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    loaded = read_weights(write(tmp_path, ".pth", build(state))).build().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hub(name: str, state: State, tmp_path: Path) -> None:
    hub = write(tmp_path, "folder", state)
    if name != "model.safetensors":
        (hub / "model.safetensors").unlink()
        torch.save(state, hub / name)
    weights = read_weights(hub)
    assert (weights.path, weights.size) == (hub / name, 160)
    weights.path.rename(tmp_path / "whole.bin")
    assert read_weights(tmp_path / "whole.bin").model == weights.model  # the content says what it is
    (hub / f"{name}.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds weights in several files: .* as one model\.safetensors"):
        read_weights(hub)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"is empty: get a good copy"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of Git LFS .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", r"is a web page"),
        (b"\x89HDF\r\n\x1a\n", r"is an HDF5 file"),
        (b"\x1f\x8b\x08", r"is compressed: unpack it with gunzip"),
        (b"anything else", r"it is no file of torch\.save"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_files_that_are_none_of_weights(content: bytes, words: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"f{suffix}").write_bytes(content)
    if content == b"anything else" and suffix != ".pth":
        words = r"is no safetensors file|is no pickle"
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path / f"f{suffix}")


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"f\.pt is a TorchScript program: `python -c .*torch\.jit\.load"):
        read_weights(tmp_path / "f.pt")


def table() -> str:
    lines = ["| written by | file | first convolution |", "|---|---|---|"]
    lines += [f"| {name} | `{kind}` | `{first}` |" for name, (kind, first, _) in LAYOUTS.items()]
    return "\n".join(lines)


def test_the_table_of_the_documentation() -> None:
    text = (ROOT / "docs" / "weights.md").read_text()
    found = text.partition("<!-- layouts -->\n")[2].partition("\n<!-- end -->")[0]
    assert found == table(), "write the table of tests/weights/test_layouts.py between the marks in docs/weights.md"


def test_several_networks_ask_for_a_choice(state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.pth"
    torch.save({"a": at("net.", state), "b": at("net.", other(state))}, path)
    words = r"holds 2 ResNets, with the prefixes 'a.net.', 'b.net.'; choose one with --prefix"
    with pytest.raises(ValueError, match=words):
        sslfast.load(path)
    for prefix in ("a", "a.net", "a.net."):
        assert torch.equal(sslfast.load(path, prefix=prefix).conv1.weight, state["conv1.weight"])  # type: ignore[union-attr, arg-type]
    with pytest.raises(
        ValueError, match=r"no ResNets whose prefix begins with 'c'; --prefix must name one of 'a.net.'"
    ):
        sslfast.load(path, prefix="c")
    assert main(["export", str(path), str(tmp_path / "o.safetensors"), "--format", "safetensors"]) == 2
    assert re.search(words, capsys.readouterr().err)
    for prefix, value in (("a", state["bn1.running_mean"]), ("b", torch.ones(8))):
        out = tmp_path / f"{prefix}.safetensors"
        assert main(["export", str(path), str(out), "--prefix", prefix]) == 0  # the format of its suffix
        assert torch.equal(read_weights(out).state["bn1.running_mean"], value)
        assert torch.equal(load_run(path, prefix=prefix).encoders["trained"].trunk.bn1.running_mean, value)  # type: ignore[attr-defined]
    student = tmp_path / "dino.pth"
    torch.save(LAYOUTS["DINO"][2](state), student)
    chosen = sslfast.load(student, prefix="student").state_dict()
    assert torch.equal(chosen["conv1.weight"], torch.ones_like(state["conv1.weight"]))


def test_the_head_of_a_file(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": at("module.", state, **FC)}, tmp_path / "npid.pth")
    assert read_weights(tmp_path / "npid.pth").build_head()(torch.ones(2, 64)).shape == (2, 10)
    torch.save(LAYOUTS["MoCo"][2](state), tmp_path / "moco.pth")
    assert read_weights(tmp_path / "moco.pth").build_head()(torch.ones(2, 64)).shape == (2, 4)


class Foreign:
    """A class of another program."""


class Marking:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", [".pth", ".pkl"])
def test_other_objects_are_named_and_never_built(kind: str, state: State, tmp_path: Path) -> None:
    for odd, name in ((Foreign(), "Foreign"), (Marking(tmp_path / "mark"), "(getattr|touch)")):
        torch.save({"state_dict": state, "args": odd}, tmp_path / "f.pth")
        (tmp_path / "f.pkl").write_bytes(pickle.dumps({"model": {}, "args": odd}))
        with pytest.raises(ValueError, match=rf"it also holds a (\w+\.)*{name}") as caught:
            sslfast.load(tmp_path / f"f{kind}")
        assert "weights_only" not in str(caught.value)
        assert str(caught.value).endswith("save its state dict alone with torch.save")
    assert not (tmp_path / "mark").exists()


def test_the_pickle_of_arrays(tmp_path: Path) -> None:
    """All protocols, layouts and byte orders of arrays; nothing but containers, numbers and arrays."""
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3), "d": np.arange(3.0), "i": np.arange(4, dtype=np.int64),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">f4"),
        "empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5), "bool": np.array([True, False]),
    }  # fmt: skip
    for protocol in range(6):
        path = tmp_path / "arrays.pkl"
        path.write_bytes(pickle.dumps(OrderedDict(arrays, number=np.float64(1.5), text="x", tuple=(1, [2])), protocol))
        with path.open("rb") as file:
            found = ArrayUnpickler(file, encoding="latin1").load()
        for name, array in arrays.items():
            assert np.array_equal(found[name].value, array), (protocol, name)
        assert (found["number"], found["text"], found["tuple"]) == (1.5, "x", (1, [2]))
    for odd in (
        np.array([object()], dtype=object),
        np.array(["2020"], dtype="M8[Y]"),
        np.zeros(1, dtype=[("a", "f4")]),
    ):
        path.write_bytes(pickle.dumps({"model": {"conv1.weight": odd}}))
        with pytest.raises(ValueError, match="it also holds a "):
            sslfast.load(path)
    for damaged in (b"\x80\x04.", b"\x80\x04}\x94(\x8c\x01a"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no pickle of numpy arrays"):
            sslfast.load(path)


@pytest.mark.parametrize("width", [1, 2])
def test_resnext_and_wide_resnet_are_told_from_width_2(width: int, tmp_path: Path) -> None:
    """By shapes alone, which is all that a recognition looks at."""

    def shapes(first: int, inner: int, per_group: int) -> State:
        state = {"conv1.weight": torch.zeros(first, 3, 7, 7), "bn1.running_mean": torch.zeros(first)}
        for stage, blocks in enumerate((3, 4, 6, 3), 1):
            for block in range(blocks):
                for number, shape in ((1, (inner, first, 1, 1)), (2, (inner, per_group, 3, 3)), (3, (4, inner, 1, 1))):
                    state[f"layer{stage}.{block}.conv{number}.weight"] = torch.zeros(shape)
        return state

    path = tmp_path / "w.pth"
    torch.save(shapes(64 * width, 64 * width, 64 * width), path)
    assert read_weights(path).model == ResNetConfig(name="resnet50", width=float(width))
    torch.save(shapes(64, 128, 4), path)
    with pytest.raises(ValueError, match=r"holds a ResNeXt \(32 groups of 4 channels\), which is not among resnet18"):
        read_weights(path)
    torch.save(shapes(64, 128, 128), path)
    with pytest.raises(
        ValueError, match=r"holds a Wide-ResNet \(128 channels inside the first block and 64 before it\)"
    ):
        read_weights(path)
