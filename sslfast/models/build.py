"""Trunk configurations, and trunks from them."""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from sslfast.config import decode
from sslfast.models.init import seeded
from sslfast.models.resnet import ResNetConfig
from sslfast.models.trunk import CustomTrunkConfig, Trunk

TrunkConfig: TypeAlias = ResNetConfig | CustomTrunkConfig
"""Configuration of any trunk; ``name`` says which."""


def build_trunk(config: TrunkConfig, *, seed: int) -> Trunk:
    """A trunk whose initial weights depend on ``seed`` alone; the global generator is left as it was.

    Raises:
        ImportError: a ResNet without torchvision.
        ValueError: a factory that cannot be used.
    """
    with seeded(seed):
        return config.build()


def read_trunk_config(data: Mapping[str, Any], *, where: str = "model") -> TrunkConfig:
    """The configuration that ``to_dict`` made ``data`` from; ValueError names the field, under ``where``."""
    return cast(TrunkConfig, decode(TrunkConfig, data, where=where))


def require_resnet(config: TrunkConfig, *, purpose: str) -> ResNetConfig:
    """``config`` as that of a ResNet; ValueError says that ``purpose`` needs one."""
    if not isinstance(config, ResNetConfig):
        raise ValueError(f"{purpose} needs a ResNet, got model.factory={config.factory}; pretrain one with model.name")
    return config


def trunk_stride(config: TrunkConfig, *, purpose: str = "the stride of res5") -> int:
    """Pixels of the image per cell of res5, along a side; ValueError for a trunk that is no ResNet."""
    return {"imagenet": 32, "small": 8}[require_resnet(config, purpose=purpose).stem]
