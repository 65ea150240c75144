"""Features on disk: what was extracted once is read the next time.

A file holds the features of one encoder (or one of its layers) for the images of one manifest. Its name is a hash of
everything that the numbers depend on: weights, normalisation, layer, image size, way of preprocessing, the manifest's
digest, kind of device. Files may be deleted at any time; one that cannot be read is made again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.files import replacing


@dataclass(kw_only=True)
class Cached:
    """What a file holds."""

    values: Tensor
    """``[N, D]`` float32."""
    rows: Tensor
    """``[N]`` int64 manifest rows."""
    bad_images: list[tuple[str, str]]
    """Path and reason of what was left out."""


class FeatureCache:
    """A folder of feature files; ``None``: nothing is stored or found."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, identity: dict[str, Any]) -> Path | None:
        """Where the features of ``identity`` (JSON values) lie or would lie."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.pt"

    def load(self, identity: dict[str, Any]) -> Cached | None:
        """The features, or None where there are none or the file is not what was written."""
        path = self.path(identity)
        if path is None or not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["identity"] != _text(identity):
                return None
            bad = [(str(name), str(reason)) for name, reason in state["bad_images"]]
            return Cached(values=state["values"], rows=state["rows"], bad_images=bad)
        except Exception:  # whatever a damaged file makes of torch.load; the features are made again
            return None

    def save(self, identity: dict[str, Any], found: Cached) -> None:
        """Write the features, whole or not at all."""
        path = self.path(identity)
        if path is None:
            return
        state = {
            "identity": _text(identity),
            "values": found.values.clone(),  # a slice would be stored with all that it is a slice of
            "rows": found.rows,
            "bad_images": found.bad_images,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
