"""Loaders: batches of uint8 crops on the device, decoded by Pillow, DALI or FFCV, or synthetic. Imports ``data``,
``views`` and ``ops``."""

from sslfast.loaders.dali_whole import DaliImages
from sslfast.loaders.decode import BatchDecoder, decode_crops
from sslfast.loaders.ffcv import BetonImages
from sslfast.loaders.plan import epoch_order
from sslfast.loaders.registry import (
    DISTRIBUTIONS,
    LOADERS,
    Loader,
    LoaderConfig,
    LoaderName,
    ReaderName,
    build_loader,
    choose_loader,
    choose_reader,
    default_workers,
    loader_status,
    loaders_for,
)

__all__ = [
    "DISTRIBUTIONS",
    "LOADERS",
    "BatchDecoder",
    "BetonImages",
    "DaliImages",
    "Loader",
    "LoaderConfig",
    "LoaderName",
    "ReaderName",
    "build_loader",
    "choose_loader",
    "choose_reader",
    "decode_crops",
    "default_workers",
    "epoch_order",
    "loader_status",
    "loaders_for",
]
