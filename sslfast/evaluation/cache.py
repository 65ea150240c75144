"""Features on disk, so that they are extracted only once.

A file holds the features of one encoder (or one of its layers) for the images of one manifest. Its name is a hash of
everything that the features depend on: weights, normalisation, layer, image size, preprocessing, the manifest's digest,
type of device. Files may be deleted at any time; features whose file cannot be read are extracted again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.files import WriteError, replacing, save_tensors
from sslfast.runs import print_error


@dataclass(kw_only=True)
class Cached:
    """Contents of a file."""

    values: Tensor
    """``[N, D]`` float32."""
    rows: Tensor
    """``[N]`` int64 manifest rows."""
    bad_images: list[tuple[str, str]]
    """Path and reason of each image that was left out."""


class FeatureCache:
    """A folder of feature files; without a folder nothing is stored."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, identity: dict[str, Any]) -> Path | None:
        """File of the features that ``identity`` (JSON values) describes, whether it exists or not."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.pt"

    def load(self, identity: dict[str, Any]) -> Cached | None:
        """The features, or None if there is no file or it is damaged."""
        path = self.path(identity)
        if path is None or not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["identity"] != _text(identity):
                return None
            bad = [(str(name), str(reason)) for name, reason in state["bad_images"]]
            return Cached(values=state["values"], rows=state["rows"], bad_images=bad)
        except Exception:  # whatever torch.load raises for a damaged file; the features are extracted again
            return None

    def save(self, identity: dict[str, Any], found: Cached) -> None:
        """Write the features atomically; where that is not possible, a line says so: they are extracted again."""
        path = self.path(identity)
        if path is None:
            return
        state = {
            "identity": _text(identity),
            "values": found.values.clone(),  # a view would be stored with its whole base tensor
            "rows": found.rows,
            "bad_images": found.bad_images,
        }
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                save_tensors(state, file)
        except WriteError as error:
            print_error(f"cannot keep the features in {path} ({error.reason}); the next evaluation extracts them again")


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
