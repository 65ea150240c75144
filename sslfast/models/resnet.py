"""Trunks: torchvision's ResNets without the classifier, with an ImageNet stem or one for small images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sslfast.models.trunk import Trunk


@dataclass(kw_only=True)
class ResNetConfig:
    """Which ResNet is pretrained."""

    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """He et al. 2016, as torchvision has it (ResNet-50: stride in the 3x3 convolution)."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 stride 2 and max-pool, total stride 32. small: 3x3 stride 1, no pool, total stride 8,
    for images up to 64 px."""
    norm: Literal["batch", "layer"] = "batch"
    """batch: BatchNorm. layer: every image by its own mean and variance over channels and pixels (GroupNorm of one
    group), independent of other images; torchvision's weights do not fit it."""
    width: float = 1.0
    """Factor on the channels of every layer: 2 is PIRL-c2x (table 2 of the paper, 98 M parameters with ResNet-50)."""
    zero_init_residual: bool = False
    """Initial weights alone: the scale of the last normalisation of every residual block starts at 0, so that the block
    starts as the identity (Goyal et al. 2017, section 5.1)."""
    input: Literal["rgb", "sobel"] = "rgb"
    """What conv1 sees of the image. sobel: the two Sobel derivatives of the mean of the three channels, so that no
    feature is of colour (DeepCluster, ``models/alexnet.py``; mmselfsup's ``ResNetSobel``)."""

    def __post_init__(self) -> None:
        if not self.width > 0 or 64 * self.width % 8:
            raise ValueError(f"model.width must be a positive multiple of 1/8, got {self.width}")

    def build(self) -> "ResNetTrunk":
        """The network, its weights drawn from torch's global generator; see :func:`sslfast.models.build_trunk`."""
        return ResNetTrunk(self)


def norm_layer(config: ResNetConfig) -> Callable[[int], nn.Module]:
    """Channels to a normalisation layer."""
    return nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 1)


class _StridedConv(nn.Conv2d):
    """A strided 3x3 convolution that takes stride 1 on 1x1 maps, where the stride changes nothing.

    There oneDNN's bf16 weight gradient of the strided convolution reads uninitialised memory (torch 2.11, CPU): random
    values, often NaN. Patches of 16 px are 1x1 maps in res5.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride if max(x.shape[-2:]) > 1 else (1, 1)
        return nn.functional.conv2d(x, self.weight, self.bias, stride, self.padding)


def _wide(config: ResNetConfig, norm: Callable[[int], nn.Module]) -> nn.Module:
    """torchvision's ResNet with every layer's channels times ``config.width``; its ``fc`` is not scaled."""
    from torchvision.models import resnet

    class Wide(resnet.ResNet):
        def _make_layer(self, block: type, planes: int, *args: int, **options: int) -> nn.Sequential:
            if planes == 64:
                self.inplanes = round(64 * config.width)
            return super()._make_layer(block, round(planes * config.width), *args, **options)

    blocks = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}[config.name]
    block = resnet.Bottleneck if config.name == "resnet50" else resnet.BasicBlock
    net = Wide(block, blocks, norm_layer=norm, zero_init_residual=config.zero_init_residual)
    net.conv1 = nn.Conv2d(3, round(64 * config.width), kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.bn1 = norm(round(64 * config.width))
    return net


class ResNetTrunk(Trunk):
    """Images to pooled res5 features.

    ``forward``: float ``[B, 3, S, S]`` -> ``[B, out_features]``, the spatial mean of res5 (512 columns for ResNet-18
    and 34, 2048 for ResNet-50, times the width). ``stages`` returns the map of every stage, for evaluations of single
    layers. Parameter names are torchvision's, so exported weights load there with ``strict=False`` (only ``fc`` is
    missing).
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    has_sobel = False
    sobel: Tensor

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        try:
            import torchvision
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"{config.name} needs torchvision, which does not import beside torch {torch.__version__}: {error}. "
                "Install the pair that matches, for example `pip install torch==2.11.0 torchvision==0.26.0`"
            ) from error
        norm, first = norm_layer(config), round(64 * config.width)
        if config.width == 1:
            net = getattr(torchvision.models, config.name)(
                weights=None, norm_layer=norm, zero_init_residual=config.zero_init_residual
            )
        else:
            net = _wide(config, norm)
        if config.stem == "small":
            net.conv1 = nn.Conv2d(3, first, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (2, 2):
                module.__class__ = _StridedConv
        if config.input == "sobel":
            old = net.conv1
            net.conv1 = nn.Conv2d(2, first, old.kernel_size, stride=old.stride, padding=old.padding, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
            filters = torch.stack((across, across.T))[:, None].expand(-1, 3, -1, -1) / 3
            self.has_sobel = True
            self.register_buffer("sobel", filters.contiguous(), persistent=False)
        self.out_features = round(net.fc.in_features * config.width)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(net, name))

    def _first(self, images: Tensor) -> Tensor:
        """The map after conv1."""
        if self.has_sobel:
            images = nn.functional.conv2d(images, self.sobel.to(images.dtype), padding=1)
        return cast(Tensor, self.relu(self.bn1(self.conv1(images))))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Maps after conv1 (before its max-pool), res2, res3, res4, res5."""
        x = self._first(images)
        maps = [x]
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self._first(images))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, x.mean(dim=(2, 3)))
