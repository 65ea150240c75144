"""TensorBoard event files."""

from collections.abc import Mapping
from typing import Any

from sslfast.training.logging import LogContext, Logger

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(
        f"it needs the package tensorboard ({error}); pip install tensorboard, or pass --no-tensorboard"
    ) from error


class TensorBoardLog(Logger):
    """The numbers of every record as scalars, in ``tensorboard/`` of the run directory."""

    def __init__(self, context: LogContext) -> None:
        # purge_step hides what an earlier start wrote after the checkpoint that this one resumes from.
        self._writer = SummaryWriter(str(context.run.tensorboard), purge_step=context.first_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        for name, value in [*record.items(), *((f"time/{k}", v) for k, v in record["time"].items())]:
            if isinstance(value, int | float) and name not in ("step", "time/unix_seconds"):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
