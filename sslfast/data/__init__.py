"""Where images come from: sources, the manifest that numbers them, decoding policy, verification and conversion.
Imports ``sslfast.files`` and ``sslfast.ops``."""

from sslfast.data.beton import JPG, Beton, BetonSource
from sslfast.data.contents import Contents, combined, recorded_decoding, sample_contents
from sslfast.data.demo import PHOTOGRAPHS, make_demo_data
from sslfast.data.folder import FolderSource
from sslfast.data.ground_truth import label_folder
from sslfast.data.images import (
    DEFAULT_DECODING,
    ORIENTATION,
    BadImageError,
    Decoding,
    ImageHeader,
    OnBadImage,
    OpenImage,
    check_size,
    decode_full,
    decode_pixels,
    open_image,
    quiet_pillow,
    read_bytes,
    require_strict_pillow,
    silence_pillow,
)
from sslfast.data.jpeg import scan_jpeg
from sslfast.data.manifest import Manifest, some_paths
from sslfast.data.opening import open_data, parse_data, reopen_data
from sslfast.data.pool import available_cores, exit_with_parent
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.data.source import HASHED_BYTES, ImageLocation, ImageSource, SourceError, all_sources, content_hash
from sslfast.data.spelling import alike
from sslfast.data.verify import verify_images

__all__ = [
    "DEFAULT_DECODING",
    "HASHED_BYTES",
    "JPG",
    "ORIENTATION",
    "PHOTOGRAPHS",
    "BadImageError",
    "Beton",
    "BetonSource",
    "Contents",
    "Decoding",
    "FolderSource",
    "ImageHeader",
    "ImageLocation",
    "ImageSource",
    "Manifest",
    "OnBadImage",
    "OpenImage",
    "PrepareConfig",
    "SourceError",
    "alike",
    "all_sources",
    "available_cores",
    "check_size",
    "combined",
    "content_hash",
    "decode_full",
    "decode_pixels",
    "exit_with_parent",
    "label_folder",
    "make_demo_data",
    "open_data",
    "open_image",
    "parse_data",
    "prepare_beton",
    "quiet_pillow",
    "read_bytes",
    "recorded_decoding",
    "reopen_data",
    "require_strict_pillow",
    "sample_contents",
    "scan_jpeg",
    "silence_pillow",
    "some_paths",
    "verify_images",
]
