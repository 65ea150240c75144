"""``sslfast export``: a run's trunk as a file that other libraries load."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslfast.config import save_json, to_dict
from sslfast.data import check_apart
from sslfast.files import replacing, save_tensors
from sslfast.models import LibraryTrunkConfig, ResNetConfig, trunk_name
from sslfast.weights.files import import_safetensors
from sslfast.weights.hub import check_folder, find_hub, write_hub
from sslfast.weights.load import NETWORK, Weights, read_weights

Format = Literal["torchvision", "timm", "detectron2", "safetensors", "onnx", "hub"]
SUFFIX: dict[str, str] = {
    "torchvision": ".pth",
    "timm": ".pth",
    "detectron2": ".pkl",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
}
_BY_SUFFIX: dict[str, Format] = {
    ".pth": "torchvision",
    ".pkl": "detectron2",
    ".safetensors": "safetensors",
    ".onnx": "onnx",
}


def export_trunk(
    run: Path | str,
    output: Path | str,
    *,
    format: Literal["auto", Format] = "auto",
    prefix: str | None = None,
    model: str | None = None,
    push: str | None = None,
) -> Path:
    """Write the trunk of a run (or of any file that :func:`sslfast.weights.read_weights` takes) for another library.

    ``torchvision``, ``timm``: a state dict with torchvision's names, which timm shares for ResNets, or with those of
    the library that the network is of; without a classifier (``load_state_dict(..., strict=False)``, or ``strict=True``
    for ``timm.create_model(name, num_classes=0)``). ``safetensors``: the same names. ``detectron2``: a pickle of numpy
    arrays with detectron2's names (``stem.conv1``, ``res2.0.conv1.norm``, ``shortcut``), and ``<file>.yaml`` beside it
    with what its configuration needs: ``FORMAT``, ``PIXEL_MEAN`` and ``PIXEL_STD`` (for pixels in 0..255),
    ``STRIDE_IN_1X1`` and depth. ``onnx``: a graph from RGB images in 0..1, ``[batch, 3, height, width]`` of any size
    (for networks of a library: of the size that the trunk was trained on), to ``[batch, out_features]``, normalisation
    included. ``hub``: a folder for the Hugging Face hub, which ``timm.create_model("local-dir:FOLDER",
    pretrained=True)`` loads: weights, timm's configuration and a model card.

    ``<file>.json`` beside a file holds mean, standard deviation, image size, model and origin. Everything is written
    atomically.

    Args:
        run: run directory or file of weights.
        output: file to write, or folder (hub).
        format: of the file; auto: by its suffix, .pth for torchvision, .pkl for detectron2, .safetensors, .onnx.
        prefix: which network of a file that holds several: the beginning of its entries' names.
        model: network of a file that does not say, where it is no ResNet: timm/NAME or torchvision/NAME.
        push: name of a repository on the Hugging Face hub (USER/NAME) that the folder is uploaded to; hub alone. A new
            one is private.

    Returns:
        The path written.

    Raises:
        ValueError: a format that this trunk cannot have, a suffix that is not the format's, or a folder that holds
            something else.
        ImportError: a package that the format needs is missing.
    """
    output = Path(output)
    if push is not None and format != "hub":
        raise ValueError(f"push uploads the folder of format hub, got {format}; give --format hub")
    if format == "auto":
        format = _BY_SUFFIX.get(output.suffix, "torchvision")
    upload = None if push is None else find_hub(push)
    if format != "hub" and output.suffix != SUFFIX[format]:
        others = ", ".join(_BY_SUFFIX)
        raise ValueError(f"a {format} file ends in {SUFFIX[format]}, got {str(output)!r}; others: {others}")
    remedy = "name another file as OUT"
    if format == "hub":
        check_folder(output)
    else:
        beside = [output.with_name(f"{output.name}{suffix}") for suffix in (".json", ".yaml")]
        check_apart([output, *beside], [Path(run)], remedy=remedy)
    weights = read_weights(run, prefix=prefix, model=model)
    _check_format(weights, format)
    if format == "hub":
        write_hub(weights, named_state(weights), Path(run), output, repository=push)
        if upload is not None:
            upload(output)
        return output
    with replacing(output, remedy=remedy) as temporary:
        _WRITERS[format](weights, temporary)
        _write_card(weights, output, format, remedy)
        if format == "detectron2":
            with replacing(output.with_name(output.name + ".yaml"), remedy=remedy) as settings:
                settings.write_text(detectron2_settings(weights))
    return output


def _check_format(weights: Weights, format: Format) -> None:
    """ValueError where a format cannot hold this trunk."""
    model, others = weights.model, "export as safetensors or onnx, or load the run with sslfast.load"
    if isinstance(model, ResNetConfig):
        usual = ResNetConfig(name=model.name)
        for name, value in vars(model).items():
            if format not in ("safetensors", "onnx") and name != "zero_init_residual" and value != getattr(usual, name):
                raise ValueError(f"{name}={value} is not of a network that {format} has; {others}")
    elif isinstance(model, LibraryTrunkConfig):
        if format == "detectron2" or (format in ("torchvision", "timm", "hub") and not _is_of(model, format)):
            raise ValueError(f"{trunk_name(model)} is not of a network that {format} has; {others}")
    elif format != "onnx":
        raise ValueError(
            f"a {format} file holds a ResNet, got {trunk_name(model)}; export as onnx, "
            "or load the run with sslfast.load"
        )


def _is_of(model: LibraryTrunkConfig, format: Format) -> bool:
    return model.library == ("timm" if format == "hub" else format)


def detectron2_name(name: str) -> str:
    """detectron2's name of an entry of torchvision's state dict (its ResNet: ``stem``, ``res2`` to ``res5``)."""
    first, _, rest = name.partition(".")
    words = f"res{int(first[5:]) + 1}.{rest}" if first.startswith("layer") else f"stem.{name}"
    for number in (1, 2, 3):
        words = words.replace(f".bn{number}.", f".conv{number}.norm.")
    return words.replace(".downsample.0.", ".shortcut.").replace(".downsample.1.", ".shortcut.norm.")


def detectron2_settings(weights: Weights) -> str:
    """YAML for detectron2's ``cfg.merge_from_file``: the input as these weights were trained on it. Its own defaults,
    BGR pixels that are not divided by their deviation, are those of other weights."""
    mean, std = ([round(255 * value, 4) for value in values] for values in (weights.mean, weights.std))
    depth = weights.model.name.removeprefix("resnet") if isinstance(weights.model, ResNetConfig) else ""
    return (
        f"INPUT:\n  FORMAT: RGB\nMODEL:\n  PIXEL_MEAN: {mean}\n  PIXEL_STD: {std}\n"
        f"  RESNETS:\n    DEPTH: {depth}\n    STRIDE_IN_1X1: false\n"
    )


def _write_torch(weights: Weights, path: Path) -> None:
    with path.open("wb") as file:
        save_tensors(named_state(weights), file)


def _write_safetensors(weights: Weights, path: Path) -> None:
    path.write_bytes(import_safetensors().save(named_state(weights), metadata={"format": "pt"}))


def _write_detectron2(weights: Weights, path: Path) -> None:
    arrays = {
        detectron2_name(name): value.numpy()
        for name, value in named_state(weights).items()
        if not name.endswith("num_batches_tracked")
    }
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "sslfast", "matching_heuristics": True}, file)


class _FromPixels(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.trunk = weights.build()
        network: Any = getattr(self.trunk, "network", None)
        if hasattr(network, "pos_embed") and hasattr(network, "set_input_size"):
            # Runtimes of ONNX resample positions otherwise: they are of the size of the images beforehand.
            network.set_input_size(img_size=(weights.size, weights.size))
        self.register_buffer("mean", torch.tensor(weights.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(weights.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.trunk((images - self.mean) / self.std)
        return features


def _write_onnx(weights: Weights, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"onnx files need the packages onnx and onnxscript ({error}): pip install onnx onnxscript"
        ) from None
    size, dim = weights.size, torch.export.Dim
    sides = {0: dim("batch")}
    if not isinstance(weights.model, LibraryTrunkConfig):
        sides |= {2: dim.DYNAMIC, 3: dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's exporter about torch's own code
        program = torch.onnx.export(
            _FromPixels(weights).eval(),
            (torch.rand(2, 3, size, size),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": sides},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def named_state(weights: Weights) -> dict[str, Tensor]:
    """The state dict with the names of the trunk's library, checked against the model."""
    return {name.removeprefix(NETWORK): value.contiguous() for name, value in weights.build().state_dict().items()}


def _write_card(weights: Weights, output: Path, format: Format, remedy: str) -> None:
    card = {
        "format": format,
        "model": to_dict(weights.model),
        "mean": list(weights.mean),
        "std": list(weights.std),
        "size": weights.size,
        "facts": {**weights.facts, "source": Path(weights.source).name},
    }
    save_json(output.with_name(output.name + ".json"), card, remedy=remedy)


_WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "torchvision": _write_torch,
    "timm": _write_torch,
    "detectron2": _write_detectron2,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
