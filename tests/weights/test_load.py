"""Trunks that leave for other libraries and come from them compute the same features."""

import json
import os
import pickle
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast.cli.main import main
from sslfast.config import save_json, to_dict
from sslfast.methods.pirl import PIRL
from sslfast.models import ResNetConfig, ResNetTrunk, build_trunk
from sslfast.recipes.pirl import pirl_paper
from sslfast.runs.checkpoint import save_checkpoint
from sslfast.runs.directory import RunDirectory
from sslfast.training.config import TrainConfig
from sslfast.weights.export import SUFFIX, Format, detectron2_name, export_trunk
from sslfast.weights.load import read_weights


def trained_trunk(name: str, stem: str = "imagenet") -> ResNetTrunk:
    """Random weights and BatchNorm statistics that differ from a fresh trunk's everywhere."""
    trunk = build_trunk(ResNetConfig(name=name, stem=stem), seed=3)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for key, value in trunk.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return trunk.eval()


def write_run(folder: Path, trunk: ResNetTrunk, config: TrainConfig) -> Path:
    run = RunDirectory(folder)
    run.create()
    save_json(run.config, to_dict(config))
    state = {f"trunk.{name}": value for name, value in trunk.state_dict().items()}
    save_checkpoint(run.checkpoints, {"step": 7, "method": {**state, "bank.vectors": torch.zeros(2, 4)}}, 7)
    return folder


def config_of(name: str, stem: str = "imagenet") -> TrainConfig:
    config = pirl_paper()
    config.model = ResNetConfig(name=name, stem=stem)  # type: ignore[arg-type]
    assert isinstance(config.method, PIRL.Config)
    return config


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet18() -> ResNetTrunk:
    return trained_trunk("resnet18")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, resnet18: ResNetTrunk) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), resnet18, config_of("resnet18"))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_loads_with_its_normalisation_and_size(run: Path, resnet18: ResNetTrunk, images: Tensor) -> None:
    weights = read_weights(run)
    assert (weights.model.name, weights.size, weights.facts["step"]) == ("resnet18", 224, 7)
    assert weights.mean == [0.485, 0.456, 0.406]
    assert weights.facts["recipe"] == "pirl-paper"
    loaded = sslfast.load(run)
    assert not loaded.training
    assert torch.equal(loaded(images), resnet18(images))


def test_torchvision_loads_the_export(run: Path, resnet18: ResNetTrunk, images: Tensor, tmp_path: Path) -> None:
    import torchvision

    path = export_trunk(run, tmp_path / "trunk.pth", format="torchvision")
    net = torchvision.models.resnet18(weights=None)
    result = net.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"}
    net.fc = torch.nn.Identity()
    torch.testing.assert_close(net.eval()(images), resnet18(images))
    card = json.loads((tmp_path / "trunk.pth.json").read_text())
    assert card["mean"] == [0.485, 0.456, 0.406]
    assert card["facts"]["step"] == 7
    assert equal(sslfast.load(path).state_dict(), resnet18.state_dict())
    assert read_weights(path).facts["recipe"] == "pirl-paper"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_loads_the_export(name: str, images: Tensor, tmp_path: Path) -> None:
    import timm

    trunk = trained_trunk(name)
    path = export_trunk(write_run(tmp_path / "run", trunk, config_of(name)), tmp_path / "t.pth", format="timm")
    net = timm.create_model(name, num_classes=0, pretrained=False)
    net.load_state_dict(torch.load(path, weights_only=True), strict=True)
    torch.testing.assert_close(net.eval()(images), trunk(images), rtol=1e-4, atol=1e-5)


