"""Frozen features for evaluations: encoders with one face, one deterministic preprocessing, one data layout.

An encoder maps uint8 images ``[B, 3, S, S]`` to float32 features ``[B, D]``. Three stand side by side in every
evaluation: the trained trunk of a run, the same trunk before training, and raw pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sslfast.checkpoint import load_latest
from sslfast.config import from_dict, load_json, save_json
from sslfast.distributed import resolve_device
from sslfast.images import BadImageError, OpenImage, open_image, quiet_pillow, read_bytes, require_strict_pillow
from sslfast.loaders.batch import IMAGENET_MEAN, IMAGENET_STD
from sslfast.loaders.decode import decode_crops
from sslfast.manifest import Manifest
from sslfast.models.resnet import ResNetConfig, build_trunk
from sslfast.rundir import RunDirectory, versions

TRAINED, UNTRAINED, RAW_PIXELS = "trained", "untrained", "raw pixels"
OnBadImage = Literal["error", "skip"]
TRUNK = "trunk."
"""Prefix of the trunk's weights in a checkpoint's ``method``."""


class Encoder(Protocol):
    """What turns images into features."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, S, S]`` -> float32 ``[B, D]`` on the same device."""

    def to(self, device: torch.device) -> "Encoder":
        """The encoder on a device."""


class TrunkEncoder:
    """A trunk in eval mode behind the input normalisation that it was trained with."""

    def __init__(
        self,
        trunk: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.trunk = trunk.eval()
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.layout = torch.contiguous_format

    def to(self, device: torch.device) -> "TrunkEncoder":
        self.trunk, self.mean, self.std = self.trunk.to(device), self.mean.to(device), self.std.to(device)
        # As in training: channels_last suits tensor cores and costs a CPU half its speed.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.trunk.to(memory_format=self.layout)  # type: ignore[call-overload]
        return self

    def __call__(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 255 - self.mean) / self.std
        return cast(Tensor, self.trunk(pixels.contiguous(memory_format=self.layout))).float()


class RawPixels:
    """The image itself: resized to ``side`` x ``side`` (antialiased bilinear), normalised as a network's input with
    ImageNet's mean and deviation per channel, flattened to ``3 * side**2`` columns.

    The mean is taken away because the cosine of all-positive vectors measures little but brightness: without it this
    baseline is weaker.
    """

    def __init__(self, *, side: int = 16) -> None:
        if side < 1:
            raise ValueError(f"side must be at least 1 pixel, got {side=}")
        self.side = side
        self.mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD)[:, None, None]

    def to(self, device: torch.device) -> "RawPixels":
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        small = interpolate(images.float() / 255, size=(self.side, self.side), mode="bilinear", antialias=True)
        return ((small - self.mean) / self.std).flatten(1)


@dataclass(kw_only=True)
class RunEncoders:
    """A run's trunk and what it is compared with."""

    encoders: dict[str, Encoder]
    """``trained``, ``untrained``, ``raw pixels``."""
    size: int
    """Side of the images that the run was trained on."""
    checkpoint: Path
    """Where the trained weights come from."""
    step: int
    """Training steps behind them."""
    facts: dict[str, Any]
    """Recipe, model and seed of the run, for the record."""


