"""Where images come from: sources, the manifest that numbers them, decoding policy, verification and conversion.
Imports ``sslfast.files`` and ``sslfast.ops``."""

from sslfast.data.apart import check_apart, check_run_apart
from sslfast.data.beton import JPG, Beton, BetonSource
from sslfast.data.contents import Contents, combined, recorded_decoding, sample_contents
from sslfast.data.demo import PHOTOGRAPHS, make_demo_data
from sslfast.data.folder import FolderSource
from sslfast.data.ground_truth import label_images
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
from sslfast.data.manifest import Manifest, NoImageError
from sslfast.data.mapped import mapped_pickle, write_pickle
from sslfast.data.opening import data_name, is_named, open_data, parse_data, reopen_data
from sslfast.data.pool import available_cores
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.data.processes import (
    STOP_SIGNALS,
    cannot_start,
    exit_with_parent,
    ignore_signals,
    refuse_in_bootstrap,
    signals_held,
    why_ended,
)
from sslfast.data.source import (
    HASHED_BYTES,
    Changes,
    ImageLocation,
    ImageSource,
    ListedImage,
    SourceError,
    all_sources,
    content_hash,
    register_source,
    some_paths,
    source_of,
)
from sslfast.data.spelling import alike
from sslfast.data.verify import verify_images
from sslfast.data.waiting import (
    LIMIT_SECONDS,
    DaemonPool,
    LostBatchError,
    Patience,
    Reading,
    WaitInterruptedError,
)

__all__ = [
    "DEFAULT_DECODING",
    "HASHED_BYTES",
    "JPG",
    "LIMIT_SECONDS",
    "ORIENTATION",
    "PHOTOGRAPHS",
    "STOP_SIGNALS",
    "BadImageError",
    "Beton",
    "BetonSource",
    "Changes",
    "Contents",
    "DaemonPool",
    "Decoding",
    "FolderSource",
    "ImageHeader",
    "ImageLocation",
    "ImageSource",
    "ListedImage",
    "LostBatchError",
    "Manifest",
    "NoImageError",
    "OnBadImage",
    "OpenImage",
    "Patience",
    "PrepareConfig",
    "Reading",
    "SourceError",
    "WaitInterruptedError",
    "alike",
    "all_sources",
    "available_cores",
    "cannot_start",
    "check_apart",
    "check_run_apart",
    "check_size",
    "combined",
    "content_hash",
    "data_name",
    "decode_full",
    "decode_pixels",
    "exit_with_parent",
    "ignore_signals",
    "is_named",
    "label_images",
    "make_demo_data",
    "mapped_pickle",
    "open_data",
    "open_image",
    "parse_data",
    "prepare_beton",
    "quiet_pillow",
    "read_bytes",
    "recorded_decoding",
    "refuse_in_bootstrap",
    "register_source",
    "reopen_data",
    "require_strict_pillow",
    "sample_contents",
    "scan_jpeg",
    "signals_held",
    "silence_pillow",
    "some_paths",
    "source_of",
    "verify_images",
    "why_ended",
    "write_pickle",
]
