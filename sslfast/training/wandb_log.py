"""Weights & Biases."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslfast.config import to_dict
from sslfast.files import open_regular, write_file
from sslfast.training.logging import LogContext, Logger, scalars

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at its import: nothing is sent unless asked for
try:
    import wandb
except ImportError as error:
    raise ImportError(f"it needs the package wandb ({error}); pip install 'sslfast[wandb]'") from error


class WandbLog(Logger):
    """A run of W&B, offline unless the variable ``WANDB_MODE`` says otherwise: files in ``wandb/`` of the run
    directory, which ``wandb sync`` uploads.

    Project and entity are those of ``WANDB_PROJECT`` (else ``sslfast``) and ``WANDB_ENTITY``. The run's id is kept in
    ``wandb/sslfast-run-id``: a resumed run continues the same one, and what it logs again is the same.
    """

    def __init__(self, context: LogContext) -> None:
        folder = context.run.path.absolute()
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "sslfast",
            name=folder.name,
            id=_run_id(folder / "wandb" / "sslfast-run-id"),
            resume="allow",
            mode=mode,
            dir=folder,
            config=to_dict(context.config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )

    def write(self, record: Mapping[str, Any]) -> None:
        self._wandb.log(scalars(record), step=record["step"])

    def write_picture(self, name: str, path: Path, step: int) -> None:
        self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._wandb.finish()


def _run_id(path: Path) -> str:
    try:
        with open_regular(path) as file:
            found: str = file.read().decode("ascii", "replace").strip()
        if found.isalnum():
            return found
    except FileNotFoundError:
        pass
    name = secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, f"{name}\n")
    return name
