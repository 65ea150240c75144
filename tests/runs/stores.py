"""A checkpoint store as a user would write it: it shares nothing with the library's own, and no rank is special."""

import os
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from sslfast.runs.checkpoint_store import CorruptCheckpointError


class FolderStore:
    """A folder per step with a file of every rank's state; complete when all ranks have written theirs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rank, self.ranks = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
        )

    def list(self) -> Sequence[int]:
        folders = [path for path in self.directory.glob("[0-9]*") if path.name.isdecimal()]
        return sorted(int(path.name) for path in folders if len([*path.glob("*.pt")]) == self.ranks)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, state: dict[str, Any], step: int) -> None:
        part = self._part(step)
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part.with_suffix(".tmp"))
        os.replace(part.with_suffix(".tmp"), part)

    def load(self, step: int) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self._part(step), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise CorruptCheckpointError(f"{self._part(step)} is damaged") from error
        return state

    def delete(self, step: int) -> None:
        self._part(step).unlink(missing_ok=True)

    def set_aside(self, step: int) -> Path:
        aside = self._part(step).with_suffix(".old")
        os.replace(self._part(step), aside)
        return aside

    def clean(self) -> None:
        for path in self.directory.glob(f"*/{self.rank}.tmp"):
            path.unlink()

    def _part(self, step: int) -> Path:
        return self.path(step) / f"{self.rank}.pt"
