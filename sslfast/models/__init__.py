"""Trunks, heads and memory banks as modules. Imports ``distributed`` and ``ops``."""

from sslfast.models.context import RowContext
from sslfast.models.contrast import info_nce
from sslfast.models.decoder import Decoder, trunk_stride
from sslfast.models.heads import JigsawHead, MLPHead, PairHead, PatchHead
from sslfast.models.init import seeded
from sslfast.models.memory_bank import MemoryBank, initial_rows
from sslfast.models.resnet import ResNetConfig, ResNetTrunk, build_trunk

__all__ = [
    "Decoder",
    "JigsawHead",
    "MLPHead",
    "MemoryBank",
    "PairHead",
    "PatchHead",
    "ResNetConfig",
    "ResNetTrunk",
    "RowContext",
    "build_trunk",
    "info_nce",
    "initial_rows",
    "seeded",
    "trunk_stride",
]
