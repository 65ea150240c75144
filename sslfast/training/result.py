"""What a finished run returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class TrainResult:
    """Outcome of a finished run."""

    step: int
    """Steps done, over all starts of the run."""
    metrics: dict[str, float]
    """Last log record: loss, learning rate and the method's values."""
    checkpoint: Path
    """The final checkpoint."""
    seconds: float
    """Wall time since this start of the run."""
    samples_per_second: float
    """Throughput since this start, everything included."""
    loader_wait_share: float
    """Share of the wall time spent waiting for the loader."""
    bad_images: int
    """Files listed in ``bad_images.txt``."""
