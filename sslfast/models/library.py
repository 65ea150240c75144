"""Networks of torchvision and timm as trunks, by name, without their classifier."""

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sslfast.models.trunk import Trunk

Options = dict[str, bool | int | float | str]
STAGE_NAMES = ("conv1", "res2", "res3", "res4", "res5")
"""Names of the maps of a trunk, the deepest last."""
_PACKAGES = {"torchvision": "sslfast[train]", "timm": "sslfast[timm]"}
_RESERVED = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights", "progress",
}  # fmt: skip
_FIXED = {"num_classes", "in_chans", "features_only", "global_pool_type", "scriptable", "exportable", "no_jit"}
_RANDOM = ("drop", "stochastic_depth")  # words in the names of rates of random layers
_ANY_SIZE: tuple[Options, ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_NOT_THE_BODY = {"avgpool", "flatten", "fc", "classifier", "head", "heads", "norm", "permute", "dropout"}


@dataclass(kw_only=True)
class LibraryTrunkConfig:
    """A network of torchvision or timm, in place of a ResNet of sslfast's own."""

    name: str
    """torchvision/NAME or timm/NAME, as torchvision.models.list_models() and timm.list_models() name them."""
    options: Options = field(default_factory=dict)
    """Keyword arguments of the network's function, such as img_size 96 or patch_size 8."""

    def __post_init__(self) -> None:
        library, slash, network = self.name.partition("/")
        if library not in _PACKAGES or not slash or not network:
            raise ValueError(f"model.name must be torchvision/NAME or timm/NAME, got {self.name!r}")
        for name, value in self.options.items():
            if name in _RESERVED:
                raise ValueError(f"model.options: {name} is not a property of the network; give weights with --init")
            if name in _FIXED:
                raise ValueError(
                    f"model.options: {name} is fixed, since a trunk maps RGB images to features; remove it"
                )
            if value and any(word in name for word in _RANDOM):
                raise ValueError(
                    f"model.options: {name} must be 0, got {value}: a trunk draws no random numbers, so that a resumed "
                    "run is bit-equal; remove it"
                )

    @property
    def library(self) -> str:
        """torchvision or timm."""
        return self.name.partition("/")[0]

    @property
    def network(self) -> str:
        """The name in the library."""
        return self.name.partition("/")[2]

    def build(self) -> "LibraryTrunk":
        """The network, its weights drawn from torch's global generator; see :func:`sslfast.models.build_trunk`.

        Raises:
            ImportError: the library is missing.
            ValueError: it has no such network, or the network no such option.
        """
        library = import_library(self.library)
        known = network_names(self.library)
        if self.network.partition(".")[0] not in known:
            raise ValueError(f"model.name={self.name}: {self.library} has no such network; {_near(self.name, known)}")
        try:
            return _of_timm(self, library) if self.library == "timm" else _of_torchvision(self, library)
        except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
            given = ", ".join(f"{name}={value}" for name, value in self.options.items()) or "no options"
            raise ValueError(
                f"model.name={self.name} cannot be built with {given}: {_first_line(error)}; change model.options"
            ) from None


def import_library(name: str) -> Any:
    """torchvision or timm; ImportError says how to get it."""
    try:
        importlib.import_module(f"{name}.models")
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        raise ImportError(
            f"model.name={name}/... needs the package {name}, which does not import beside torch {torch.__version__}: "
            f"{_first_line(error)}; pip install '{_PACKAGES[name]}'"
        ) from None


def network_names(library: str) -> list[str]:
    """Networks for images that a library has; empty where it is not installed."""
    try:
        package = import_library(library)
    except ImportError:
        return []
    return list(package.list_models() if library == "timm" else package.models.list_models(module=package.models))


def near_names(name: str) -> list[str]:
    """Names of torchvision's and timm's networks nearest to ``name``, with their library."""
    plain = name.rpartition("/")[2].partition(".")[0]
    exact = [f"{library}/{plain}" for library in _PACKAGES if plain in network_names(library)]
    return exact or [
        f"{library}/{found}"
        for library in _PACKAGES
        for found in difflib.get_close_matches(plain, network_names(library), n=2, cutoff=0.6)
    ]


def _near(name: str, known: Iterable[str]) -> str:
    near = near_names(name)
    if near:
        return f"did you mean {' or '.join(near[:4])}?"
    library = name.partition("/")[0]
    what = "timm.list_models()" if library == "timm" else "torchvision.models.list_models(module=torchvision.models)"
    return f"all {len(list(known)):,} are listed by python -c 'import {library}; print(*{what})'"


def _of_timm(config: LibraryTrunkConfig, timm: Any) -> "LibraryTrunk":
    fixed = getattr(timm.models.get_pretrained_cfg(config.network), "fixed_input_size", False)
    for extra in _ANY_SIZE if fixed else ({},):  # the first of them that the network knows
        options = {**extra, **config.options}
        try:
            net = timm.create_model(config.network, pretrained=False, num_classes=0, **options)
            break
        except TypeError:
            if not extra:
                raise
    features = getattr(net, "head_hidden_size", None) or net.num_features
    return LibraryTrunk(config.name, net, features, options)


def _of_torchvision(config: LibraryTrunkConfig, torchvision: Any) -> "LibraryTrunk":
    options: dict[str, Any] = dict(config.options)
    if config.network in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, **options}
    net = torchvision.models.get_model(config.network, weights=None, **options)
    name = next(name for name in ("fc", "classifier", "head", "heads") if hasattr(net, name))
    classifier = getattr(net, name)
    layers = [classifier] if isinstance(classifier, nn.Linear) else list(classifier)
    at = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
    first, kept = layers[at], [layer for layer in layers[:at] if not isinstance(layer, nn.Dropout)]
    if isinstance(first, nn.Conv2d):  # squeezenet classifies every cell
        features, kept = first.in_channels, [nn.AdaptiveAvgPool2d(1)]
    else:
        features = first.in_features
        side = getattr(getattr(net, "avgpool", None), "output_size", 1)
        if isinstance(side, tuple):  # alexnet and vgg classify all cells of a grid
            features //= side[0] * side[1]
            net.avgpool = nn.AdaptiveAvgPool2d(1) if side != (1, 1) else net.avgpool
    setattr(net, name, nn.Sequential(*kept))
    return LibraryTrunk(config.name, net, features, options)


