"""Feature extraction: deterministic preprocessing, each image read once, the work shared by the ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sslfast.data import (
    BadImageError,
    DaemonPool,
    LostBatchError,
    Manifest,
    OnBadImage,
    Patience,
    Reading,
    quiet_pillow,
    require_strict_pillow,
)
from sslfast.distributed import gather_objects, gather_uneven, is_main, own_rows, raise_together
from sslfast.evaluation.cache import Cached, FeatureCache
from sslfast.evaluation.folders import UnsuitableError
from sslfast.evaluation.preprocessing import Preprocessing, describe, eval_image
from sslfast.text import printable


@dataclass(kw_only=True)
class Features:
    """Features of the usable images of a manifest."""

    values: dict[str, Tensor]
    """Name -> float32 ``[N, D]`` on the CPU."""
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
            while some := list(islice(remaining, self.batch_size)):
                found = pool.map(decode, some, self.patience, why)
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


def check_features(name: str, found: Cached, manifest: Manifest) -> None:
    """UnsuitableError where a feature vector is not finite or its norm overflows: every score would be chance."""
    bad = (~found.values.norm(dim=1).isfinite()).nonzero()[:, 0]
    if len(bad):
        first = printable(manifest.paths[int(found.rows[bad[0]])])
        raise UnsuitableError(
            f"the encoder ({name}) gives NaN or infinite features for {len(bad)} of {len(found.values)} images "
            f"({first}, ...), so its weights are broken; name others, for example an earlier checkpoint, as RUN"
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
        for name, part in _read(compute, missing, reader, device).items():
            stored[name] = part
            key = keys[name]
            check_features(name, part, manifest)
            if key is not None and is_main():
                cache.save(key, part)
    whole = {name: known for name in identities if (known := stored[name]) is not None}
    some = next(iter(whole.values()))
    return Features(
        values={name: part.values for name, part in whole.items()}, rows=some.rows, bad_images=some.bad_images
    )


def _read(compute: Compute, names: list[str], reader: ImageReader, device: torch.device) -> dict[str, Cached]:
    """Each rank reads its part of the images; all ranks return everything."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    rows: list[int] = []
    error: str | None = None
    try:
        for some, images in reader(own_rows(len(reader.manifest))):
            rows += some
            for name, value in compute(names, images.to(device)).items():
                parts[name].append(value.flatten(1).float().cpu())
    except (ValueError, LostBatchError) as problem:
        error = str(problem)
    raise_together(error)
    all_rows = torch.tensor([row for part in gather_objects(rows) for row in part], dtype=torch.int64)
    if not len(all_rows):
        raise UnsuitableError(f"no usable image in {reader.manifest.source}; name a folder that holds images")
    bad = [item for part in gather_objects(reader.bad_images) for item in part]
    widths = next(w for w in gather_objects({n: p[0].shape[1] for n, p in parts.items() if p}) if w)
    values = {n: torch.cat(p) if p else torch.zeros(0, widths[n]) for n, p in parts.items()}
    return {n: Cached(values=gather_uneven(v), rows=all_rows, bad_images=bad) for n, v in values.items()}
