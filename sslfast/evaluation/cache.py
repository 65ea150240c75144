"""Features on disk, so that they are extracted only once.

A file holds the features of one encoder (or one of its layers) for the images of one manifest. Its name is a hash of
everything that the features depend on: weights, normalisation, layer, image size, preprocessing, the manifest's digest,
type of device. Files may be deleted at any time; features whose file cannot be read are extracted again, and those
that cannot be written are extracted again the next time.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.files import open_regular, reason_of, replacing, save_tensors
from sslfast.runs import print_error
from sslfast.text import printable


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
        self._has_failed = False

    def path(self, identity: dict[str, Any]) -> Path | None:
        """File of the features that ``identity`` (JSON values) describes, whether it exists or not."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_text(identity).encode()).hexdigest()[:32]}.pt"

    def load(self, identity: dict[str, Any]) -> Cached | None:
        """The features, or None if there is no file, or one that is damaged, foreign or holds no finite features."""
        path = self.path(identity)
        state = None if path is None else load_whole(path)
        try:
            if state is None or state["identity"] != _text(identity):
                return None
            bad = [(str(name), str(reason)) for name, reason in state["bad_images"]]
            found = Cached(values=state["values"], rows=state["rows"], bad_images=bad)
            shapes = (found.values.dtype, found.rows.dtype, found.values.ndim, found.rows.shape)
            is_right = shapes == (torch.float32, torch.int64, 2, found.values.shape[:1])
            return found if is_right and bool(found.values.norm(dim=1).isfinite().all()) else None
        except (AttributeError, KeyError, TypeError, ValueError):  # another shape than ours
            return None

    def save(self, identity: dict[str, Any], found: Cached) -> None:
        """Write the features atomically. Where that fails one line says so, and no further file is tried."""
        path = self.path(identity)
        if path is None or self._has_failed:
            return
        state = {
            "identity": _text(identity),
            "values": found.values.clone(),  # a view would be stored with its whole base tensor
            "rows": found.rows,
            "bad_images": found.bad_images,
        }
        self._has_failed = not save_optional(state, path, lost="features are not kept")


def save_optional(state: dict[str, Any], path: Path, *, lost: str) -> bool:
    """Write what an evaluation can do without, atomically; whether that succeeded. Else one line on standard error:
    the reason, and ``lost``, what follows."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            save_tensors(state, file)
    except OSError as error:
        print_error(f"cannot write {printable(str(path))} ({reason_of(error)}): {lost}")
        return False
    return True


def load_whole(path: Path) -> dict[str, Any] | None:
    """The table that ``torch.save`` wrote; None where there is no such file or a byte of it has changed."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as members:  # torch writes the CRC-32 of every member and never compares it
                if members.testzip() is not None:
                    return None
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever zipfile and torch.load raise for a damaged or foreign file
        return None
    return state if isinstance(state, dict) else None


def weights_digest(module: nn.Module) -> str:
    """16 hex digits of the SHA-256 over names, types and bytes of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