class LibraryTrunk(Trunk):
    """A network of torchvision or timm, called as it is: ``[B, 3, H, W]`` to its pooled features ``[B, out_features]``.

    Rates of dropout and stochastic depth are 0: the interface of a trunk has no random numbers. ``network`` has the
    library's names of parameters, ``arguments`` are those of its function.

    Raises:
        ValueError: at the first images of a size that the network does not take.
    """

    def __init__(self, name: str, network: nn.Module, out_features: int, arguments: Options) -> None:
        super().__init__()
        self.arguments = arguments
        self.name, self.network, self.out_features = name, network, out_features
        self._known: set[tuple[int, int]] = set()
        self.has_random_layers = False
        for module in network.modules():
            for rate in ("p", "drop_prob", "dropout", "drop_rate", "prob"):
                value = getattr(module, rate, None)
                if isinstance(value, float) and value > 0 and ("drop" in rate or _is_random(module)):
                    setattr(module, rate, 0.0)
                    self.has_random_layers = True

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        if torch.compiler.is_compiling() or size in self._known:
            return cast(Tensor, self.network(images)).flatten(1)
        try:
            features = cast(Tensor, self.network(images)).flatten(1)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(self._no_size(size, error)) from None
        self._known.add(size)
        return features

    def stages(self, images: Tensor) -> list[Tensor]:
        """The last map of every resolution ``[B, C, h, w]``, from shallow to deep, at most five.

        Raises:
            ValueError: images of a size that the network does not take, or a network without maps.
        """
        try:
            maps = self._timm_maps(images) if self.name.startswith("timm/") else list(self._torchvision_maps(images))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(self._no_size((images.shape[-2], images.shape[-1]), error)) from None
        last = {one.shape[-2:]: one for one in maps}
        return list(last.values())[-len(STAGE_NAMES) :]

    def _no_size(self, size: tuple[int, int], error: Exception) -> str:
        return f"{self.name} does not take images of {size[0]} x {size[1]} px ({_first_line(error)})"

    def _timm_maps(self, images: Tensor) -> list[Tensor]:
        intermediates = getattr(self.network, "forward_intermediates", None)
        if intermediates is None:
            raise ValueError(f"{self.name} has no maps of its stages in timm")
        return list(cast(Any, intermediates)(images, intermediates_only=True))

    def _torchvision_maps(self, images: Tensor) -> Iterator[Tensor]:
        network: Any = self.network
        if hasattr(network, "conv_proj"):  # a ViT: class token, then the cells
            tokens = network._process_input(images)
            tokens = network.encoder(torch.cat((network.class_token.expand(len(tokens), -1, -1), tokens), dim=1))[:, 1:]
            side = images.shape[-1] // network.patch_size
            yield tokens.transpose(1, 2).unflatten(2, (-1, side))
            return
        if getattr(network, "transform_input", False):
            images = network._transform_input(images)
        channels_last = type(network).__name__ == "SwinTransformer"
        body = next((getattr(network, name) for name in ("features", "layers") if hasattr(network, name)), None)
        for module in _in_order(network if body is None else body):
            images = module(images)
            if images.ndim == 4:
                yield images.permute(0, 3, 1, 2) if channels_last else images


