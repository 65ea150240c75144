"""New runs from weights: what is loaded, what is recorded, and what is refused by the names of the entries."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import sslfast
from sslfast.cli.main import main
from sslfast.config import load_json
from sslfast.models import LibraryTrunkConfig, ResNetConfig, build_trunk
from sslfast.recipes.run import configure
from sslfast.runs import load_checkpoint
from sslfast.training import Trainer
from sslfast.weights import export_trunk, read_weights

VIT = "timm/test_vit"


def trainer(
    output: Path, *, rows: int = 8, lines: list[str] | None = None, recipe: str = "simclr-small", **changes: Any
):  # type: ignore[no-untyped-def]
    plain = {
        "epochs": 1,
        "batch_size": 4,
        "device": "cpu",
        "tensorboard": False,
        "progress": "off",
        "loader.workers": 0,
    }
    config = configure(recipe, {**plain, "model.name": VIT, **changes})
    return Trainer(config, rows, output, report=(lines if lines is not None else []).append)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init") / "run"
    trainer(path, recipe="dino-small").fit()
    return path


def entries(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(next((path / "checkpoints").glob("*.pt")))["method"]
    return found


def test_a_finished_run_is_trained_on_with_its_heads(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    new = trainer(tmp_path / "new", rows=12, lines=lines, recipe="dino-small", init=str(run), epochs=2)
    before, state = entries(run), new.method.state_dict()
    assert all(torch.equal(state[name], before[name]) for name in state if name != "centre")
    assert "trunk, teacher_trunk, head, teacher_head from" in lines[0]
    assert "after step 2, SHA-256" in lines[0]
    assert lines[1] == "not loaded: 1 tensors of centre start anew"
    assert new.fit().step == 6
    recorded = load_json(tmp_path / "new" / "init.json")
    checkpoint = run / "checkpoints" / "step_00000002.pt"
    assert recorded["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (recorded["init"], recorded["file"], recorded["step"]) == (str(run), str(checkpoint), 2)
    assert (recorded["not_loaded"], recorded["left_out"]) == (["centre"], ["centre"])
    assert set(recorded["loaded"]) == state.keys() - {"centre"}
    assert load_json(tmp_path / "new" / "config.json")["init"] == str(run)


def test_another_method_takes_the_trunk_and_its_copies(run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    state = trainer(tmp_path / "new", lines=lines, recipe="byol-small", init=str(run)).method.state_dict()
    weights = read_weights(run).state
    for copy in ("trunk", "target_trunk"):
        assert all(torch.equal(state[f"{copy}.{name}"], value) for name, value in weights.items())
    assert lines[0].startswith("initial weights: 156 tensors of trunk, target_trunk from")
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_needs_the_weights_no_more(run: Path, tmp_path: Path) -> None:
    exported = export_trunk(run, tmp_path / "a.safetensors", format="safetensors")
    trainer(tmp_path / "new", init=str(exported)).fit()
    first = (tmp_path / "new" / "init.json").read_text()
    exported.unlink()
    assert trainer(tmp_path / "new", init=str(exported)).fit().step == 2
    assert (tmp_path / "new" / "init.json").read_text() == first
    with pytest.raises(ValueError, match=r"init was '.*a.safetensors', is None"):
        trainer(tmp_path / "new").fit()


@pytest.mark.parametrize("form", ["state dict", "teacher and student", "hub", "torchvision's for resnet18"])
def test_files(form: str, run: Path, tmp_path: Path) -> None:
    trunk, changes = sslfast.load(run), {}
    plain = {name.removeprefix("network."): value for name, value in trunk.state_dict().items()}
    path = tmp_path / "weights.pth"
    if form == "hub":
        path = export_trunk(run, tmp_path / "hub", format="hub")
    elif form == "state dict":
        torch.save(plain, path)
    elif form == "teacher and student":
        student = {f"module.backbone.{name}": torch.zeros_like(value) for name, value in plain.items()}
        torch.save({"student": student, "teacher": {f"backbone.{k}": v for k, v in plain.items()}}, path)
    else:
        trunk = build_trunk(ResNetConfig(name="resnet18"), seed=5)
        torch.save(trunk.state_dict(), path)
        changes = {"model.name": "torchvision/resnet18"}
    state = trainer(tmp_path / "new", init=str(path), **changes).method.trunk.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), trunk.state_dict().values(), strict=True))


def test_a_file_of_several_networks_names_a_command_that_takes_one_out(tmp_path: Path) -> None:
    config, path = ResNetConfig(name="resnet18", width=0.125), tmp_path / "two nets.pth"
    plain, averaged = (build_trunk(config, seed=seed).state_dict() for seed in (0, 1))
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, path)
    size = {"model.name": "resnet18", "model.width": 0.125, "model.stem": "imagenet"}
    with pytest.raises(
        ValueError, match=r"init=.* 2 ResNets, .*'state_dict_ema\.'; `sslfast export .*` takes"
    ) as error:
        trainer(tmp_path / "new", init=str(path), **size)
    words = shlex.split(str(error.value).split("`")[1].replace("ONE", str(tmp_path / "one")))
    assert main([*words[1:-1], "state_dict_ema."]) == 0
    trunk = trainer(tmp_path / "new", init=str(tmp_path / "one.safetensors"), **size).method.trunk
    assert torch.equal(trunk.state_dict()["conv1.weight"], averaged["conv1.weight"])


@pytest.mark.parametrize(
    ("init", "changes", "message"),
    [
        ("RUN", {"model.name": "resnet18"}, r"init=.* is of another network than model.name=resnet18: conv1.weight "
         r"missing there and \[64, 3, 3, 3\] here, .* and \d+ more; start with --model.name timm/test_vit$"),
        ("SMALL", {"model.name": "resnet18", "model.stem": "imagenet"}, r"conv1.weight \[64, 3, 3, 3\] there and "
         r"\[64, 3, 7, 7\] here; start with --model.name resnet18 --model.stem small$"),
        ("RUN", {"model.options": {"patch_size": 8}}, "network.pos_embed .* there and .* here"),
        ("nowhere.pth", {}, "init=nowhere.pth does not exist; give a run directory, a file of weights that"),
        ("torchvision/resnet18", {}, "torchvision's weights are given as a file; `python -c"),
        ("timm/test_vit.nothing", {}, "timm has no weights 'nothing' of test_vit; "),
        ("timm/test_vit", {}, "these weights are not on this machine, and nothing is downloaded unasked; get them with "
         "`hf download timm/test_vit.r160_in1k model.safetensors`"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    init: str, changes: dict[str, Any], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    torch.save(build_trunk(ResNetConfig(name="resnet18", stem="small"), seed=0).state_dict(), tmp_path / "small.pth")
    path = {"RUN": str(run), "SMALL": str(tmp_path / "small.pth")}.get(init, init)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(tmp_path / "new", init=path, **changes)
    assert not (tmp_path / "new").exists()


def test_timms_weights_where_they_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from safetensors.torch import save_file

    net = timm.create_model("test_vit")  # with its classifier, as on the hub
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def cached(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    lines: list[str] = []
    new = trainer(tmp_path / "new", init=VIT, lines=lines)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    state = new.method.trunk.state_dict()
    assert all(torch.equal(state[name], net.state_dict()[name.removeprefix("network.")]) for name in state)
    assert "normalised by mean [0.5, 0.5, 0.5]" in lines[-1]
    sized = trainer(tmp_path / "new", init=VIT, **{"model.options": {"img_size": 64}})
    assert sized.method.trunk.state_dict()["network.pos_embed"].shape == (1, 17, 64)
    assert sized.config.model == LibraryTrunkConfig(name=VIT, options={"img_size": 64})
