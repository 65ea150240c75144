"""Feature extraction: deterministic preprocessing, each image read once, the work shared by the ranks."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslfast.data import (
    BadImageError,
    DaemonPool,
    Manifest,
    OnBadImage,
    Patience,
    Reading,
    quiet_pillow,
    require_strict_pillow,
)
from sslfast.distributed import gather_objects, gather_uneven, is_main, own_rows, rank, together
from sslfast.evaluation.cache import Cached, FeatureCache, FeatureWriter, mapped, part_path, table_of
from sslfast.evaluation.folders import UnsuitableError
from sslfast.evaluation.preprocessing import Preprocessing, describe, eval_image
from sslfast.text import printable

_AHEAD = 2
"""Batches that threads decode while the network works on one."""


@dataclass(kw_only=True)
class Features:
    """Features of the usable images of a manifest."""

    values: dict[str, Tensor]
    """Name -> float32 ``[N, D]`` on the CPU; of a cache: mapped files."""
    rows: Tensor
    """``[N]`` int64: manifest row of each feature row."""
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of each image that was left out."""


@dataclass
class ImageReader:
    """Batches of evaluation images of a manifest, in row order.

    ``bad_images`` is filled while reading. With ``on_bad_image="error"`` an unusable image is a ValueError.
    """

    manifest: Manifest
    size: int
    batch_size: int = 256
    workers: int = 0
    on_bad_image: OnBadImage = "error"
    preprocessing: Preprocessing = "centre-crop"
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    """With every image."""

    def __post_init__(self) -> None:
        for name in ("size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.manifest.source.loader is not None:
            raise ValueError(
                f"{self.manifest.source} is a .{self.manifest.source.name} file, which only the training of linear "
                "classifiers by SGD and of semisup reads; give a folder or an archive of image files"
            )
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got workers={self.workers}")
        require_strict_pillow()

    def __call__(self, rows: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """``(rows, uint8 [B, 3, S, S])`` of the usable images among ``rows``."""
        remaining = iter(rows)
        reading = Reading()

        def decode(row: int) -> Tensor | str:
            reading(row)
            return self._decode(row)

        def why() -> str:
            row = reading.oldest()
            last = "" if row is None else f" (last file {self.manifest.source.where(row)})"
            return f"images{last}: the storage does not answer; see that the data can be read, and evaluate again"

        with quiet_pillow(), DaemonPool(max(1, self.workers), "sslfast-images") as pool:
            ahead: deque[tuple[list[int], list[Future[Tensor | str]]]] = deque()
            while True:
                while len(ahead) <= (_AHEAD if self.workers else 0):
                    some = list(islice(remaining, self.batch_size))
                    if not some:
                        break
                    ahead.append((some, [pool.submit(decode, row) for row in some]))
                if not ahead:
                    return
                some, futures = ahead.popleft()
                found = [self.patience.result(future, why) for future in futures]
                good = [(row, image) for row, image in zip(some, found, strict=True) if isinstance(image, Tensor)]
                self._note_bad(some, found)
                if good:
                    yield [row for row, _ in good], torch.stack([image for _, image in good])

    def _decode(self, row: int) -> Tensor | str:
        try:
            source = self.manifest.source
            return eval_image(source.read(row), self.size, self.preprocessing, source.decoding)
        except BadImageError as error:
            return error.reason

    def _note_bad(self, rows: list[int], found: Sequence[Tensor | str]) -> None:
        for row, reason in zip(rows, found, strict=True):
            if isinstance(reason, Tensor):
                continue
            if self.on_bad_image == "error":
                raise ValueError(
                    f"{self.manifest.source.where(row)} cannot be used ({reason}); repair or remove it, or pass "
                    "--on-bad-image skip"
                )
            self.bad_images.append((self.manifest.paths[row], reason))


def check_features(name: str, broken: Sequence[int], count: int, manifest: Manifest) -> None:
    """UnsuitableError where a feature vector (manifest rows ``broken``) is not finite or its norm overflows: every
    score would be chance."""
    if broken:
        raise UnsuitableError(
            f"the encoder ({name}) gives NaN or infinite features for {len(broken)} of {count} images "
            f"({printable(manifest.paths[broken[0]])}, ...), so its weights are broken; name others, for example an "
            "earlier checkpoint, as RUN"
        )


Compute = Callable[[list[str], Tensor], Mapping[str, Tensor]]
"""Maps encoder names and uint8 images ``[B, 3, S, S]`` on the device to features ``[B, D]`` by name."""


@torch.no_grad()
def extract(
    compute: Compute,
    identities: Mapping[str, dict[str, Any] | None],
    reader: ImageReader,
    *,
    device: torch.device,
    cache: FeatureCache,
) -> Features:
    """Features by name, from the cache or from the images, which are read once.

    Args:
        compute: computes the features of a batch.
        identities: name -> what its features depend on besides the images; None: not cached.
        reader: of the images.
        device: of ``compute``.
        cache: of the features.

    With several processes each reads its part of the images, and all return the features of all images.

    Raises:
        ValueError: an unusable image, or features that are not finite; on every rank.
    """
    manifest = reader.manifest
    images = {
        "manifest": manifest.digest(),
        "size": reader.size,
        "preprocessing": describe(reader.preprocessing, reader.size),
        "device": device.type,
        "decoding": asdict(manifest.source.decoding),
    }
    keys = {name: None if key is None else {**key, **images} for name, key in identities.items()}
    stored = {name: None if key is None else cache.load(key) for name, key in keys.items()}
    if reader.on_bad_image == "error":
        stored = {name: None if found is None or found.bad_images else found for name, found in stored.items()}
    # The union over ranks: a rank that does not see a file would otherwise extract alone, and wait forever.
    missing = sorted({name for names in gather_objects([n for n, f in stored.items() if f is None]) for name in names})
    if missing:
        stored |= _read(compute, missing, reader, device, cache, keys)
    whole = {name: known for name in identities if (known := stored[name]) is not None}
    some = next(iter(whole.values()))
    return Features(
        values={name: part.values for name, part in whole.items()}, rows=some.rows, bad_images=some.bad_images
    )


def _read(
    compute: Compute,
    names: list[str],
    reader: ImageReader,
    device: torch.device,
    cache: FeatureCache,
    keys: Mapping[str, dict[str, Any] | None],
) -> dict[str, Cached]:
    """Each rank reads its part of the images and writes it; all ranks return everything."""
    writers: dict[str, FeatureWriter] = {}
    broken: dict[str, list[int]] = {name: [] for name in names}
    rows: list[int] = []

    def read() -> None:
        for name in names:
            writers[name] = cache.writer(keys[name], part=rank())
        for some, images in reader(own_rows(len(reader.manifest))):
            rows.extend(some)
            for name, value in compute(names, images.to(device)).items():
                features = value.flatten(1).float().cpu()
                bad = (~features.norm(dim=1).isfinite()).nonzero()[:, 0]
                broken[name] += [some[position] for position in bad.tolist()]
                writers[name].append(features)

    try:
        together(read)
        all_rows = torch.tensor([row for part in gather_objects(rows) for row in part], dtype=torch.int64)
        if not len(all_rows):
            raise UnsuitableError(f"no usable image in {reader.manifest.source}; name a folder that holds images")
        bad_images = [item for part in gather_objects(reader.bad_images) for item in part]
        for name in names:
            everywhere = [row for part in gather_objects(broken[name]) for row in part]
            check_features(name, everywhere, len(all_rows), reader.manifest)
        return {
            name: Cached(
                values=_joined(cache, keys[name], writer, all_rows, bad_images), rows=all_rows, bad_images=bad_images
            )
            for name, writer in writers.items()
        }
    finally:
        for writer in writers.values():
            writer.discard()


def _joined(
    cache: FeatureCache,
    key: dict[str, Any] | None,
    writer: FeatureWriter,
    rows: Tensor,
    bad_images: list[tuple[str, str]],
) -> Tensor:
    """The features of all ranks: one file, which every rank maps; in memory where there is none, or where ranks do not
    see each other's files."""
    writer.width = max(gather_objects(writer.width))  # 0 on a rank without a usable image
    counts = gather_objects(writer.count)
    own = writer.values()  # mapped before the file has its name
    path = None if key is None else cache.path(key)
    all_written = path is not None and all(gather_objects(writer.is_on_disk))
    if all_written and key is not None and path is not None:
        together(lambda: None if is_main() else writer.commit())
        together(lambda: _join(cache, writer, path, counts, table_of(key, rows, bad_images)), only_main=True)
        if not is_main():
            part_path(path, rank()).unlink(missing_ok=True)
        found = _mapped_file(path, len(rows), writer.width)
        if all(gather_objects(found is not None)) and found is not None:
            return found
    return gather_uneven(own)


def _join(cache: FeatureCache, writer: FeatureWriter, path: Path, counts: list[int], table: dict[str, Any]) -> None:
    """The first rank's file, with the rows that the other ranks wrote behind its own."""
    try:
        for other, count in enumerate(counts[1:], 1):
            writer.append_file(part_path(path, other), count)
        writer.commit(table)
    except OSError as error:
        writer.discard()
        cache.note_failure(path, error)


def _mapped_file(path: Path, count: int, width: int) -> Tensor | None:
    try:
        return mapped(path, count, width) if path.stat().st_size > count * width * 4 else None
    except (OSError, RuntimeError):
        return None
