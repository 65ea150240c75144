"""Loaders: batches of uint8 crops on the device, by Pillow, DALI, FFCV or synthetic. Imports ``data`` and
``views``."""

from sslfast.loaders.decode import BatchDecoder, PackedLocations, decode_crops
from sslfast.loaders.plan import epoch_order
from sslfast.loaders.registry import (
    DISTRIBUTIONS,
    LOADERS,
    Loader,
    LoaderConfig,
    build_loader,
    choose_loader,
    loader_status,
)

__all__ = [
    "DISTRIBUTIONS",
    "LOADERS",
    "BatchDecoder",
    "Loader",
    "LoaderConfig",
    "PackedLocations",
    "build_loader",
    "choose_loader",
    "decode_crops",
    "epoch_order",
    "loader_status",
]
