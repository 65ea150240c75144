"""Networks of torchvision and timm as trunks: built, pretrained, resumed, evaluated, and refused with the remedy."""

import os
import signal
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast.cli.main import main
from sslfast.config import from_dict, load_json, to_dict
from sslfast.evaluation.embed import embed_all
from sslfast.evaluation.knn import KnnConfig, evaluate_knn
from sslfast.evaluation.layers import pooled_layers
from sslfast.methods.autoencoder import Autoencoder
from sslfast.models import LibraryTrunk, LibraryTrunkConfig, ResNetConfig, build_trunk, check_sizes, read_trunk_config
from sslfast.models.build import choose_trunk
from sslfast.models.trunk import CustomTrunkConfig
from sslfast.recipes.run import configure
from sslfast.runs import load_checkpoint
from sslfast.training import RunInterruptedError, TrainConfig, Trainer
from tests.evaluation.runs import write_data
from tests.tiny import context, same

SMALL = ["timm/test_vit", "timm/test_resnet", "timm/test_convnext", "timm/test_mambaout", "timm/test_efficientnet"]
TORCHVISION = ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0"]
TORCHVISION += ["densenet121", "resnet18", "mnasnet0_5", "mobilenet_v2", "swin_t", "alexnet", "convnext_tiny"]
OPTIONS = ["--epochs", "1", "--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--no-tensorboard"]
OPTIONS += ["--progress", "off", "--loader.workers", "0"]


def library_trunk(name: str, **options: bool | int | float | str) -> LibraryTrunk:
    trunk = build_trunk(LibraryTrunkConfig(name=name, options=options), seed=3).eval()
    assert isinstance(trunk, LibraryTrunk)
    return trunk


@pytest.mark.parametrize("name", [*SMALL, *(f"torchvision/{name}" for name in TORCHVISION)])
def test_features_and_maps(name: str) -> None:
    trunk = library_trunk(name)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = trunk(images)
    assert features.shape == (2, trunk.out_features)
    maps = trunk.stages(images)
    sides = [one.shape[-1] for one in maps]
    assert sides == sorted(set(sides), reverse=True)
    assert all(one.ndim == 4 and len(one) == 2 for one in maps)
    if name in ("timm/test_resnet", "torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/regnet_y_400mf"):
        torch.testing.assert_close(maps[-1].mean(dim=(2, 3)), features)
    before = torch.get_rng_state()
    trunk.train()(images)
    assert torch.equal(torch.get_rng_state(), before), "a forward pass draws no random number"


def test_timm_computes_the_same() -> None:
    import timm

    trunk, images = library_trunk("timm/test_vit"), torch.rand(2, 3, 160, 160)
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(trunk.network.state_dict())
    assert torch.equal(net(images), trunk(images))
    assert trunk(torch.rand(1, 3, 96, 32)).shape == (1, 64)


