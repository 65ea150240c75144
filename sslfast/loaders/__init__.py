"""Loaders: batches of uint8 crops on the device, decoded by Pillow, DALI or FFCV, or synthetic. Imports ``data``,
``views`` and ``ops``."""

from sslfast.loaders.decode import BatchDecoder, decode_crops
from sslfast.loaders.plan import epoch_order
from sslfast.loaders.registry import (
    DISTRIBUTIONS,
    LOADERS,
    Loader,
    LoaderConfig,
    LoaderName,
    build_loader,
    choose_loader,
    default_workers,
    loader_status,
    loaders_for,
)

__all__ = [
    "DISTRIBUTIONS",
    "LOADERS",
    "BatchDecoder",
    "Loader",
    "LoaderConfig",
    "LoaderName",
    "build_loader",
    "choose_loader",
    "decode_crops",
    "default_workers",
    "epoch_order",
    "loader_status",
    "loaders_for",
]
