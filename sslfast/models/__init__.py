"""Trunks, heads, decoders and memory banks as modules. Imports ``config``, ``distributed`` and ``ops``."""

from sslfast.models.build import (
    TrunkConfig,
    build_trunk,
    choose_trunk,
    initial_weights,
    read_trunk_config,
    require_resnet,
    trunk_name,
    trunk_stride,
)
from sslfast.models.context import RowContext
from sslfast.models.contrast import full_precision, info_nce
from sslfast.models.decoder import Decoder
from sslfast.models.derivatives import first_derivative_only
from sslfast.models.finite import are_finite, first_nonfinite
from sslfast.models.heads import JigsawHead, MLPHead, OutputNorm, PairHead, PatchHead
from sslfast.models.init import seeded
from sslfast.models.library import (
    STAGE_NAMES,
    LibraryTrunk,
    LibraryTrunkConfig,
    check_sizes,
    import_library,
    size_words,
)
from sslfast.models.memory_bank import MemoryBank, initial_rows
from sslfast.models.recomputation import snapshot
from sslfast.models.resnet import ResNetConfig, ResNetTrunk
from sslfast.models.trunk import CustomTrunkConfig, Trunk, register_trunk, trunk_factory

__all__ = [
    "STAGE_NAMES",
    "CustomTrunkConfig",
    "Decoder",
    "JigsawHead",
    "LibraryTrunk",
    "LibraryTrunkConfig",
    "MLPHead",
    "MemoryBank",
    "OutputNorm",
    "PairHead",
    "PatchHead",
    "ResNetConfig",
    "ResNetTrunk",
    "RowContext",
    "Trunk",
    "TrunkConfig",
    "are_finite",
    "build_trunk",
    "check_sizes",
    "choose_trunk",
    "first_derivative_only",
    "first_nonfinite",
    "full_precision",
    "import_library",
    "info_nce",
    "initial_rows",
    "initial_weights",
    "read_trunk_config",
    "register_trunk",
    "require_resnet",
    "seeded",
    "size_words",
    "snapshot",
    "trunk_factory",
    "trunk_name",
    "trunk_stride",
]