def test_configurations_are_read_back() -> None:
    config = LibraryTrunkConfig(name="timm/test_vit", options={"img_size": 96, "global_pool": "avg"})
    assert read_trunk_config(to_dict(config)) == config
    assert from_dict(TrainConfig, to_dict(TrainConfig(model=config))).model == config
    changed = configure("dino-small", {"model.name": "timm/test_vit", "model.options": {"img_size": 64}})
    assert changed.model == LibraryTrunkConfig(name="timm/test_vit", options={"img_size": 64})
    assert configure("dino-small", {"model": {"factory": "a:b"}}).model == CustomTrunkConfig(factory="a:b")
    assert configure("dino-small", {"model.name": "resnet34"}).model == ResNetConfig(name="resnet34", stem="small")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_smal_patch16_224", "timm has no such network; did you mean timm/vit_small_patch16_224"),
        ("torchvision/resnet19", "torchvision has no such network; did you mean torchvision/resnet1"),
        ("timm/zzzzzzzz", r"all [\d,]+ are listed by python -c 'import timm; print\(\*timm.list_models\(\)\)'"),
        ("timm/", "model.name must be torchvision/NAME or timm/NAME, got 'timm/'"),
        ("timm/hf-hub:someone/net", "timm has no such network"),
    ],
)
def test_unknown_networks(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_trunk(LibraryTrunkConfig(name=name), seed=0)


@pytest.mark.parametrize(
    ("name", "near"), [("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224"), ("resnet101", "torchvision/resnet101")]
)
def test_a_name_without_its_library(name: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"resnet50, torchvision/NAME or timm/NAME, got '{name}'; did you mean {near}"
    ):
        choose_trunk(ResNetConfig(), {"name": name})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_rate": 0.1}, "drop_path_rate must be 0, got 0.1: a trunk draws no random numbers"),
        ({"checkpoint_path": "a.pth"}, "checkpoint_path is not a property of the network; give weights with --init"),
        ({"num_classes": 10}, "num_classes is fixed"),
        ({"depht": 3}, "cannot be built with depht=3: .*unexpected keyword.*; change model.options"),
    ],
)
def test_bad_options(options: dict[str, bool | int | float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        library_trunk("timm/test_vit", **options)


def test_sizes_are_checked_by_the_view() -> None:
    fixed = library_trunk("timm/test_vit_relpos")
    before = {name: value.clone() for name, value in fixed.state_dict().items()}
    check_sizes(fixed, {"image": 160})
    assert same(fixed.state_dict(), before)
    words = r"timm/test_vit_relpos does not take images of 96 x 96 px .*, the size of a, b: choose .* img_size 96$"
    with pytest.raises(ValueError, match=words):
        check_sizes(fixed, {"a": 96, "b": 96})
    with pytest.raises(ValueError, match="the size of local: give all views one size"):
        check_sizes(fixed, {"image": 160, "local": 96})
    with pytest.raises(ValueError, match=r"divisible by patch size.*: choose another crop.size or patch_size$"):
        check_sizes(library_trunk("timm/test_vit"), {"image": 100})
    check_sizes(library_trunk("timm/test_vit_relpos", img_size=64), {"image": 64})


def test_what_needs_a_map_says_so() -> None:
    config = LibraryTrunkConfig(name="timm/test_vit")
    with pytest.raises(
        ValueError, match=r"autoencoder needs a ResNet, got model.name=timm/test_vit; pretrain one with"
    ):
        Autoencoder.Config().build(context(config, 8))


def test_layers_are_those_that_exist() -> None:
    images = torch.rand(2, 3, 64, 64)
    convnext, vit = library_trunk("timm/test_convnext"), library_trunk("timm/test_vit")
    found = pooled_layers(convnext, images, ["res2", "res5", "res5avg"])
    assert [tuple(value.shape[1:]) for value in found.values()] == [(64, 1, 1), (24, 6, 6), (64, 2, 2)]
    assert torch.equal(pooled_layers(vit, images, ["res5avg"])["res5avg"].flatten(1), vit(images))
    with pytest.raises(
        ValueError, match="timm/test_convnext has the layers res2, res3, res4, res5, res5avg, got conv1"
    ):
        pooled_layers(convnext, images, ["conv1", "res2"])
    with pytest.raises(ValueError, match="timm/test_vit has the layers res5, res5avg, got res4; choose among them"):
        pooled_layers(vit, images, ["res4"])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("timm/test_vit", "dino-small"),
        ("timm/test_resnet", "simclr-small"),
        ("torchvision/mobilenet_v3_small", "pirl-small"),
    ],
)
def test_trains_resumes_bit_equal_and_evaluates(name: str, recipe: str, tmp_path: Path) -> None:
    config = configure(
        recipe,
        {
            **{"model.name": name, "epochs": 2, "batch_size": 4, "device": "cpu", "precision": "fp32"},
            **{"tensorboard": False, "progress": "off", "loader.workers": 0},
        },
    )
    whole = Trainer(config, 8, tmp_path / "whole", report=lambda _: None).fit()
    stopped = Trainer(config, 8, tmp_path / "stopped", report=lambda _: None)
    step = stopped.train_step

    def stop_at_2(batches: object) -> None:
        step(batches)  # type: ignore[arg-type]
        if stopped.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.train_step = stop_at_2  # type: ignore[method-assign, assignment]
    with pytest.raises(RunInterruptedError):
        stopped.fit()
    resumed = Trainer(config, 8, tmp_path / "stopped", report=lambda _: None).fit()
    assert same(load_checkpoint(whole.checkpoint)["method"], load_checkpoint(resumed.checkpoint)["method"])
    assert load_json(tmp_path / "whole" / "config.json")["model"] == {"name": name, "options": {}}
    trunk = sslfast.load(tmp_path / "whole")
    assert trunk(torch.zeros(2, 3, 64, 64)).shape == (2, trunk.out_features)
    if recipe == "dino-small":
        data = write_data(tmp_path / "data", train=3, val=2)
        found = evaluate_knn(tmp_path / "whole", data, KnnConfig(k=(1,), device="cpu"))
        assert {row["encoder"] for row in found["results"]} == {"trained", "untrained", "raw pixels"}
        assert embed_all(tmp_path / "whole", data, device="cpu").values.shape == (15, trunk.out_features)
        with pytest.raises(ValueError, match="timm/test_vit does not take images of 50 x 50 px"):
            evaluate_knn(tmp_path / "whole", data, KnnConfig(k=(1,), device="cpu", size=50, preprocessing="whole"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", "synthetic:8", "--recipe", "dino-small", *OPTIONS, "-o", str(tmp_path / "run")]
    assert main([*command, "--model.name", "timm/test_vit", "--dry-run"]) == 0
    assert "64 features of images of 64 px (first, second), 32 px (local0" in capsys.readouterr().out
    assert main([*command, "--model.name", "timm/test_vit_relpos"]) == 2
    assert "give all views one size" in capsys.readouterr().err
    assert main([*command, "--model.name", "torchvision/resnet19"]) == 2
    assert "did you mean torchvision/resnet18" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