def test_safetensors(run: Path, resnet18: ResNetTrunk, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = export_trunk(run, tmp_path / "trunk.safetensors", format="safetensors")
    assert equal(load_file(path), dict(resnet18.state_dict()))
    assert equal(sslfast.load(path).state_dict(), resnet18.state_dict())


def test_onnx_runtime_computes_the_features(images: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    trunk = trained_trunk("resnet18", "small")
    config = config_of("resnet18", "small")
    config.method.image_view.crop.size = 64
    run = write_run(tmp_path / "run", trunk, config)
    path = export_trunk(run, tmp_path / "trunk.onnx", format="onnx")
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "trunk.onnx", "trunk.onnx.json"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for batch in (images, images[:1, :, :33, :40]):  # of another size than it was exported with
        (found,) = session.run(None, {"images": batch.numpy()})
        expected = trunk((batch - mean) / std)
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3, atol=1e-4)


def detectron2_resnet50() -> set[str]:
    """Names of detectron2's ResNet backbone of depth 50 with FrozenBN (detectron2.modeling.backbone.resnet)."""
    norm = ["weight", "bias", "running_mean", "running_var"]
    layers = ["stem.conv1"]
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            names = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            layers += [f"res{stage}.{block}.{name}" for name in names]
    return {f"{layer}.{entry}" for layer in layers for entry in ["weight", *(f"norm.{n}" for n in norm)]}


def test_detectron2_has_every_name_and_no_other(tmp_path: Path) -> None:
    trunk = trained_trunk("resnet50")
    path = export_trunk(
        write_run(tmp_path / "run", trunk, config_of("resnet50")), tmp_path / "d2.pkl", format="detectron2"
    )
    content = pickle.loads(path.read_bytes())
    assert set(content["model"]) == detectron2_resnet50()
    assert content["matching_heuristics"] is True
    # The values that MoCo's and VISSL's detection configurations give for these weights.
    assert (tmp_path / "d2.pkl.yaml").read_text().split() == [
        "INPUT:",
        "FORMAT:",
        "RGB",
        "MODEL:",
        "PIXEL_MEAN:",
        "[123.675,",
        "116.28,",
        "103.53]",
        "PIXEL_STD:",
        "[58.395,",
        "57.12,",
        "57.375]",
        "RESNETS:",
        "DEPTH:",
        "50",
        "STRIDE_IN_1X1:",
        "false",
    ]
    state = trunk.state_dict()
    for ours, theirs in (
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer1.0.downsample.1.bias", "res2.0.shortcut.norm.bias"),
        ("layer3.5.bn2.running_mean", "res4.5.conv2.norm.running_mean"),
    ):
        assert detectron2_name(ours) == theirs
        np.testing.assert_array_equal(content["model"][theirs], state[ours].numpy())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_model_is_recognised(name: str, stem: str, tmp_path: Path) -> None:
    norm, width = ("layer", 0.5) if name == "resnet34" else ("batch", 1.0)
    seen = "sobel" if name == "resnet18" else "rgb"
    config = ResNetConfig(name=name, stem=stem, norm=norm, width=width, input=seen)  # type: ignore[arg-type]
    torch.save(build_trunk(config, seed=0).state_dict(), tmp_path / "t.pth")
    assert read_weights(tmp_path / "t.pth", model=config).model == config
    if norm == "batch":
        assert read_weights(tmp_path / "t.pth").model == config


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_file_without_statistics_of_batchnorm_is_no_network_with_another_norm(norm: str, tmp_path: Path) -> None:
    """Parameters alone, as many averages of weights keep them, have the same names whatever the normalisation is."""
    config = ResNetConfig(name="resnet18", width=0.125, norm=norm)  # type: ignore[arg-type]
    torch.save(dict(build_trunk(config, seed=0).named_parameters()), tmp_path / "t.pth")
    with pytest.raises(ValueError, match=r"t\.pth .*no running statistics of BatchNorm .*save the whole state dict"):
        read_weights(tmp_path / "t.pth")
    assert read_weights(tmp_path / "t.pth", model=replace(config, norm="layer")).model.norm == "layer"
    (tmp_path / "t.pth.json").write_text(json.dumps({"model": {"norm": "layer"}}))
    assert read_weights(tmp_path / "t.pth").model.norm == "layer"


def test_errors_name_the_remedy(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a run directory or a file of weights"):
        read_weights(tmp_path / "nothing")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"it is no file of torch\.save, or damaged") as caught:
        read_weights(tmp_path / "text.pth")
    assert "weights_only" not in str(caught.value)  # torch's advice is to load it as code
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_weights(tmp_path / "text.safetensors")
    torch.save({"net": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError,
        match=r"holds no ResNet: no prefix has conv1.weight and .*the first entries are net.weight \[1\]: save",
    ):
        read_weights(tmp_path / "other.pth")
    first = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.running_mean": torch.zeros(64)}
    torch.save({**first, "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "r.pth")
    with pytest.raises(ValueError, match=r"blocks.*known: resnet18, resnet34, resnet50"):
        read_weights(tmp_path / "r.pth")
    odd = build_trunk(ResNetConfig(name="resnet18"), seed=0).state_dict()
    odd["layer1.1.conv1.weight"] = torch.zeros(128, 64, 3, 3)
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="does not hold a resnet18"):
        sslfast.load(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"a detectron2 file ends in \.pkl"):
        export_trunk(run, tmp_path / "x.pth", format="detectron2")
    small = write_run(tmp_path / "small", trained_trunk("resnet18", "small"), config_of("resnet18", "small"))
    for format in ("torchvision", "timm", "detectron2"):
        with pytest.raises(ValueError, match="stem=small is not of a network that"):
            export_trunk(small, tmp_path / f"x{SUFFIX[format]}", format=format)  # type: ignore[arg-type, index]


def test_a_failed_export_leaves_the_old_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_trunk(run, tmp_path / "trunk.pth")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    formats: dict[Format, Any] = {"torchvision": full}
    monkeypatch.setattr("sslfast.weights.export._WRITERS", formats)
    with pytest.raises(OSError, match="No space left"):
        export_trunk(run, path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"trunk.pth", "trunk.pth.json"}


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "a.safetensors"), "--format", "safetensors"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.safetensors")
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "a.pth")]) == 2
    assert "does not exist; give a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["method"]["image_view"]["augment"].update(mean=[0, 0, 0]), "mean is [0, 0, 0] there and [0.485,"),
        (lambda c: c["model"].update(name="resnet34"), "model.name is 'resnet34' there and 'resnet18' in step_"),
        (lambda c: c.pop("method"), "lacks 'method'"),
        (None, "is not JSON"),
    ],
)
def test_the_checkpoint_s_configuration_wins(
    tmp_path: Path, resnet18: ResNetTrunk, change: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = to_dict(config_of("resnet18"))
    run = RunDirectory(tmp_path)
    state = {f"trunk.{name}": value for name, value in resnet18.state_dict().items()}
    save_checkpoint(run.checkpoints, {"step": 7, "method": state, "config": config}, 7)
    save_json(run.config, config)
    right = read_weights(tmp_path)
    assert capsys.readouterr().err == ""
    if change is None:
        run.config.write_text("{")
    else:
        changed = to_dict(config_of("resnet18"))
        change(changed)
        save_json(run.config, changed)
    found = read_weights(tmp_path)
    assert (found.model, found.mean, found.std, found.size) == (right.model, right.mean, right.std, right.size)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", [1, 2]), ("mean", [1, 2, float("nan")]), ("std", [1, 1, 0]), ("std", "x"), ("size", 1e30), ("size", 0)],
)
def test_a_card_with_impossible_values_is_refused(tmp_path: Path, run: Path, name: str, value: Any) -> None:
    path = export_trunk(run, tmp_path / "trunk.pth")
    card = tmp_path / "trunk.pth.json"
    save_json(card, {**json.loads(card.read_text()), name: value})
    with pytest.raises(ValueError, match=rf"trunk\.pth\.json: {name} must be .*restore the file"):
        read_weights(path)


