import torch

from sslfast.models import CustomTrunkConfig, build_trunk
from sslfast.models.preactivation import Bottleneck, PreactivationResNet

FACTORY = "sslfast.models.preactivation:preactivation_resnet50"


def test_the_shape_of_every_stage_and_the_number_of_parameters() -> None:
    trunk = build_trunk(CustomTrunkConfig(factory=FACTORY), seed=0)
    assert isinstance(trunk, PreactivationResNet)
    maps = trunk.stages(torch.randn(2, 3, 65, 65))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 33, 33),
        (256, 17, 17),
        (512, 9, 9),
        (1024, 5, 5),
        (2048, 3, 3),
    ]
    # The convolutions are those of torchvision's ResNet-50; each BatchNorm has the channels that its convolution sees.
    convolutions = sum(m.weight.numel() for m in trunk.modules() if isinstance(m, torch.nn.Conv2d))
    norms = sum(m.num_features for m in trunk.modules() if isinstance(m, torch.nn.BatchNorm2d))
    inputs = 64 + 2 * 256 + 256 + 3 * 512 + 512 + 5 * 1024 + 1024 + 2 * 2048
    inner = 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)
    assert (convolutions, norms) == (23_454_912, inputs + inner)


def test_a_block_whose_last_convolution_is_zero_is_the_identity() -> None:
    block = Bottleneck(256, 64, 1)
    torch.nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 256, 5, 5)
    assert torch.equal(block(x), x)


def test_the_shortcut_of_another_shape_sees_the_activated_input() -> None:
    block = Bottleneck(3, 2, 2)
    torch.nn.init.zeros_(block.conv3.weight)
    with torch.no_grad():
        block.shortcut.weight.fill_(1.0)  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 4, 4)
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    expected = normalised.clamp_min(0).sum(1, keepdim=True)[..., ::2, ::2].expand(-1, 8, -1, -1)
    torch.testing.assert_close(block(x), expected)
