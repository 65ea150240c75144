"""Loading trunk weights: from a run, a checkpoint, an exported file, a hub folder, or another project's checkpoint.

``sslfast.load(path)`` returns the network; :func:`read_weights` also returns the input normalisation and the origin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.config import differences, load_json, to_dict
from sslfast.models import (
    LibraryTrunkConfig,
    ResNetConfig,
    Trunk,
    TrunkConfig,
    build_trunk,
    first_nonfinite,
    read_trunk_config,
    trunk_name,
)
from sslfast.runs import (
    CorruptCheckpointError,
    RunDirectory,
    is_sharded,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    print_error,
)
from sslfast.views import IMAGENET_MEAN, IMAGENET_STD
from sslfast.weights.files import read_content
from sslfast.weights.layouts import Found, find_network, find_trunk

_TRUNKS = ("teacher_trunk.", "trunk.")  # the first that a run has: a teacher's, where there is one (DINO)
_HEADS = ("image_head.", "projection.")
"""Of the methods that embed whole images: PIRL and NPID; MoCo, SimCLR and BYOL."""
HUB_FILE = "model.safetensors"
_HUB_FILES = (HUB_FILE, "pytorch_model.bin")
_HUB_PARTS = tuple(f"{name}.index.json" for name in _HUB_FILES)
NETWORK = "network."
"""Before the names of a library's network in the state dict of its trunk."""
_MAX_SIZE = 1 << 16
_SMALLEST_STD, _LARGEST = 1e-4, 1e2  # of pixels in 0..1, with room
_FACTS = {"method": (str, "a text"), "recipe": (str, "a text"), "seed": (int, "a whole number")}


