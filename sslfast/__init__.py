"""sslfast: fast, exact self-supervised pretraining of image encoders, and the ops it is made of."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any) -> Any:
    """The pretrained trunk behind a path, in eval mode: see :func:`sslfast.weights.load_trunk`."""
    from sslfast.weights import load_trunk

    return load_trunk(path)
