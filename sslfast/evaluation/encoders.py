"""Encoders: maps from uint8 images ``[B, 3, S, S]`` to float32 features ``[B, D]``.

Evaluations of frozen features compare three: the trained trunk of a run, the same trunk before training, and the raw
pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from sslfast.config import decode, load_json, to_dict
from sslfast.data import Manifest, OnBadImage
from sslfast.evaluation.cache import FeatureCache, weights_digest
from sslfast.evaluation.extract import Features, ImageReader, extract
from sslfast.evaluation.layers import check_layers, pooled_layers
from sslfast.evaluation.preprocessing import Preprocessing
from sslfast.loaders import ReaderName
from sslfast.methods import METHODS, BaseConfig, MethodConfig, PatchGrid, lightness, read_head
from sslfast.models import build_trunk
from sslfast.runs import RunDirectory, load_checkpoint
from sslfast.views import IMAGENET_MEAN, IMAGENET_STD
from sslfast.weights import read_weights

TRAINED, UNTRAINED, RAW_PIXELS = "trained", "untrained", "raw pixels"
PatchChoice = Literal["auto", "on", "off"]


class Encoder(Protocol):
    """Maps images to features."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, S, S]`` -> float32 ``[B, D]`` on the same device."""

    def to(self, device: torch.device) -> "Encoder":
        """The encoder on a device."""

    def identity(self) -> dict[str, Any]:
        """What the features depend on besides the images, as JSON values."""


