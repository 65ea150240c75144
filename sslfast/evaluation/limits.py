"""The range of every number in the configurations of evaluations, contact sheets and reports."""

_COUNT = 10**9
_PIXELS = (8, 1 << 14)

LIMITS: dict[str, tuple[float, float]] = {
    "white_level": (255, 65535),
    "max_pixels": (1, 1 << 32),
    "size": _PIXELS,
    "batch_size": (1, 1 << 20),
    "workers": (0, 1024),
    "k": (1, _COUNT),
    "temperature": (1e-4, 1e4),
    "epochs": (1, 10**6),
    "strengths": (1e-12, 1e12),
    "costs": (1e-12, 1e12),
    "seed": (0, 2**63 - 1),
    "seeds": (0, 2**63 - 1),
    "fraction": (0, 1),
    "shots": (1, _COUNT),
    "draws": (1, 10**4),
    "iterations": (1, _COUNT),
    "lr": (0, 10**6),
    "warmup": (0, _COUNT),
    "norm_batch": (0, 1 << 20),
    "train_sides": _PIXELS,
    "test_side": _PIXELS,
    "longest_side": _PIXELS,
    "anchors": (1, 1 << 14),
    "regions": (1, 10**6),
    "examples": (0, 10**4),
    "save_every": (0, _COUNT),
    "points": (1, 10**6),
    "queries": (1, 10**4),
    "neighbours": (1, 10**4),
}
"""Smallest and largest value, as of :data:`sslfast.training.limits.LIMITS`. Some classes check more closely."""
