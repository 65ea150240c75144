"""The methods that there are."""

from typing import TypeAlias, get_args

from sslfast.methods.autoencoder import Autoencoder
from sslfast.methods.base import BaseConfig
from sslfast.methods.colorization import Colorization
from sslfast.methods.cpc import CPC
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.inpainting import Inpainting
from sslfast.methods.jigsaw import Jigsaw
from sslfast.methods.moco import MoCo
from sslfast.methods.pirl import PIRL
from sslfast.methods.relative_position import RelativePosition
from sslfast.methods.rotation import Rotation
from sslfast.methods.sela import SeLa
from sslfast.methods.simclr import SimCLR
from sslfast.methods.super_resolution import SuperResolution

MethodConfig: TypeAlias = (
    PIRL.Config
    | SimCLR.Config
    | MoCo.Config
    | CPC.Config
    | Autoencoder.Config
    | Colorization.Config
    | Inpainting.Config
    | SuperResolution.Config
    | Jigsaw.Config
    | Rotation.Config
    | RelativePosition.Config
    | DeepCluster.Config
    | SeLa.Config
)
"""Configuration of any method; ``name`` says which."""

METHODS: dict[str, type[BaseConfig]] = {config.name: config for config in get_args(MethodConfig)}
"""Configuration classes by their name."""