@dataclass(kw_only=True)
class Weights:
    """Weights of a trunk, with its configuration, input normalisation and origin."""

    model: TrunkConfig
    """Configuration of the trunk."""
    state: dict[str, Tensor]
    """Its state dict: torchvision's names without ``fc``, or a library's names behind ``network.``."""
    source: str
    """Description of the origin, for messages."""
    path: Path
    """The file that they were read from."""
    mean: Sequence[float] = IMAGENET_MEAN
    """Of the input's normalisation: ``(x / 255 - mean) / std``."""
    std: Sequence[float] = IMAGENET_STD
    size: int = 224
    """Side of the images that the trunk was trained on."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """State dict of the projection head of a contrastive method; empty where there is none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Recipe, method, step and seed, as far as known."""

    def __post_init__(self) -> None:
        """Raises ValueError where a weight is no number that a network computes with (NaN, complex, quantised, without
        values, ...): features would be numbers without meaning."""
        for entry, value in {**self.state, **self.head}.items():
            if kind := _unusable(entry, value):
                raise ValueError(f"{entry} in {self.source} is {kind}; give a file of ordinary floating weights")
        name = first_nonfinite(self.state.items())
        if name is not None:
            raise ValueError(f"values of {name} in {self.source} are NaN or infinite; use an earlier checkpoint")

    def build(self) -> Trunk:
        """The trunk with these weights, in eval mode.

        Raises:
            ValueError: they do not fit the model.
        """
        trunk = build_trunk(self.model, seed=0)
        try:
            trunk.load_state_dict(self.state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.source} does not hold a {self.model.name}: {reason}") from None
        return trunk.eval()

    def build_head(self) -> nn.Module:
        """The head that maps the trunk's features ``[B, out_features]`` to embeddings ``[B, D]``, in eval mode: linear
        layers and BatchNorm as the state dict has them, with a ReLU before every linear layer but the first.

        Raises:
            ValueError: there is none, or it is no such head.
        """
        if not self.head:
            raise ValueError(f"{self.source} has no projection head; leave out the head")
        return build_head(self.head, self.source)


def _unusable(name: str, value: Tensor) -> str:
    """What keeps an entry of a state dict from being used; empty where nothing does. Tables of indices are integers."""
    if value.is_meta:
        return "on the meta device, without values"
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        return "quantised" if value.is_quantized else "sparse or nested"
    if value.is_complex():
        return f"complex ({value.dtype})"
    is_parameter = name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var")
    return f"of integers ({value.dtype})" if is_parameter and not value.is_floating_point() else ""


def build_head(state: Mapping[str, Tensor], source: str) -> nn.Module:
    """See :meth:`Weights.build_head`."""
    layers: list[nn.Module] = []
    linear = False
    try:
        for name in sorted({name.rpartition(".")[0] for name in state}, key=lambda name: int(name or 0)):
            prefix = f"{name}." if name else ""
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.rpartition(".")[0] == name}
            weight = own["weight"]
            layer: nn.Module
            if weight.ndim == 2:
                layers += [nn.ReLU()] if linear else []
                layer, linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in own), True
            else:
                layer = nn.BatchNorm1d(weight.shape[0])
            layer.load_state_dict(own)
            layers.append(layer)
    except (KeyError, ValueError, RuntimeError):
        raise ValueError(f"the head in {source} is none of linear layers and BatchNorm; leave out the head") from None
    return nn.Sequential(*layers).eval()


def load_trunk(path: Path | str, *, prefix: str | None = None, model: str | TrunkConfig | None = None) -> Trunk:
    """The pretrained trunk behind a path, in eval mode, on the CPU.

    ``load(path)(images)``: float ``[B, 3, S, S]``, normalised as :func:`read_weights` says, to ``[B, out_features]``.

    Args:
        path: run directory (its newest good checkpoint), a checkpoint in a run directory (of a sharded one the
            trunk alone is read), a file of ``sslfast export``,
            a hub folder (``config.json`` and ``model.safetensors``), or any file of weights with a ResNet in it: of
            torch.save, safetensors or detectron2. ``docs/weights.md`` lists what has been tried.
        prefix: which network of a file that holds several: the beginning of its entries' names.
        model: network of a file that does not say, where it is no ResNet with BatchNorm: ``timm/NAME``,
            ``torchvision/NAME``, or a configuration.

    Raises:
        FileNotFoundError: there is nothing, or a run without a checkpoint.
        ValueError: the file holds no such network, several, or one that is not there.
    """
    return read_weights(path, prefix=prefix, model=model).build()


def read_weights(path: Path | str, *, prefix: str | None = None, model: str | TrunkConfig | None = None) -> Weights:
    """Weights with their model, normalisation and origin; paths and errors as :func:`load_trunk`."""
    path, wanted = Path(path), LibraryTrunkConfig(name=model) if isinstance(model, str) else model
    hub = next((path / name for name in _HUB_FILES if (path / name).is_file()), None)
    if hub is not None:
        weights = _of_hub(hub, prefix, wanted)
    elif any((path / name).is_file() for name in _HUB_PARTS):
        raise ValueError(
            f"{path} holds weights in several files: load them with their library and save their state dict as one "
            f"{HUB_FILE}"
        )
    elif is_sharded(path):
        weights = _of_run(path.absolute().parent.parent, path)
    elif path.is_dir():
        weights = _of_run(path)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a run directory or a file of weights")
    elif path in list_checkpoints(path.parent) and RunDirectory(path.absolute().parent.parent).config.exists():
        weights = _of_run(path.absolute().parent.parent, path)
    else:
        weights = _of_file(path, prefix, wanted)
    if isinstance(wanted, LibraryTrunkConfig) and weights.model != wanted:
        raise ValueError(
            f"{weights.source} is of {trunk_name(weights.model)}{_options(weights.model)}, not of {trunk_name(wanted)}"
            f"{_options(wanted)}; leave out the model, or name that one"
        )
    return weights


def _options(config: TrunkConfig) -> str:
    return f" with options {config.options}" if isinstance(config, LibraryTrunkConfig) and config.options else ""


def _of_file(path: Path, prefix: str | None, model: TrunkConfig | None) -> Weights:
    card = path.with_name(path.name + ".json")
    known = load_json(card) if card.exists() else {}
    stated = known.get("model", {})
    if not isinstance(stated, dict):
        raise ValueError(f"{card}: model must be a table, got {str(stated)[:100]}; restore the file")
    if model is None and stated.get("norm") == "layer":
        model = ResNetConfig(norm="layer")
    if "/" in str(stated.get("name")):
        try:
            model = read_trunk_config(stated)
        except ValueError as error:
            raise ValueError(f"{card}: {error}; restore the file") from None
    options = _checked_input(known, card)
    if "facts" in known:
        options["facts"] = _checked_facts(known["facts"], card)
    weights = _of_content(path, read_content(path), prefix, model, options)
    for name, value in to_dict(weights.model).items():
        if name != "zero_init_residual" and stated.get(name, value) != value:  # it leaves no trace in trained weights
            raise ValueError(
                f"{card}: model.{name} is {str(stated[name])[:100]} and the weights are of {value}; "
                "restore the file that was exported with them, or delete it"
            )
    return weights


def _of_content(
    path: Path, content: Any, prefix: str | None, model: TrunkConfig | None, options: dict[str, Any]
) -> Weights:
    """Of a file's content, by the names of a library's network or of a ResNet."""
    if not isinstance(model, LibraryTrunkConfig):
        has_layer_norm = isinstance(model, ResNetConfig) and model.norm == "layer"
        return _of_state(path, find_trunk(str(path), content, prefix), options, has_layer_norm=has_layer_norm)
    fresh = build_trunk(model, seed=0).state_dict()
    wanted = {name.removeprefix(NETWORK): value for name, value in fresh.items()}
    found = find_network(str(path), content, model.name, wanted, prefix)
    state = {f"{NETWORK}{name}": found.state.get(name, torch.zeros_like(value)) for name, value in wanted.items()}
    return Weights(model=model, state=state, source=f"{path} ({found})", path=path, **options)


def _of_state(path: Path, found: Found, options: dict[str, Any], *, has_layer_norm: bool) -> Weights:
    state = dict(found.state)
    if "bn1.running_mean" not in state and not has_layer_norm:
        raise ValueError(
            f"{path} ({found}) has no running statistics of BatchNorm (bn1.running_mean, ...), without which its "
            "features mean nothing: save the whole state dict, buffers too; of a ResNet with norm layer, give the file "
            "that was exported with its card, or in Python model=ResNetConfig(norm='layer')"
        )
    for name in found.state:  # old versions of torch, and detectron2, have no count beside the running statistics
        if name.endswith("running_mean"):
            state.setdefault(f"{name.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    model = _recognise(path, state)
    return Weights(model=model, state=state, head=found.head, source=f"{path} ({found})", path=path, **options)


def _of_hub(path: Path, prefix: str | None, model: TrunkConfig | None) -> Weights:
    """Of the file in a folder as the Hugging Face hub has it; timm's and transformers' configurations state the
    normalisation, and timm's the network."""
    known: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        where = path.with_name(name)
        content = load_json(where) if where.is_file() else {}
        model = model or _timm_network(content, where)
        own = content.get("pretrained_cfg", content) if isinstance(content, dict) else {}
        if not isinstance(own, dict):
            raise ValueError(f"{where}: pretrained_cfg must be a table, got {str(own)[:100]}; restore the file")
        size = own.get("input_size")
        if isinstance(size, list) and len(size) == 3:
            own = {"size": size[-1], **own}
        values = {"mean": own.get("mean", own.get("image_mean")), "std": own.get("std", own.get("image_std"))}
        if type(own.get("size")) is int:
            values["size"] = own["size"]
        known |= _checked_input({key: value for key, value in values.items() if value is not None}, where)
    return _of_content(path, read_content(path), prefix, model, known)


