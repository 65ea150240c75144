"""Feature extraction: deterministic preprocessing, each image read once, the work shared by the ranks."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
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
from sslfast.distributed import broadcast_tensor, gather_objects, gather_uneven, is_main, own_rows, rank, together
from sslfast.evaluation.cache import Cached, FeatureCache, FeatureWriter, mapped, table_of
from sslfast.evaluation.folders import UnsuitableError
from sslfast.evaluation.preprocessing import LONG, Preprocessing, centre_crop, describe, eval_image, preprocess
from sslfast.loaders import BetonImages, DaliImages, ReaderName, choose_reader
from sslfast.text import printable

_AHEAD = 2
"""Batches that threads decode while the network works on one."""
_CHUNK_BYTES = 1 << 26
"""Of features that ranks send at once."""


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
    loader: ReaderName = "auto"
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    patience: Patience = field(default_factory=Patience)
    """With every image."""

    def __post_init__(self) -> None:
        for name in ("size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got workers={self.workers}")
        self.chosen = choose_reader(self.loader, self.manifest)
        """The loader that reads the images."""
        if self.chosen == "dali" and self.preprocessing == "centre-crop-bicubic":
            raise ValueError("loader dali resizes by the triangular filter alone: bicubic takes --loader pillow")
        require_strict_pillow()

    def describe(self) -> str:
        """What is seen of an image, and how it is decoded: see :func:`describe`."""
        return describe(self.preprocessing, self.size, (self.chosen,))

    def __call__(self, rows: Sequence[int], device: torch.device | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """``(rows, uint8 [B, 3, S, S] on the device)`` (None: the CPU) of the usable images among ``rows``.

        Threads decode the next batches while the caller works on one, unless ``workers`` is 0.
        """
        device = device or torch.device("cpu")
        reading = Reading()

        def why() -> str:
            row = reading.oldest()
            last = "" if row is None else f" (last file {self.manifest.source.where(row)})"
            return f"images{last}: the storage does not answer; see that the data can be read, and evaluate again"

        def result(future: "Future[Any]") -> Any:
            return self.patience.result(future, why)

        batches = (
            self._dali(rows, device, result, reading) if self.chosen == "dali" else self._own(rows, result, reading)
        )
        for some, found in batches:
            good = [(row, image) for row, image in zip(some, found, strict=True) if isinstance(image, Tensor)]
            self._note_bad(some, found)
            if good:
                yield [row for row, _ in good], torch.stack([image for _, image in good]).to(device)

    def _dali(
        self, rows: Sequence[int], device: torch.device, result: Any, reading: Reading
    ) -> Iterator[tuple[list[int], list[Tensor | str]]]:
        source = self.manifest.source
        images = DaliImages(
            source,
            centre_crop(self.size, self.preprocessing),
            decode=lambda data: eval_image(data, self.size, self.preprocessing, source.decoding),
            longest=LONG,
            batch_size=self.batch_size,
            threads=max(1, self.workers),
            device=device,
            result=result,
            reading=reading,
        )
        yield from images(rows)

    def _own(
        self, rows: Sequence[int], result: Any, reading: Reading
    ) -> Iterator[tuple[list[int], list[Tensor | str]]]:
        """Decoded in threads here, by Pillow or by FFCV's decoder, and resized by Pillow."""
        remaining = iter(rows)
        with ExitStack() as stack:
            stack.enter_context(quiet_pillow())
            decode = self._decoder(stack)
            pool = stack.enter_context(DaemonPool(max(1, self.workers), "sslfast-images"))

            def read(row: int) -> Tensor | str:
                reading(row)
                try:
                    return decode(row)
                except BadImageError as error:
                    return error.reason

            ahead: deque[tuple[list[int], list[Future[Tensor | str]]]] = deque()
            while True:
                while len(ahead) <= (_AHEAD if self.workers else 0):
                    some = list(islice(remaining, self.batch_size))
                    if not some:
                        break
                    ahead.append((some, [pool.submit(read, row) for row in some]))
                if not ahead:
                    return
                some, futures = ahead.popleft()
                yield some, [result(future) for future in futures]

    def _decoder(self, stack: ExitStack) -> Callable[[int], Tensor]:
        """Row -> pixels; raises BadImageError."""
        source, size, how = self.manifest.source, self.size, self.preprocessing
        if self.chosen == "pillow":
            return lambda row: eval_image(source.read(row), size, how, source.decoding)
        images = BetonImages(source)
        stack.callback(images.beton.close)

        def decode(row: int) -> Tensor:
            pixels, _ = images.pixels(row, 1)
            return torch.from_numpy(preprocess(pixels, size, how)).permute(2, 0, 1).contiguous()

        return decode

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
        "preprocessing": reader.describe(),
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
            writers[name] = cache.writer(keys[name])
        for some, images in reader(own_rows(len(reader.manifest)), device):
            rows.extend(some)
            for name, value in compute(names, images).items():
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
    """The features of all ranks: one file for the ranks that see each other's files, which they map; in memory where
    there is no folder or it cannot be written."""
    writer.width = max(gather_objects(writer.width))  # 0 on a rank without a usable image
    own = writer.values()  # mapped before the file has its name
    counts = gather_objects(writer.count)
    path = None if key is None else cache.path(key)
    if key is None or path is None or not all(gather_objects(writer.is_on_disk)):
        return gather_uneven(own)
    leader = _leader(writer)
    whole = None if leader != rank() else writer if is_main() else cache.writer(key)
    try:
        failed = _collect(own, counts, whole, is_shared=not any(gather_objects(leader)))

        def finish() -> None:
            if failed is not None:
                raise failed
            if whole is not None:
                whole.commit(table_of(key, rows, bad_images))

        together(finish)
    finally:
        if whole is not None:
            whole.discard()
    found = _mapped_file(gather_objects(path.absolute())[leader], len(rows), writer.width)
    is_whole = all(gather_objects(found is not None))
    if whole is not None and not cache.keep:
        path.unlink(missing_ok=True)  # what is mapped stays
    return found if is_whole and found is not None else gather_uneven(own)


def _leader(writer: FeatureWriter) -> int:
    """The first rank whose file this rank sees: 0 on every rank of a common file system."""
    names = gather_objects(str(writer.temporary.absolute()))
    return next(number for number, name in enumerate(names) if number == rank() or Path(name).exists())


def _collect(own: Tensor, counts: list[int], whole: FeatureWriter | None, *, is_shared: bool) -> Exception | None:
    """Append the rows of all ranks, in the order of ranks, to the files ``whole``, of which the first rank's holds its
    own rows already. At most :data:`_CHUNK_BYTES` are on the way. Returns what went wrong, so that no rank waits."""
    failed = None
    for owner, count in enumerate(counts):
        if not owner and is_shared:
            continue
        step = max(1, _CHUNK_BYTES // (4 * own.shape[1]))
        for first in range(0, count, step):
            last = min(first + step, count)
            chunk = broadcast_tensor(
                own[first:last] if owner == rank() else own.new_empty(last - first, own.shape[1]), owner
            )
            if whole is not None and whole.is_on_disk and failed is None and (owner or not is_main()):
                try:
                    whole.append(chunk)
                except OSError as error:
                    failed = error
    return failed


def _mapped_file(path: Path, count: int, width: int) -> Tensor | None:
    try:
        return mapped(path, count, width) if path.stat().st_size > count * width * 4 else None
    except (OSError, RuntimeError):
        return None
