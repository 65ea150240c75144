"""What users time on their own machine: ops, loaders, training steps. Imports ``recipes`` and what lies below."""

__all__ = ["loader", "ops", "step"]