def _timm_network(content: dict[str, Any], where: Path) -> TrunkConfig | None:
    """The network of a configuration of timm; None for one of another library, and for the ResNets of sslfast."""
    name, options = content.get("architecture"), content.get("model_args", {})
    if not isinstance(name, str) or (name in ("resnet18", "resnet34", "resnet50") and not options):
        return None
    if isinstance(options, dict):  # sides of a square
        options = {
            key: value[0] if isinstance(value, list) and len({*map(str, value)}) == 1 else value
            for key, value in options.items()
        }
    try:
        return read_trunk_config({"name": f"timm/{name}", "options": options})
    except ValueError as error:
        raise ValueError(f"{where}: {error}; restore the file") from None


def _of_run(path: Path, chosen: Path | None = None) -> Weights:
    """Of a checkpoint of a run; None: the newest good one.

    The configuration is the checkpoint's, which its checksum protects: where ``config.json`` says something else, or
    nothing, a line on standard error says so.
    """
    directory = RunDirectory(path)
    if chosen is None:
        found = load_latest(directory.checkpoints, check=_check_trunk)
    else:
        found = chosen, load_checkpoint(chosen)
    if found is None:
        load_json(directory.config)  # raises where this is no run at all
        raise FileNotFoundError(f"{directory.path} holds no checkpoint yet; let the run reach its first one")
    checkpoint, state = found
    own = state.get("config")
    if own is None:  # written by a program that kept it in the file alone
        where = directory.config
        used = _used(load_json(where), where)
    else:
        where = checkpoint
        used = _used(own, where)
        _name_differences(used, directory.config, checkpoint)
    weights = state.get("method")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{checkpoint} holds no state of a method; use another checkpoint")
    try:
        model = read_trunk_config(used["model"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}; restore the file") from None
    facts = {name: used[name] for name in ("method", "recipe", "seed")}
    recorded = {name: (own or {}).get(name) for name in ("epochs", "batch_size")}
    recorded["data_digest"] = state.get("manifest_digest")
    return Weights(
        model=model,
        state=_trunk_of(weights),
        head=next((head for name in _HEADS if (head := _part_of(weights, name))), {}),
        source=str(checkpoint),
        path=checkpoint,
        facts={
            **_checked_facts(facts, where),
            "step": int(state["step"]),
            **{name: value for name, value in recorded.items() if isinstance(value, int | str)},
        },
        **_checked_input(used, where),
    )


def _trunk_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((prefix for prefix in _TRUNKS if any(name.startswith(prefix) for name in weights)), _TRUNKS[-1])
    return _part_of(weights, prefix)


def _part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _check_trunk(path: Path, state: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpointError where the trunk in a checkpoint of a run has a NaN or an infinite value."""
    weights = state.get("method")
    name = first_nonfinite(_trunk_of(weights).items()) if isinstance(weights, Mapping) else None
    if name is not None:
        raise CorruptCheckpointError(f"values of trunk.{name} in {path} are NaN or infinite")


def _used(config: Any, where: Path) -> dict[str, Any]:
    """What an encoder needs of a run's configuration."""
    try:
        view, method = config["method"]["image_view"], config["method"]
        return {
            "model": config["model"],
            "method": method.get("name"),
            "recipe": config.get("recipe"),
            "seed": config["seed"],
            "size": view["crop"]["size"],
            "mean": view["augment"]["mean"],
            "std": view["augment"]["std"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} lacks {error}; it is not the configuration of a run") from None


def _name_differences(used: dict[str, Any], path: Path, checkpoint: Path) -> None:
    try:
        found = differences(used, _used(load_json(path), path))
    except (FileNotFoundError, ValueError) as error:
        return print_error(f"{error}; the configuration in {checkpoint.name} is used")
    changed = "; ".join(f"{name} is {now!r} there and {own!r} in {checkpoint.name}" for name, own, now in found)
    if changed:
        print_error(f"{path} is not what was trained: {changed}; the checkpoint's is used")


def _checked_input(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """``mean``, ``std`` and ``size`` as far as ``values`` has them. ValueError for what no input can have."""
    for name in ("mean", "std"):
        numbers = values.get(name, (1.0, 1.0, 1.0))
        is_list = isinstance(numbers, list | tuple) and len(numbers) == 3
        if not is_list or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"{where}: {name} must be three numbers, got {str(numbers)[:100]}; restore the file")
        if name == "std" and min(numbers) < _SMALLEST_STD:
            raise ValueError(f"{where}: std must be above 0, got {str(numbers)[:100]}; restore the file")
        if max(map(abs, numbers)) > _LARGEST:
            raise ValueError(f"{where}: {name} must be at most {_LARGEST}, got {str(numbers)[:100]}; restore the file")
    size = values.get("size", 1)
    if type(size) is not int or not 1 <= size <= _MAX_SIZE:
        raise ValueError(f"{where}: size must be in [1, {_MAX_SIZE}], got {str(size)[:100]}; restore the file")
    return {name: values[name] for name in ("mean", "std", "size") if name in values}


def _checked_facts(facts: Any, where: Path) -> dict[str, Any]:
    """Recipe, method, seed and whatever else is known. ValueError for values that they cannot have."""
    if not isinstance(facts, dict):
        raise ValueError(f"{where}: facts must be a table, got {str(facts)[:100]}; restore the file")
    for name, (kind, words) in _FACTS.items():
        value = facts.get(name)
        if value is not None and (type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63)):
            raise ValueError(f"{where}: {name} must be {words}, got {str(value)[:100]}; restore the file")
    return facts


def _recognise(path: Path, state: Mapping[str, Tensor]) -> ResNetConfig:
    """The ResNet with these layers; a wrong kernel shows when the weights are loaded."""
    blocks = tuple(len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in range(1, 5))
    names = {
        ((2, 2, 2, 2), False): "resnet18",
        ((3, 4, 6, 3), False): "resnet34",
        ((3, 4, 6, 3), True): "resnet50",
    }
    kind = (blocks, "layer1.0.conv3.weight" in state)
    if kind not in names:
        raise ValueError(
            f"{path} holds a ResNet with {blocks} blocks{' of three convolutions' if kind[1] else ''}; "
            f"known: {', '.join(names.values())}"
        )
    stem = "small" if state["conv1.weight"].shape[-1] == 3 else "imagenet"
    norm = "batch" if "bn1.running_mean" in state else "layer"
    channels, inner = state["conv1.weight"].shape[0], state["layer1.0.conv1.weight"].shape[0]
    second = state.get("layer1.0.conv2.weight")
    if second is not None and second.ndim == 4 and second.shape[1] != inner and inner % second.shape[1] == 0:
        raise ValueError(
            f"{path} holds a ResNeXt ({inner // second.shape[1]} groups of {second.shape[1]} channels), which is not "
            f"among {', '.join(names.values())}; load it with torchvision or timm"
        )
    if inner != channels:
        raise ValueError(
            f"{path} holds a Wide-ResNet ({inner} channels inside the first block and {channels} before it), which is "
            f"not among {', '.join(names.values())}, whose width scales every layer; load it with torchvision or timm"
        )
    return ResNetConfig(
        name=names[kind],  # type: ignore[arg-type]
        stem=stem,  # type: ignore[arg-type]
        norm=norm,  # type: ignore[arg-type]
        width=channels / 64,
        input="sobel" if state["conv1.weight"].shape[1] == 2 else "rgb",
    )
