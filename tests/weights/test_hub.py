"""Folders for the Hugging Face hub: loaded by timm and by sslfast, described, uploaded; and files of library trunks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sslfast
from sslfast.cli.main import main
from sslfast.config import save_json
from sslfast.models import LibraryTrunkConfig
from sslfast.recipes.run import configure
from sslfast.training import Trainer
from sslfast.weights import export_trunk, read_weights
from tests.weights.test_load import config_of, trained_trunk, write_run


def trained(path: Path, name: str, **options: Any) -> Path:
    config = configure("simclr-small", {"model.name": name, "model.options": options, "epochs": 1, "batch_size": 4})
    config.device, config.tensorboard, config.progress, config.loader.workers = "cpu", False, "off", 0
    Trainer(config, 4, path, report=lambda _: None).fit()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("hub") / "run", "timm/test_vit")


@pytest.mark.parametrize(
    ("name", "options"),
    [("timm/test_vit", {}), ("timm/test_vit_relpos", {"img_size": 64}), ("timm/test_convnext", {}), ("resnet18", None)],
)
def test_timm_and_sslfast_load_the_folder(name: str, options: dict[str, Any] | None, tmp_path: Path) -> None:
    import timm

    if options is None:
        path = write_run(tmp_path / "run", trained_trunk(name), config_of(name))
    else:
        path = trained(tmp_path / "run", name, **options)
    folder = export_trunk(path, tmp_path / "hub", format="hub")
    trunk, images = sslfast.load(path), torch.rand(2, 3, 64, 64)
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if options is None:
        torch.testing.assert_close(net(images), trunk(images), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(net(images), trunk(images))
    assert torch.equal(sslfast.load(folder)(images), trunk(images))
    ours, theirs = read_weights(path), read_weights(folder)
    assert (theirs.size, list(theirs.mean), theirs.model.name) == (ours.size, list(ours.mean), ours.model.name)
    cfg = timm.data.resolve_model_data_config(net)
    assert (list(cfg["input_size"]), list(cfg["std"])) == ([3, ours.size, ours.size], list(ours.std))


def test_the_card_has_recipe_data_and_evaluations(run: Path, tmp_path: Path) -> None:
    row = {"encoder": "trained | <b>", "protocol": "knn-k20", "top1": 0.625, "top5": 1.0, "k": 20}
    save_json(run / "evaluation" / "knn.json", {"results": [row], "val": {"images": 1200}})
    save_json(run / "evaluation" / "odd.json", {"results": 3})
    export_trunk(run, tmp_path / "hub", format="hub")
    export_trunk(run, tmp_path / "hub", format="hub")  # again
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "library_name: timm\npipeline_tag: image-feature-extraction\n" in card
    for line in ("| network | timm/test_vit |", "| recipe | simclr-small |", "| data digest | synthetic-4 |"):
        assert line in card
    assert "| knn-k20 | trained b | top1 62.5 %, top5 100.0 % | 1,200 |" in card
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = write_run(tmp_path / "small", trained_trunk("resnet18", "small"), config_of("resnet18", "small"))
    mobile = trained(tmp_path / "mobile", "torchvision/mobilenet_v3_small")
    for path, output, format, message in (
        (small, "hub", "hub", "stem=small is not of a network that hub has; export as safetensors or onnx"),
        (mobile, "hub", "hub", "model.name=torchvision/mobilenet_v3_small is not of a network that hub has; export as"),
        (run, "a.pth", "torchvision", "model.name=timm/test_vit is not of a network that torchvision has"),
        (run, "a.pkl", "detectron2", "model.name=timm/test_vit is not of a network that detectron2 has"),
        (run, str(run), "hub", "holds other files .*; name another folder as OUT"),
    ):
        with pytest.raises(ValueError, match=message):
            export_trunk(path, tmp_path / output, format=format)  # type: ignore[arg-type]
    assert main(["export", str(run), str(tmp_path / "a.pth"), "--format", "timm", "--push", "a/b"]) == 2
    assert "push uploads the folder of format hub, got timm; give --format hub" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_push(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))
            if "broken" in options["repo_id"]:
                raise OSError("no network\nhere")

    def export(push: str) -> Path:
        return export_trunk(run, tmp_path / "hub", format="hub", push=push)

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"log in with `hf auth login` or set HF_TOKEN"):
        export("me/net")
    with pytest.raises(ValueError, match="push must be USER/NAME or ORGANISATION/NAME, got 'net'"):
        export("net")
    assert not (tmp_path / "hub").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    export("me/net")
    assert calls[0] == ("me/net", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == tmp_path / "hub"
    assert set(calls[1][1]["allow_patterns"]) == {"README.md", "config.json", "model.safetensors"}
    assert '"hf-hub:me/net"' in (tmp_path / "hub" / "README.md").read_text()
    with pytest.raises(
        ValueError, match=r"is written and could not be uploaded to me/broken \(no network here\); `hf up"
    ):
        export("me/broken")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="push needs the package huggingface_hub"):
        export("me/net")


def test_files_of_a_network_of_timm(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime
    import timm

    trunk, images = sslfast.load(run), torch.rand(2, 3, 64, 64)
    path = export_trunk(run, tmp_path / "a.pth", format="timm")
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    assert json.loads((tmp_path / "a.pth.json").read_text())["model"] == {"name": "timm/test_vit", "options": {}}
    assert torch.equal(sslfast.load(path)(images), trunk(images))
    (tmp_path / "a.pth.json").unlink()
    assert torch.equal(sslfast.load(path, model="timm/test_vit")(images), trunk(images))
    for model, message in (
        (None, "holds no ResNet: .*`sslfast export FILE OUT --model timm/NAME`"),
        ("timm/test_vit2", r"holds no timm/test_vit2: no prefix has reg_token and most of its other entries behind it"),
        (LibraryTrunkConfig(name="timm/test_vit", options={"patch_size": 8}), r"pos_embed \[1, 101, 64\] in place of"),
        (LibraryTrunkConfig(name="timm/test_vit", options={"depth": 7}), r"lacks blocks.6.norm1.weight, .* and 6 more"),
    ):
        with pytest.raises(ValueError, match=message):
            sslfast.load(path, model=model)
    with pytest.raises(
        ValueError, match=r"is of model.name=timm/test_vit, not of model.name=timm/test_vit2; leave out"
    ):
        sslfast.load(run, model="timm/test_vit2")
    assert main(["export", str(path), str(tmp_path / "b.onnx"), "--format", "onnx", "--model", "timm/test_vit"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", providers=["CPUExecutionProvider"])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    big = torch.rand(3, 3, 224, 224)
    (found,) = session.run(None, {"images": big.numpy()})
    np.testing.assert_allclose(found, trunk((big - mean) / std).detach().numpy(), rtol=1e-3, atol=1e-4)
