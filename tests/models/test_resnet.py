"""Trunks of any width: shapes, parameter counts, and that width 1 is torchvision's own network."""

import pytest
import torch
import torchvision

from sslfast.models.build import build_trunk
from sslfast.models.resnet import ResNetConfig


def parameters(config: ResNetConfig) -> int:
    return sum(p.numel() for p in build_trunk(config, seed=0).parameters())


def test_width_one_is_torchvisions() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs = torchvision.models.resnet18(weights=None).state_dict()
    ours = build_trunk(ResNetConfig(name="resnet18"), seed=3).state_dict()
    assert theirs.keys() - ours.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("width", [0.25, 2.0])
def test_every_layer_is_scaled(name: str, stem: str, width: float) -> None:
    one = build_trunk(ResNetConfig(name=name, stem=stem), seed=0)  # type: ignore[arg-type]
    config = ResNetConfig(name=name, stem=stem, width=width)  # type: ignore[arg-type]
    other = build_trunk(config, seed=0)
    assert other.out_features == width * one.out_features
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    for key, value in one.state_dict().items():
        scaled = [n if n == 3 and key == "conv1.weight" else width * n for n in value.shape[:2]]
        assert list(shapes.pop(key)) == [*scaled, *value.shape[2:]], key
    assert shapes == {}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert other.eval()(images).shape == (2, other.out_features)
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), build_trunk(config, seed=0).parameters(), strict=True)
    )


def test_parameters_of_the_paper() -> None:
    """Table 2 of the PIRL paper: 25.6 M for ResNet-50 and 98 M with all channels doubled, both with a classifier."""
    classifier = 2048 * 1000 + 1000
    assert round((parameters(ResNetConfig()) + classifier) / 1e6, 1) == 25.6
    assert round((parameters(ResNetConfig(width=2)) + 2 * 2048 * 1000 + 1000) / 1e6) == 98


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3, float("nan")])
def test_invalid_widths(width: float) -> None:
    with pytest.raises(ValueError, match=r"model\.width must be a positive multiple of 1/8"):
        ResNetConfig(width=width)


@pytest.mark.parametrize(("name", "blocks", "last"), [("resnet18", 8, "bn2"), ("resnet50", 16, "bn3")])
def test_zero_init_residual(name: str, blocks: int, last: str) -> None:
    """The scale of every block's last normalisation is 0, and every other initial weight is as without it."""
    plain = build_trunk(ResNetConfig(name=name), seed=1).state_dict()  # type: ignore[arg-type]
    zeroed = build_trunk(ResNetConfig(name=name, zero_init_residual=True), seed=1).state_dict()  # type: ignore[arg-type]
    changed = [key for key, value in plain.items() if not torch.equal(value, zeroed[key])]
    assert len(changed) == blocks
    assert all(key.endswith(f"{last}.weight") and not zeroed[key].any() for key in changed)


def test_sobel_input() -> None:
    """conv1 sees the derivatives of the mean channel: of a ramp along x, and nothing of its colour or brightness."""
    trunk = ResNetConfig(name="resnet18", stem="small", width=0.125, input="sobel").build().eval()
    assert trunk.conv1.weight.shape == (8, 2, 3, 3)
    seen: list[torch.Tensor] = []
    trunk.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    ramp = torch.arange(12.0).expand(1, 3, 12, 12) * torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    features = trunk(ramp)
    inner = seen[0][0, :, 1:-1, 1:-1]
    torch.testing.assert_close(inner[0], torch.full((10, 10), -8 * 3.0))
    torch.testing.assert_close(inner[1], torch.zeros(10, 10), rtol=0, atol=1e-4)
    mean = ramp.mean(1, keepdim=True).expand_as(ramp)
    torch.testing.assert_close(trunk(mean), features)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(trunk.stages(ramp)[-1].mean((2, 3)), features)
    assert "sobel" not in trunk.state_dict()