@pytest.mark.parametrize("format", ["torchvision", "detectron2", "safetensors"])
def test_exported_files_have_the_umask_s_mode_and_leave_nothing_where_the_disk_is_full(
    tmp_path: Path, run: Path, format: Format
) -> None:
    path = tmp_path / f"trunk{SUFFIX[format]}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*trunk.* \(File too large\); .*name another file as OUT"):
            export_trunk(run, path, format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    mask = os.umask(0o022)
    try:
        export_trunk(run, path, format=format)
    finally:
        os.umask(mask)
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in tmp_path.iterdir()} == {"0o644"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_are_refused(
    run: Path, resnet18: ResNetTrunk, tmp_path: Path, name: str, value: float
) -> None:
    state = {key: tensor.clone() for key, tensor in resnet18.state_dict().items()}
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"values of {name} in .*weights\.pth .*NaN or infinite; use an earlier"):
        sslfast.load(tmp_path / "weights.pth")
    checkpoints = shutil.copytree(run, tmp_path / "run") / "checkpoints"
    newer = {"step": 8, "method": {f"trunk.{key}": tensor for key, tensor in state.items()}}
    path = save_checkpoint(checkpoints, newer, 8)
    with pytest.raises(ValueError, match=rf"values of {name} in .*step_00000008\.pt are NaN or infinite"):
        export_trunk(path, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
    assert read_weights(tmp_path / "run").facts["step"] == 7  # the newest good one
    save_checkpoint(checkpoints, {**newer, "step": 7}, 7)
    with pytest.raises(ValueError, match=rf"every checkpoint .*values of trunk\.{name}"):
        read_weights(tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("std", [0.2, 0, 0.2], "std must be above 0"),
        ("std", [0.2, 1e-30, 0.2], "std must be above 0"),
        ("mean", [0.2, float("nan"), 0.2], "mean must be three numbers"),
        ("mean", [0.2, 1e30, 0.2], "mean must be at most"),
        ("mean", [[0.2], 0.2, 0.2], "mean must be three numbers"),
        ("mean", 0.5, "mean must be three numbers"),
        ("size", 0, "size must be in"),
        ("size", 224.0, "size must be in"),
        ("facts", [], "facts must be a table"),
        ("facts", {"seed": "0"}, "seed must be a whole number"),
        ("facts", {"seed": -1}, "seed must be a whole number"),
        ("facts", {"method": ["pirl"]}, "method must be a text"),
        ("model", "resnet18", "model must be a table"),
        ("model", {"name": "resnet50"}, r"model\.name is resnet50 and the weights are of resnet18"),
        ("model", {"width": 2.0}, r"model\.width is 2\.0 and the weights are of 1"),
    ],
)
def test_a_card_is_checked(run: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    export_trunk(run, tmp_path / "a.pth")
    card = tmp_path / "a.pth.json"
    read_weights(tmp_path / "a.pth")
    card.write_text(json.dumps({**json.loads(card.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"a\.pth\.json: {words}.*; restore the file"):
        read_weights(tmp_path / "a.pth")


def test_a_model_in_a_configuration_is_checked_with_its_file(run: Path, tmp_path: Path) -> None:
    config = shutil.copytree(run, tmp_path / "run") / "config.json"
    values = json.loads(config.read_text())
    values["model"]["width"] = 0
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: model\.width must be a positive multiple"):
        read_weights(tmp_path / "run")
