"""ResNets with pre-activation (He et al., ECCV 2016, identity mappings), as the authors of SeLa train them."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import relu

from sslfast.models.trunk import Trunk, trunk_factory

BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """``x -> shortcut + conv3(relu(bn3(conv2(relu(bn2(conv1(relu(bn1(x)))))))))``, the stride in the 3x3 convolution.

    Where shapes differ the shortcut is a 1x1 convolution of ``relu(bn1(x))``, else x.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        out = self.conv3(relu(self.bn3(self.conv2(relu(self.bn2(self.conv1(active)))))))
        return cast(Tensor, out + (x if self.shortcut is None else self.shortcut(active)))


class PreactivationResNet(Trunk):
    """Images ``[B, 3, S, S]`` to pooled res5 features ``[B, 2048]``, total stride 32.

    As ``models/resnetv2.py`` of yukimasano/self-label: neither BatchNorm nor ReLU behind conv1, nor behind the last
    block, which He et al. have. Initial weights are torch's.
    """

    out_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layers, width = nn.ModuleList(), 64
        for stage, count in enumerate(BLOCKS):
            channels, blocks = 64 << stage, []
            for block in range(count):
                blocks.append(Bottleneck(width, channels, 2 if stage and block == 0 else 1))
                width = 4 * channels
            self.layers.append(nn.Sequential(*blocks))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Maps after conv1 (before its max-pool), res2, res3, res4, res5."""
        maps = [self.conv1(images)]
        x = self.maxpool(maps[0])
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)[-1].mean(dim=(2, 3))


@trunk_factory
def preactivation_resnet50() -> PreactivationResNet:
    """``--model.factory sslfast.models.preactivation:preactivation_resnet50``."""
    return PreactivationResNet()
