"""Pretraining methods, one file each, and their registry. Imports ``models``, ``views``, ``distributed`` and
``ops``."""

from sslfast.methods.autoencoder import Autoencoder
from sslfast.methods.base import BaseConfig, Method
from sslfast.methods.colorization import Colorization, lightness
from sslfast.methods.cpc import CPC
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.inpainting import Inpainting
from sslfast.methods.jigsaw import Jigsaw
from sslfast.methods.moco import MoCo
from sslfast.methods.pirl import PIRL
from sslfast.methods.registry import METHODS, MethodConfig
from sslfast.methods.relative_position import RelativePosition
from sslfast.methods.rotation import Rotation
from sslfast.methods.sela import SeLa
from sslfast.methods.shared.reconstruction import clean_view
from sslfast.methods.simclr import SimCLR
from sslfast.methods.super_resolution import SuperResolution

__all__ = [
    "CPC",
    "METHODS",
    "PIRL",
    "Autoencoder",
    "BaseConfig",
    "Colorization",
    "DeepCluster",
    "Inpainting",
    "Jigsaw",
    "Method",
    "MethodConfig",
    "MoCo",
    "RelativePosition",
    "Rotation",
    "SeLa",
    "SimCLR",
    "SuperResolution",
    "clean_view",
    "lightness",
]
