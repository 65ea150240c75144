"""``sslfast data prepare``: the images of a data set in one .beton file, in row order."""

import errno
import io
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslfast.data.beton import JPG, MAX_SIDE, RAW, BetonSource, BetonWriter
from sslfast.data.contents import combined
from sslfast.data.ffcv_library import load_decoder
from sslfast.data.images import ORIENTATION, BadImageError, Decoding, OnBadImage, OpenImage, decode_pixels, open_image
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data
from sslfast.data.pool import map_processes
from sslfast.data.source import HASHED_BYTES, ImageSource, content_hash

Mode = Literal["jpg", "raw", "proportion"]
_CHUNK = 4  # images sent from a process at once: raw ones are large
_MAX_DIFFERENCE = 2.0
"""Largest mean absolute difference of a kept JPEG between FFCV's decoder and Pillow's. Rounding stays below 1."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How images are stored."""

    mode: Mode = "jpg"
    """jpg: JPEG, with the original bytes where both decoders agree on them. raw: pixels, the fastest to read and 5 to
    20 times larger. proportion: the share ``jpg_share`` of the images as in jpg, evenly spread, the rest as in raw."""
    jpg_share: float = 0.5
    """Share of JPEGs in mode proportion."""
    max_resolution: int | None = None
    """Images with a longer side are scaled down to this one."""
    quality: int = 90
    """JPEG quality of images that are not kept as they are: formats and colours other than RGB or grayscale JPEG,
    EXIF-rotated or scaled images, JPEGs that the decoder warns about."""
    white_level: int | None = None
    """Sample value that is white in images of 16 bits a channel, often 1023, 4095 or 16383; None: as recorded by
    `sslfast data verify`, else 65535."""
    max_pixels: int | None = None
    """Images of more pixels are unusable; None: 89,478,485, which take 0.3 to 2.3 GB of memory each."""

    def __post_init__(self) -> None:
        if self.mode not in ("jpg", "raw", "proportion"):
            raise ValueError(f"mode must be jpg, raw or proportion, got {self.mode!r}")
        if not 0 <= self.jpg_share <= 1:
            raise ValueError(f"jpg_share must be in [0, 1], got {self.jpg_share}")
        if self.max_resolution is not None and not 8 <= self.max_resolution <= MAX_SIDE:
            raise ValueError(f"max_resolution must be in [8, {MAX_SIDE}], got {self.max_resolution}")
        self.decoding()
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in [1, 100], got {self.quality}")

    def decoding(self) -> Decoding:
        return Decoding(white_level=self.white_level, max_pixels=self.max_pixels)

    def is_jpg(self, row: int) -> bool:
        """Whether a row is stored as JPEG."""
        share = {"jpg": 1.0, "raw": 0.0, "proportion": self.jpg_share}[self.mode]
        return int((row + 1) * share) > int(row * share)


@dataclass(kw_only=True)
class Prepared:
    """What was written."""

    path: Path
    manifest: Manifest
    """Of the stored rows; ``excluded`` lists what was left out."""
    size: int
    """Bytes of the file."""
    counts: dict[str, int]
    """How images were stored -> number of images."""


@dataclass
class _Stored:
    mode: int
    width: int
    height: int
    data: bytes
    crc: int
    done: str


def prepare_beton(
    source: Any,
    output: Path,
    config: PrepareConfig | None = None,
    *,
    on_bad_image: OnBadImage = "error",
    workers: int | None = None,
    progress: bool = False,
) -> Prepared:
    """Store every image of ``source`` in ``output``, atomically.

    Every image is decoded by the policy of :mod:`sslfast.data.images`, so the manifest inside the file is verified.
    A JPEG is kept as it is if FFCV's decoder reads it without a warning and its pixels agree with Pillow's.

    Args:
        source: a source of image files (folder, tar shards, CSV list, dataset), or a manifest of ``sslfast data
            verify`` (.tsv).
        output: the .beton file; an old one is unchanged until the new one is complete.
        config: how images are stored.
        on_bad_image: ``error``: ValueError at the first image that cannot be used; ``skip``: the manifest inside lists
            it and gives it no row.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show progress bars on the terminal.

    Raises:
        ValueError: with the remedy; ``output`` is unchanged.
        ImportError: package ffcv is missing.
    """
    config = PrepareConfig() if config is None else config
    output = Path(output)
    if output.suffix != ".beton":
        raise ValueError(f"the output must be named *.beton, got {output}")
    load_decoder()
    manifest = open_data(source, on_bad_image=on_bad_image, progress=progress)
    if isinstance(manifest.source, BetonSource):
        raise ValueError(f"{source} is a .beton file already: name what it was made of ({manifest.root})")
    manifest = manifest.decoded(combined(manifest.source.decoding, config.decoding(), where=source))
    _check_space(manifest, output, config)
    work, tasks = partial(_store, manifest.source.packed(), config), list(enumerate(manifest.sha1))
    bad: list[tuple[str, str]] = []
    counts: Counter[str] = Counter()
    try:
        with BetonWriter(output, len(manifest)) as writer:
            stored = map_processes(work, tasks, workers=workers, progress=progress, title="preparing", chunk=_CHUNK)
            for row, (path, found) in enumerate(zip(manifest.paths, stored, strict=True)):
                if isinstance(found, _Stored):
                    writer.add(found.mode, found.width, found.height, found.data, found.crc)
                    counts[found.done] += 1
                elif on_bad_image == "skip":
                    bad.append((path, found))
                else:
                    raise ValueError(
                        f"{manifest.source.where(row)} cannot be used: {found}; repair or remove the file, or pass "
                        "--on-bad-image skip"
                    )
            usable = manifest.without(bad)
            if not len(usable):
                raise ValueError(f"no usable image in {manifest.source}: all {len(usable.excluded)} are bad")
            stored_rows = BetonSource(
                root=manifest.root, paths=usable.paths, archive=output.absolute(), decoding=manifest.source.decoding
            )
            usable = replace(usable, source=stored_rows, verified=True)
            settings = {
                "mode": config.mode,
                "jpg_share": config.jpg_share,
                "max_resolution": config.max_resolution,
                "quality": config.quality,
                "counts": dict(counts),
            }
            writer.commit(usable, settings)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk is full: {output.parent.absolute()} has no room for {output.name}; free some, or lower "
            "--max-resolution or --quality, or write to another disk"
        ) from None
    return Prepared(path=output, manifest=usable, size=output.stat().st_size, counts=dict(sorted(counts.items())))