class TrunkEncoder:
    """A trunk in eval mode, with the input normalisation that it was trained with."""

    def __init__(
        self,
        trunk: nn.Module,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        colours: Literal["rgb", "lightness"] = "rgb",
    ) -> None:
        self.trunk = trunk.eval()
        self.colours = colours
        self.statistics = {"mean": list(mean), "std": list(std), "colours": colours}
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        self.layout = torch.contiguous_format

    def to(self, device: torch.device) -> "TrunkEncoder":
        self.trunk, self.mean, self.std = self.trunk.to(device), self.mean.to(device), self.std.to(device)
        # As in training: channels_last is the fast layout of tensor cores and half as fast on CPUs.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.trunk.to(memory_format=self.layout)  # type: ignore[call-overload]
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """Network input ``[B, 3, S, S]`` float32 of uint8 images."""
        rgb = images.float() / 255
        pixels = ((lightness(rgb) if self.colours == "lightness" else rgb) - self.mean) / self.std
        return pixels.contiguous(memory_format=self.layout)

    def __call__(self, images: Tensor) -> Tensor:
        return self.features(self.trunk, images).float()

    def features(self, trunk: nn.Module, images: Tensor) -> Tensor:
        """``[B, D]`` of uint8 images, by this trunk or a copy of it."""
        return cast(Tensor, trunk(self.prepare(images)))

    def layers(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Pooled maps ``[B, C, g, g]`` of uint8 images, by layer."""
        return pooled_layers(self.trunk, self.prepare(images), layers)

    def identity(self) -> dict[str, Any]:
        """See :class:`Encoder`."""
        return {"encoder": type(self.trunk).__name__, "weights": weights_digest(self.trunk), **self.statistics}


class PatchEncoder(TrunkEncoder):
    """A trunk that sees the patches of an image, each by itself; features and pooled maps are the mean over patches."""

    def __init__(self, trunk: nn.Module, patches: PatchGrid, **preprocessing: Any) -> None:
        super().__init__(trunk, **preprocessing)
        self.patches = patches

    def cut(self, images: Tensor) -> Tensor:
        """Network input ``[B * P, 3, p, p]`` of uint8 images."""
        return self.patches.cut(self.prepare(images)).flatten(0, 1).contiguous(memory_format=self.layout)

    def features(self, trunk: nn.Module, images: Tensor) -> Tensor:
        return cast(Tensor, trunk(self.cut(images))).unflatten(0, (len(images), -1)).mean(1)

    def layers(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        maps = pooled_layers(self.trunk, self.cut(images), layers)
        return {name: value.unflatten(0, (len(images), -1)).mean(1) for name, value in maps.items()}

    def identity(self) -> dict[str, Any]:
        """See :class:`Encoder`."""
        return {**super().identity(), "patches": self.patches.identity()}


def encoder_of(trunk: nn.Module, patches: PatchGrid | None, **preprocessing: Any) -> TrunkEncoder:
    """Of whole images, or of patches."""
    return TrunkEncoder(trunk, **preprocessing) if patches is None else PatchEncoder(trunk, patches, **preprocessing)


class HeadEncoder(TrunkEncoder):
    """A trunk and the projection head that it was trained with; ``unit``: the unit vectors, as the method compares
    them."""

    def __init__(self, trunk: nn.Module, head: nn.Module, *, unit: bool = True, **preprocessing: Any) -> None:
        super().__init__(trunk, **preprocessing)
        self.head, self.unit = head.eval(), unit

    def to(self, device: torch.device) -> "HeadEncoder":
        super().to(device)
        self.head = self.head.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        found = self.head(super().__call__(images)).float()
        return normalize(found, dim=1) if self.unit else found

    def identity(self) -> dict[str, Any]:
        """See :class:`Encoder`."""
        return {**super().identity(), "head": weights_digest(self.head), **({} if self.unit else {"unit": False})}


class RawPixels:
    """The image itself: resized to ``side`` x ``side`` (antialiased bilinear), normalised with ImageNet's mean and
    standard deviation per channel, flattened to ``3 * side**2`` columns.

    The mean is subtracted because the cosine of all-positive vectors measures little but brightness: without this the
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

    def identity(self) -> dict[str, Any]:
        """See :class:`Encoder`."""
        return {"encoder": "raw pixels", "side": self.side}


@dataclass(kw_only=True)
class RunEncoders:
    """A trained trunk and its baselines."""

    encoders: dict[str, Encoder]
    """``trained``, ``untrained``, ``raw pixels``."""
    size: int
    """Side of the images that the trunk was trained on."""
    checkpoint: Path
    """File of the trained weights."""
    step: int | None
    """Training steps of these weights; None if unknown."""
    facts: dict[str, Any]
    """Recipe, model and seed; None if unknown."""


def run_head(checkpoint: Path) -> nn.Module | None:
    """The projection head of the method in a run's checkpoint, in eval mode; None for another file of weights."""
    if not RunDirectory(checkpoint.parent.parent).config.exists():
        return None
    state = load_checkpoint(checkpoint)
    return read_head(state["config"], state["method"]).eval() if "config" in state and "method" in state else None


def chosen_patches(name: str, checkpoint: Path, patches: PatchChoice) -> PatchGrid | None:
    """The patches of a method that are evaluated; None: whole images.

    Args:
        name: of the method.
        checkpoint: the weights; of a run, its configuration counts, else the method's default one.
        patches: see :class:`~sslfast.evaluation.config.ImageConfig`.
    """
    if patches == "off" or METHODS[name].evaluation_patches is BaseConfig.evaluation_patches:
        return None
    card = RunDirectory(checkpoint.parent.parent).config
    stated = (
        (load_checkpoint(checkpoint).get("config") or load_json(card))["method"] if card.exists() else {"name": name}
    )
    settings: BaseConfig = decode(MethodConfig, stated, where="method")
    found = settings.evaluation_patches()
    return found if found is not None and (patches == "on" or found.by_default) else None


def load_run(
    run: Path | str,
    *,
    head: bool = False,
    unit_head: bool = True,
    prefix: str | None = None,
    patches: PatchChoice = "auto",
) -> RunEncoders:
    """The encoder of a run directory's newest intact checkpoint, or of any file that ``read_weights`` reads.

    With ``head`` the trained encoder ends with the method's projection head, whose output it divides by its norm
    (``unit_head``). ``prefix``: see :func:`sslfast.weights.load_trunk`. ``patches``: whether the trunk sees whole
    images or the method's patches, whose features are averaged.

    The untrained encoder is the same trunk as initialised by the same run (same seed; 0 if the file states none), in
    eval mode: its BatchNorm layers hold mean 0 and variance 1, so they are the identity.

    Raises:
        FileNotFoundError: the path does not exist, or the run has no checkpoint.
        ValueError: the configuration or the weights do not fit, or the weights are not finite.
    """
    weights = read_weights(run, prefix=prefix)
    known, seed = weights.facts, weights.facts.get("seed")
    name = known.get("method")
    if name is not None and name not in METHODS:
        raise ValueError(
            f"{run} was trained with method {name!r}, which is not registered: import the module that registers it, on "
            "the command line with --plugin MODULE, or install its package"
        )
    method = None if name is None else METHODS[name]
    preprocessing: dict[str, Any] = {
        "mean": weights.mean,
        "std": weights.std,
        "colours": "rgb" if method is None else method.trunk_input,
    }
    grid = None if name is None or head else chosen_patches(name, weights.path, patches)
    if patches == "on" and grid is None:
        raise ValueError(
            f"patches on: {run} has no patches to average: its "
            + (f"method {name} trains on whole images" if name and not head else "head, or its origin, knows none")
            + "; take patches auto"
        )
    trunk = weights.build()
    encoders: dict[str, Encoder] = {
        TRAINED: HeadEncoder(trunk, run_head(weights.path) or weights.build_head(), unit=unit_head, **preprocessing)
        if head
        else encoder_of(trunk, grid, **preprocessing),
        UNTRAINED: encoder_of(build_trunk(weights.model, seed=seed or 0), grid, **preprocessing),
        RAW_PIXELS: RawPixels(),
    }
    facts = {"recipe": known.get("recipe"), "model": to_dict(weights.model), "seed": seed}
    if grid is not None:
        facts["patches"] = str(grid)
    return RunEncoders(
        encoders=encoders,
        size=weights.size if grid is None else grid.size,
        checkpoint=weights.path,
        step=known.get("step"),
        facts=facts,
    )


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


def extract_all(
    encoders: Mapping[str, Encoder],
    manifest: Manifest,
    *,
    size: int,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    on_bad_image: OnBadImage = "error",
    preprocessing: Preprocessing = "centre-crop",
    loader: ReaderName = "auto",
    cache: FeatureCache | None = None,
) -> Features:
    """Features of several encoders; every image is read once.

    Args:
        encoders: by name.
        manifest: the images.
        size: side of the images that the encoders get.
        batch_size: images per forward pass; changes no feature beyond float rounding.
        device: where the encoders run, in float32.
        workers: decoding threads; 0: decode in the caller's thread.
        on_bad_image: ``error``: ValueError naming the file. ``skip``: leave it out of ``rows``.
        preprocessing: what is seen of an image.
        loader: what decodes and resizes.
        cache: of the features; None: none.
    """
    reader = ImageReader(manifest, size, batch_size, workers, on_bad_image, preprocessing, loader)
    return extract_images(encoders, reader, device=torch.device(device), cache=cache)


def extract_images(
    encoders: Mapping[str, Encoder], reader: ImageReader, *, device: torch.device, cache: FeatureCache | None = None
) -> Features:
    """:func:`extract_all` of a reader."""
    moved = {name: encoder.to(device) for name, encoder in encoders.items()}
    return extract(
        lambda names, images: {name: moved[name](images) for name in names},
        {name: None if cache is None else encoder.identity() for name, encoder in moved.items()},
        reader,
        device=device,
        cache=cache or FeatureCache(None),
    )


def extract_layers(
    encoders: Mapping[str, TrunkEncoder],
    layers: Sequence[str],
    reader: ImageReader,
    *,
    device: torch.device,
    cache: FeatureCache,
) -> Features:
    """Pooled layers (:mod:`sslfast.evaluation.layers`) of several trunks, named ``encoder/layer``, flattened."""
    check_layers(layers)
    moved = {name: encoder.to(device) for name, encoder in encoders.items()}

    def compute(names: list[str], images: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, encoder in moved.items():
            wanted = [layer for layer in layers if f"{name}/{layer}" in names]
            if wanted:
                pooled = encoder.layers(images, wanted)
                found.update({f"{name}/{layer}": value for layer, value in pooled.items()})
        return found

    identities = {
        f"{name}/{layer}": {**encoder.identity(), "layer": layer} for name, encoder in moved.items() for layer in layers
    }
    return extract(compute, identities, reader, device=device, cache=cache)


def chosen_encoders(loaded: "RunEncoders", names: Sequence[str]) -> dict[str, Encoder]:
    """The encoders of a run that are named; all of them where none is."""
    for name in names:
        if name not in loaded.encoders:
            raise ValueError(f"encoders must be some of {', '.join(loaded.encoders)}, got {name!r}")
    return {name: loaded.encoders[name] for name in names or loaded.encoders}


def trunk_encoders(loaded: "RunEncoders", names: Sequence[str]) -> dict[str, TrunkEncoder]:
    """The encoders of a run that have layers: ``trained`` and ``untrained``, as named."""
    found: dict[str, TrunkEncoder] = {}
    for name in names:
        encoder = loaded.encoders.get(name)
        if not isinstance(encoder, TrunkEncoder):
            raise ValueError(f"encoders must be {TRAINED} and {UNTRAINED} or one of them, got {name!r}")
        found[name] = encoder
    if not found:
        raise ValueError(f"encoders is empty; give {TRAINED}, {UNTRAINED} or both")
    return found
