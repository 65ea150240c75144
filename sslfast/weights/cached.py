"""timm's pretrained weights, where they are already on this machine: nothing is downloaded."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from sslfast.config import nearest
from sslfast.models import LibraryTrunk, LibraryTrunkConfig, import_library

_FILES = ("model.safetensors", "pytorch_model.bin")


def read_cached(config: LibraryTrunkConfig) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file of pretrained weights of a network of timm in the caches of Hugging Face or torch.

    Args:
        config: name, with or without a tag (``timm/vit_small_patch16_224.dino``), and options; timm adapts the weights
            to them (positions to another ``img_size``).

    Returns:
        File, state dict of the trunk, ``mean`` and ``std`` of its input.

    Raises:
        ValueError: no such network or tag, or weights that do not fit the options.
        FileNotFoundError: they are not on this machine; says how to get them.
    """
    timm = import_library("timm")
    network, _, tag = config.network.partition(".")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{network}.*")]
    if not tags and network in timm.list_models():
        raise ValueError(f"init={config.name}: timm has no pretrained weights of {network}; give a file of weights")
    if tag and tag not in tags:
        raise ValueError(f"init={config.name}: timm has no weights {tag!r} of {network}; {nearest(tag, tags)}")
    trunk = config.build()
    assert isinstance(trunk, LibraryTrunk)
    known = timm.models.get_pretrained_cfg(config.network)
    path = _find(known, config.name)
    overlay = {"file": str(path), "custom_load": known.custom_load if path.suffix == ".npz" else False}
    try:
        net = timm.create_model(
            config.network, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **trunk.arguments
        )
    except Exception as error:  # whatever timm makes of a damaged or foreign file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"init={config.name}: {path} does not fit the network ({reason})") from None
    trunk.network = net
    return path, trunk.state_dict(), {"mean": known.mean, "std": known.std}


def _find(known: Any, name: str) -> Path:
    """The cached file that a configuration of timm names."""
    if known.hf_hub_id:
        names = [known.hf_hub_filename] if known.hf_hub_filename else list(_FILES)
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            raise ImportError("init=timm/... needs the package huggingface_hub: pip install 'sslfast[timm]'") from None
        for file in names:
            found = try_to_load_from_cache(known.hf_hub_id, file)
            if isinstance(found, str):
                return Path(found)
        command = f"hf download {known.hf_hub_id} {names[0]}"
    else:
        file = os.path.basename(urlparse(known.url or "").path)
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        if file and path.is_file():
            return path
        network = name.partition("/")[2]
        command = f'python -c "import timm; timm.create_model({network!r}, pretrained=True)"'
    raise FileNotFoundError(
        f"init={name}: these weights are not on this machine, and nothing is downloaded unasked; get them with "
        f"`{command}`, or give a file"
    )