def _check_space(manifest: Manifest, output: Path, config: PrepareConfig) -> None:
    """ValueError before the work if there is certainly too little space."""
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if config.mode == "jpg" and config.max_resolution is None:
        # Kept JPEGs keep their size; other formats may become smaller.
        files = zip(manifest.paths, manifest.bytes, strict=True)
        needed = sum(int(size) for path, size in files if path.lower().endswith((".jpg", ".jpeg")))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"{output} needs {needed / 1e9:.2f} GB or more and {folder} has {free / 1e9:.2f} GB free: free some, "
                "or write to another disk"
            )


def _store(source: ImageSource, config: PrepareConfig, task: tuple[int, str]) -> _Stored | str:
    """What is written for one row, given with its hash, or why it is bad. Runs in a worker process."""
    row, sha1 = task
    as_jpg = config.is_jpg(row)
    try:
        data = source.read(row)
        if sha1 and content_hash(data[:HASHED_BYTES]) != sha1:  # of a dataset in Python few are known
            raise ValueError(f"{source.where(row)}: content hash differs from the manifest: verify the data again")
        opened = open_image(data, source.decoding)
        keepable = as_jpg and _is_plain_jpeg(opened)
        orientation = opened.orientation
        stored, _ = decode_pixels(opened)
    except BadImageError as error:
        return error.reason
    pixels = np.broadcast_to(stored, (*stored.shape[:2], 3))
    limit = min(config.max_resolution or MAX_SIDE, MAX_SIDE)
    if keepable and max(pixels.shape) <= limit and _decoders_agree(data, pixels):
        return _stored(JPG, pixels, data, "original JPEG kept")
    transpose, flip_vertical, flip_horizontal = ORIENTATION[orientation]
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    pixels = pixels[:: -1 if flip_vertical else 1, :: -1 if flip_horizontal else 1]
    scaled = ""
    if max(pixels.shape) > limit:
        height, width = (max(1, round(side * limit / max(pixels.shape[:2]))) for side in pixels.shape[:2])
        image = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        scaled = "scaled down and "
    pixels = np.ascontiguousarray(pixels)
    if not as_jpg:
        return _stored(RAW, pixels, pixels.tobytes(), f"{scaled}stored raw")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=config.quality)
    why = "" if scaled or not keepable else " (the decoder warns about the original)"
    return _stored(JPG, pixels, buffer.getvalue(), f"{scaled}encoded as JPEG{why}")


def _stored(mode: int, pixels: NDArray[np.uint8], data: bytes, done: str) -> _Stored:
    height, width = pixels.shape[:2]
    return _Stored(mode, width, height, data, zlib.crc32(data), done)


def _is_plain_jpeg(opened: OpenImage) -> bool:
    image = opened.image
    return image.format == "JPEG" and image.mode in ("RGB", "L") and opened.orientation == 1


def _decoders_agree(data: bytes, pixels: NDArray[np.uint8]) -> bool:
    """Whether FFCV's decoder reads the JPEG without a warning and to the same pixels, up to rounding."""
    height, width = pixels.shape[:2]
    source = np.frombuffer(data, dtype=np.uint8)
    decoded = np.zeros((height, width, 3), dtype=np.uint8)
    if load_decoder()(source.ctypes.data, len(data), height, width, decoded.ctypes.data, 1):
        return False
    difference = np.maximum(decoded, pixels) - np.minimum(decoded, pixels)
    return float(difference.mean()) <= _MAX_DIFFERENCE