def _in_order(body: nn.Module) -> Iterator[nn.Module]:
    """Modules of a network that run one after the other, up to its pooling."""
    for name, child in body.named_children():
        if name in ("blocks", "trunk_output"):
            yield from child.children()
        elif name not in _NOT_THE_BODY and not name.lower().startswith("aux"):
            yield child


def _is_random(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))


def check_sizes(trunk: LibraryTrunk, sizes: Mapping[str, int]) -> None:
    """Check that a trunk takes every size that a run shows it, by a forward pass on the CPU each, and that none of them
    draws a random number. State stays as it is.

    Args:
        trunk: on the CPU.
        sizes: sides in pixels of the images, by the name of the view.

    Raises:
        ValueError: names the view, its size and the remedy.
    """
    buffers = dict(trunk.named_buffers())
    was_training = trunk.training
    for size in sorted(set(sizes.values())):
        before = torch.get_rng_state()
        try:
            copies = {name: value.clone() for name, value in buffers.items()}
            with torch.no_grad():
                features = torch.func.functional_call(trunk.train(), copies, torch.zeros(2, 3, size, size))
        except ValueError as error:
            option = "image_size" if trunk.name.startswith("torchvision/") else "img_size"
            remedy = f"choose another crop.size or patch_size, or set --model.options {option} {size}"
            if "divisible" in str(error):
                remedy = "choose another crop.size or patch_size"
            elif len(set(sizes.values())) > 1:
                remedy = "give all views one size (crop.size, patch_size), or choose a network that takes these"
            raise ValueError(f"{error}, the size of {size_words(sizes)[size]}: {remedy}") from None
        finally:
            trunk.train(was_training)
        if not torch.equal(torch.get_rng_state(), before):
            torch.set_rng_state(before)
            raise ValueError(
                f"{trunk.name} draws random numbers in its forward pass, so that a resumed run would not be bit-equal; "
                "choose another network"
            )
        if features.shape != (2, trunk.out_features):
            raise ValueError(
                f"{trunk.name} gives {list(features.shape)} for 2 images, expected [2, {trunk.out_features}]; choose "
                "another network"
            )


def size_words(sizes: Mapping[str, int]) -> dict[int, str]:
    """Names of the views of every size."""
    return {side: ", ".join(name for name in sizes if sizes[name] == side) for side in dict.fromkeys(sizes.values())}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
