"""Trunk weights in and out: reading every supported layout, exporting to other libraries. Imports ``models`` and
``runs``."""

from sslfast.weights.cached import read_cached
from sslfast.weights.export import export_trunk
from sslfast.weights.layouts import SeveralNetworksError
from sslfast.weights.load import Weights, load_trunk, read_weights

__all__ = [
    "SeveralNetworksError",
    "Weights",
    "export_trunk",
    "load_trunk",
    "read_cached",
    "read_weights",
]
