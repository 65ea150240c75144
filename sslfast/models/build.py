"""Trunk configurations, and trunks from them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias, cast

from torch import Tensor

from sslfast.config import OneOf, decode, nearest
from sslfast.models.init import seeded
from sslfast.models.library import LibraryTrunkConfig, near_names
from sslfast.models.resnet import ResNetConfig
from sslfast.models.trunk import TRUNKS, CustomTrunkConfig, Trunk

RESNETS = ("resnet18", "resnet34", "resnet50")


class _ByName(dict[str, type]):
    """Classes of configurations by ``name``, those of libraries by the beginning of theirs."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith(("torchvision/", "timm/"))

    def __missing__(self, name: str) -> type:
        return LibraryTrunkConfig


_BY_NAME = _ByName({**dict.fromkeys(RESNETS, ResNetConfig), CustomTrunkConfig.name: CustomTrunkConfig})
TrunkConfig: TypeAlias = Annotated[
    ResNetConfig | CustomTrunkConfig | LibraryTrunkConfig,
    OneOf(_BY_NAME, "name a network of a library as torchvision/NAME or timm/NAME"),
]
"""Configuration of any trunk; ``name`` says which."""


def choose_trunk(
    config: ResNetConfig | CustomTrunkConfig | LibraryTrunkConfig, wanted: Mapping[str, Any]
) -> ResNetConfig | CustomTrunkConfig | LibraryTrunkConfig:
    """The trunk of a recipe, or a new configuration where ``wanted`` names one with other options.

    Args:
        config: the recipe's.
        wanted: what replaces its fields; ``name`` and ``factory`` are looked at.

    Raises:
        ValueError: a name that no trunk has; suggests near ones.
    """
    name, factory = wanted.get("name"), wanted.get("factory")
    if factory is not None:
        return CustomTrunkConfig(factory=str(factory))
    if name is None or name == config.name:
        return config
    if "/" in str(name):
        return LibraryTrunkConfig(name=str(name))
    if name in RESNETS:
        return config if isinstance(config, ResNetConfig) else ResNetConfig(name=name)
    if name in TRUNKS:
        return CustomTrunkConfig(factory=TRUNKS[str(name)])
    near = near_names(str(name))
    hint = f"did you mean {' or '.join(near[:4])}?" if near else nearest(str(name), [*RESNETS, *TRUNKS])
    known = ", ".join([*RESNETS, *TRUNKS])
    raise ValueError(f"model.name must be one of {known}, torchvision/NAME or timm/NAME, got {name!r}; {hint}")


_initial: list[Mapping[str, Tensor]] = []


@contextmanager
def initial_weights(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it :func:`build_trunk` gives trunks with these weights: a method copies its trunk when it is built."""
    _initial.append(state)
    try:
        yield
    finally:
        _initial.pop()


def build_trunk(config: TrunkConfig, *, seed: int) -> Trunk:
    """A trunk whose initial weights depend on ``seed`` alone, or are those of :func:`initial_weights`; the global
    generator is left as it was.

    Raises:
        ImportError: a network whose library is missing.
        ValueError: a network or a factory that cannot be used.
    """
    with seeded(seed):
        trunk = config.build()
    if _initial:
        trunk.load_state_dict(_initial[-1])
    return trunk


def read_trunk_config(data: Mapping[str, Any], *, where: str = "model") -> TrunkConfig:
    """The configuration that ``to_dict`` made ``data`` from; ValueError names the field, under ``where``."""
    return cast(TrunkConfig, decode(TrunkConfig, data, where=where))


def trunk_name(config: TrunkConfig) -> str:
    """The option that chose a trunk, for messages: ``model.name=...`` or ``model.factory=...``."""
    return f"model.factory={config.factory}" if isinstance(config, CustomTrunkConfig) else f"model.name={config.name}"


def require_resnet(config: TrunkConfig, *, purpose: str) -> ResNetConfig:
    """``config`` as that of a ResNet; ValueError says that ``purpose`` needs one."""
    if not isinstance(config, ResNetConfig):
        raise ValueError(
            f"{purpose} needs a ResNet, got {trunk_name(config)}; pretrain one with model.name {', '.join(RESNETS)}"
        )
    return config


def trunk_stride(config: TrunkConfig, *, purpose: str = "the stride of res5") -> int:
    """Pixels of the image per cell of res5, along a side; ValueError for a trunk that is no ResNet."""
    return {"imagenet": 32, "small": 8}[require_resnet(config, purpose=purpose).stem]
