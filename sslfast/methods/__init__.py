"""Pretraining methods, one file each, and their registry. Imports ``config``, ``models``, ``views``, ``distributed``
and ``ops``.

A method is registered when its module is imported: those of this package here, others by the user, the command's
``--plugin`` or the entry points of an installed package.
"""

from sslfast.methods.autoencoder import Autoencoder
from sslfast.methods.barlow_twins import BarlowTwins
from sslfast.methods.base import BaseConfig, BatchSplit, Method, MethodContext
from sslfast.methods.byol import BYOL
from sslfast.methods.colorization import Colorization, lightness
from sslfast.methods.cpc import CPC
from sslfast.methods.deepcluster import DeepCluster
from sslfast.methods.dino import DINO
from sslfast.methods.head import read_head
from sslfast.methods.inpainting import Inpainting
from sslfast.methods.jigsaw import Jigsaw
from sslfast.methods.moco import MoCo
from sslfast.methods.pirl import PIRL
from sslfast.methods.registry import METHODS, MethodConfig, register_method
from sslfast.methods.relative_position import RelativePosition
from sslfast.methods.rotation import Rotation
from sslfast.methods.sela import SeLa
from sslfast.methods.shared.grid import PatchGrid
from sslfast.methods.shared.patches import jigsaw_view
from sslfast.methods.shared.reconstruction import clean_view
from sslfast.methods.simclr import SimCLR
from sslfast.methods.simsiam import SimSiam
from sslfast.methods.super_resolution import SuperResolution
from sslfast.methods.swav import SwAV
from sslfast.methods.vicreg import VICReg

__all__ = [
    "BYOL",
    "CPC",
    "DINO",
    "METHODS",
    "PIRL",
    "Autoencoder",
    "BarlowTwins",
    "BaseConfig",
    "BatchSplit",
    "Colorization",
    "DeepCluster",
    "Inpainting",
    "Jigsaw",
    "Method",
    "MethodConfig",
    "MethodContext",
    "MoCo",
    "PatchGrid",
    "RelativePosition",
    "Rotation",
    "SeLa",
    "SimCLR",
    "SimSiam",
    "SuperResolution",
    "SwAV",
    "VICReg",
    "clean_view",
    "jigsaw_view",
    "lightness",
    "read_head",
    "register_method",
]