def load_run(run: Path | str) -> RunEncoders:
    """Rebuild the encoder of a run directory from its config.json and its newest good checkpoint.

    The untrained encoder is the same trunk at the start of the same run (same seed), in eval mode as it was built: its
    BatchNorm layers hold mean 0 and variance 1, so they pass their input on.

    Raises:
        FileNotFoundError: there is no run, or no checkpoint in it.
        ValueError: the configuration or the checkpoint does not fit.
    """
    directory = RunDirectory(run)
    config = load_json(directory.config)
    try:
        model, seed = from_dict(ResNetConfig, config["model"], where="model"), int(config["seed"])
        view = config["method"]["image_view"]
        size, mean, std = int(view["crop"]["size"]), view["augment"]["mean"], view["augment"]["std"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{directory.config} lacks {error}; it is not the configuration of a run") from None
    found = load_latest(directory.checkpoints)
    if found is None:
        raise FileNotFoundError(f"{directory.path} holds no checkpoint yet; let the run reach its first one")
    path, state = found
    weights = {name.removeprefix(TRUNK): v for name, v in state["method"].items() if name.startswith(TRUNK)}
    trained = build_trunk(model, seed=seed)
    untrained = TrunkEncoder(build_trunk(model, seed=seed), mean=mean, std=std)
    try:
        trained.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not hold the {model.name} that {directory.config} names: {reason}") from None
    encoders: dict[str, Encoder] = {
        TRAINED: TrunkEncoder(trained, mean=mean, std=std),
        UNTRAINED: untrained,
        RAW_PIXELS: RawPixels(),
    }
    facts = {"recipe": config.get("recipe"), "model": config["model"], "seed": seed}
    return RunEncoders(encoders=encoders, size=size, checkpoint=path, step=int(state["step"]), facts=facts)


def eval_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """The centre square that an evaluation sees, as left, top, right, bottom in pixels of the upright image.

    Equal to resizing the shorter side to ``round(size * 256 / 224)`` and cutting the centre ``size`` x ``size``, up to
    rounding to whole pixels. An image whose shorter side is less than that is not magnified to throw its border away:
    its whole centre square is taken.
    """
    shorter = min(width, height)
    resized = round(size * 256 / 224)
    side = shorter if shorter < resized else max(1, round(shorter * size / resized))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def eval_image(opened: OpenImage, size: int) -> Tensor:
    """uint8 ``[3, size, size]``: :func:`eval_box` resized as the training loader resizes. Raises BadImageError."""
    box = torch.tensor(eval_box(opened.width, opened.height, size)).numpy()
    return decode_crops(opened, [box], [size])[0]


@dataclass(kw_only=True)
class Features:
    """Features of the usable images of a manifest."""

    values: dict[str, Tensor]
    """Encoder name -> float32 ``[N, D]`` on the CPU."""
    rows: Tensor
    """``[N]`` int64: manifest row of each feature row."""
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of what was left out."""


def extract_features(
    encoder: Encoder,
    manifest: Manifest,
    *,
    size: int,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Tensor:
    """Features of every row of a manifest: float32 ``[N, D]`` on the CPU; ValueError at an unusable image."""
    found = extract_all(
        {"": encoder}, manifest, size=size, batch_size=batch_size, device=device, workers=workers, on_bad_image="error"
    )
    return found.values[""]


@torch.no_grad()
def extract_all(
    encoders: Mapping[str, Encoder],
    manifest: Manifest,
    *,
    size: int,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
) -> Features:
    """Features of several encoders from one reading of the images.

    Args:
        encoders: by name.
        manifest: the images.
        size: side of the images that the encoders get.
        batch_size: images per forward pass; changes no feature beyond float rounding.
        device: where the encoders run, in float32.
        workers: decoding threads; 0: decode in the caller's thread.
        on_bad_image: ``error``: ValueError naming the file. ``skip``: leave it out of ``rows``.
    """
    for name, value in (("size", size), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers=}")
    require_strict_pillow()
    device = torch.device(device)
    encoders = {name: encoder.to(device) for name, encoder in encoders.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    rows: list[int] = []
    bad: list[tuple[str, str]] = []
    for images in _batches(manifest, size, batch_size, workers):
        good = []
        for row, image in images:
            if isinstance(image, Tensor):
                rows.append(row)
                good.append(image)
            elif on_bad_image == "error":
                raise ValueError(
                    f"{manifest.path(row)} cannot be used ({image}); repair or remove it, or pass --on-bad-image skip"
                )
            else:
                bad.append((manifest.paths[row], image))
        if good:
            batch = torch.stack(good).to(device)
            for name, encoder in encoders.items():
                parts[name].append(encoder(batch).float().cpu())
    if not rows:
        raise ValueError(f"no usable image in {manifest.root}: name a folder that holds images")
    return Features(
        values={name: torch.cat(part) for name, part in parts.items()}, rows=torch.tensor(rows), bad_images=bad
    )


def _batches(manifest: Manifest, size: int, batch_size: int, workers: int) -> Iterator[list[tuple[int, Tensor | str]]]:
    """``(row, image or why it is bad)`` in row order, at most ``batch_size`` at once."""

    def decode(row: int) -> tuple[int, Tensor | str]:
        try:
            return row, eval_image(open_image(read_bytes(manifest.path(row))), size)
        except BadImageError as error:
            return row, error.reason

    remaining = iter(range(len(manifest)))
    with quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        while rows := list(islice(remaining, batch_size)):
            yield list(pool.map(decode, rows) if workers else map(decode, rows))


@dataclass(kw_only=True)
class EvaluationSet:
    """Features and labels of a labelled data set for every encoder of a run."""

    train: dict[str, Tensor]
    """Encoder name -> float32 ``[N_train, D]``."""
    train_labels: Tensor
    """``[N_train]`` int64."""
    val: dict[str, Tensor]
    """Encoder name -> float32 ``[N_val, D]``."""
    val_labels: Tensor
    """``[N_val]`` int64."""
    train_paths: list[Path]
    """File of each row of ``train``."""
    val_paths: list[Path]
    """File of each row of ``val``."""
    classes: list[str]
    """Class names in label order."""
    facts: dict[str, Any]
    """Run, checkpoint, data and versions, JSON values only."""


def load_manifests(data: Path | str, *, on_bad_image: OnBadImage = "error") -> tuple[Manifest, Manifest]:
    """Manifests of ``data/train`` and ``data/val``, which must hold the same class folders.

    Raises:
        ValueError: a folder is missing, images lie outside class folders, or the classes differ.
    """
    data = Path(data)
    for split in ("train", "val"):
        if not (data / split).is_dir():
            raise ValueError(
                f"{data} has no folder {split}: an evaluation needs {data}/train/<class>/ and {data}/val/<class>/"
            )
    train, val = (Manifest.scan(data / split, on_bad_image=on_bad_image) for split in ("train", "val"))
    for manifest in (train, val):
        loose = [path for path, label in zip(manifest.paths, manifest.labels, strict=True) if label < 0]
        if loose:
            raise ValueError(
                f"{manifest.root} has {len(loose)} images outside class folders ({loose[0]}): an evaluation needs "
                "labels; put each image into the folder of its class"
            )
    if train.classes != val.classes:
        only = [
            f"only in {name}: {', '.join(sorted(these)[:5])}{' ...' if len(these) > 5 else ''}"
            for name, these in (
                ("train", set(train.classes) - set(val.classes)),
                ("val", set(val.classes) - set(train.classes)),
            )
            if these
        ]
        raise ValueError(f"classes of {data}/train and {data}/val differ ({'; '.join(only)}); give both the same")
    if len(train.classes) < 2:
        raise ValueError(f"{data} has one class, {train.classes[0]}; an evaluation needs at least 2")
    return train, val


def load_evaluation_set(
    run: Path | str,
    data: Path | str,
    *,
    size: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
) -> EvaluationSet:
    """Features of ``data/train`` and ``data/val`` for the trained, the untrained and the raw-pixel encoder.

    Everything that can be wrong with the run or the folders is an error before the first image is decoded.
    """
    chosen = resolve_device(device)
    manifests = load_manifests(data, on_bad_image=on_bad_image)
    loaded = load_run(run)
    size = loaded.size if size is None else size
    found = [
        extract_all(
            loaded.encoders,
            manifest,
            size=size,
            batch_size=batch_size,
            device=chosen,
            workers=workers,
            on_bad_image=on_bad_image,
        )
        for manifest in manifests
    ]
    labels = [torch.from_numpy(m.labels)[f.rows] for m, f in zip(manifests, found, strict=True)]
    paths = [[m.path(row) for row in f.rows.tolist()] for m, f in zip(manifests, found, strict=True)]
    facts = {
        "run": str(Path(run)),
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        **loaded.facts,
        "size": size,
        "data": {
            "root": str(Path(data)),
            "classes": len(manifests[0].classes),
            **{
                split: {
                    "images": len(part.rows),
                    "left_out": len(manifest.excluded) + len(part.bad_images),
                    "digest": manifest.digest(),
                }
                for split, manifest, part in zip(("train", "val"), manifests, found, strict=True)
            },
        },
        "versions": versions(),
    }
    return EvaluationSet(
        train=found[0].values,
        train_labels=labels[0],
        val=found[1].values,
        val_labels=labels[1],
        train_paths=paths[0],
        val_paths=paths[1],
        classes=manifests[0].classes,
        facts=facts,
    )


def standard_error(share: float, count: int) -> float:
    """Binomial standard error of a share of ``count`` independent trials: ``sqrt(p (1 - p) / n)``."""
    return float((share * (1 - share) / count) ** 0.5)


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_json(path, result)
