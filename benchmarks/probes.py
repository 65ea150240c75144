"""The hot loops that benchmarks/static_cost.py looks for, how often their parts run, and what they may cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.sass import Cost

BATCH, VIEWS, NEGATIVES, ROWS, COLUMNS, SIDE = 256, 2, 32_000, 1_281_167, 128, 224


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A hot loop and the goal's problem for it."""

    name: str
    op: str
    kernel: str
    """Regular expression of the readable name."""
    unit: str
    units: Callable[[Cost], float]
    """Units in one round, from what a round does."""
    total: float
    """Units of a warp in the whole problem."""
    has: tuple[str, ...] = ()
    """Families of instructions in the loop; of several loops the one with the cheapest unit is meant."""
    needs: dict[str, int] = field(default_factory=dict)
    """As of :func:`benchmarks.sass.way_through`; a loop without a way that does all of it is another one."""
    avoids: str | None = None
    """As of the same."""
    floor_bytes: float = 0.0
    flops: float = 0.0
    warps: int | None = None
    """Warps of a block that run the loop; None: all."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Work that a round of a loop does more or less often than once."""

    name: str
    rounds: float
    """For each round of the loop."""
    needs: dict[str, int] = field(default_factory=dict)
    """Of the way that does the work, as of :func:`benchmarks.sass.way_through`."""
    avoids: str | None = None
    inner: bool = False
    """A way through the loop inside; else one through the loop itself, of which the plain way is subtracted."""


_LUMINANCE = r"0\.29890"  # a constant of the saturation, and of the mean for contrast
_HUE: dict[str, Any] = {"name": "hue", "inner": True, "needs": {r"MUFU\.RCP": 4}}
_SATURATION: dict[str, Any] = {
    "name": "saturation", "inner": True, "needs": {_LUMINANCE: 4, "FFMA": 20}, "avoids": "MUFU",
}  # fmt: skip
_SCALE: dict[str, Any] = {
    "name": "brightness or contrast", "inner": True, "needs": {"FFMA": 12}, "avoids": f"MUFU|{_LUMINANCE}",
}  # fmt: skip
PARTS: dict[str, list[Part]] = {
    # A warp draws kDraw = 64 rows at once and scores kTileRows = 8 in a round.
    "sampled InfoNCE": [Part(name="drawing", rounds=8 / 64, needs={r"IMAD\.(WIDE|HI)": 20})],
    "sampled NCE": [Part(name="drawing", rounds=8 / 64, needs={r"IMAD\.(WIDE|HI)": 20})],
    # All four jitters apply. Before contrast, which needs the mean, come each of the others in half of the orders.
    "render_views, mean": [Part(**kind, rounds=0.5) for kind in (_HUE, _SATURATION, _SCALE)],
    "render_views, pixels": [
        Part(**_HUE, rounds=1), Part(**_SATURATION, rounds=1), Part(**_SCALE, rounds=2),
    ],
}  # fmt: skip
"""Name of a probe -> what its loop does not do exactly once a round, by the constants of the kernels and, of
``render_views``, a picture with all four jitters, in words of four pixels, without the photometric set and blur."""

TILES = VIEWS * BATCH / 64 * ROWS / 128 * 4  # a tile of 64 x 128 scores is the work of four warps
DRAWN = BATCH * NEGATIVES / 8
_DENSE: dict[str, Any] = {
    "op": "bank_nce_dense",
    "unit": "64x128 tile",
    "units": lambda cost: cost.matrix / 16,
    "total": TILES,
    "has": ("HGMMA",),
    "floor_bytes": ROWS * COLUMNS * 2.0,
    "flops": 4.0 * VIEWS * BATCH * ROWS * COLUMNS,
    "warps": 8,
}
_SAMPLED: dict[str, Any] = {
    "op": "bank_nce",
    "kernel": r"^score_kernel<bf16, 1, 2, Loads\(2\), false>",
    "unit": "8-row tile",
    "units": lambda cost: cost.families.get("LDG", 0) / 4,  # of 16 bytes
    "total": DRAWN,
    "has": ("LDG", "SHFL"),
    "avoids": r"LDG\.E\.64",  # rows that are given
    "floor_bytes": BATCH * (NEGATIVES + 1) * COLUMNS * 2.0,
}
_RENDERED: dict[str, Any] = {
    "op": "render_views",
    "kernel": r"^render_kernel<bf16, false>",
    "unit": "pixel a lane",
    "units": lambda cost: 4.0,  # a lane's pixels
    "total": BATCH * VIEWS * SIDE**2 / 32,
    "has": ("LDG",),
}
PROBES = [
    Probe(name="dense InfoNCE", kernel=r"^wgmma::kernel<bf16, 128, false>", **_DENSE, needs={r"MUFU\.EX2": 64}),
    Probe(name="dense NCE", kernel=r"^wgmma::kernel<bf16, 128, true>", **_DENSE, needs={r"MUFU\.EX2": 64}),
    Probe(name="sampled InfoNCE", **_SAMPLED, needs={r"LDG\.E\.128": 4, r"MUFU\.EX2": 1}),
    Probe(name="sampled NCE", **_SAMPLED, needs={r"LDG\.E\.128": 4, r"MUFU\.EX2": 2, r"MUFU\.RCP": 1}),
    Probe(
        name="render_views, mean",
        **_RENDERED,
        needs={r"LDG\.E\.CONSTANT": 3, _LUMINANCE: 4},
        avoids=r"LDG\.E\.U8|ST\S*\.",
        floor_bytes=BATCH * VIEWS * SIDE**2 * 3.0,
    ),
    Probe(
        name="render_views, pixels",
        **_RENDERED,
        needs={r"LDG\.E\.CONSTANT": 3, r"STG\.E\.64": 3},
        avoids=r"LDG\.E\.U8|ST\S*\.U(8|16)",
        floor_bytes=BATCH * VIEWS * SIDE**2 * 3 * 3.0,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A limit of what a unit of work may cost."""

    name: str
    instructions: float
    stall_cycles: float | None = None
    of: tuple[str, ...] = ()
    """Probes whose sum it limits; none: the one of the same name."""

    def counted(self, units: "dict[str, dict[str, float]]", key: str) -> float | None:
        """The sum of what was measured; None where a probe is missing."""
        names = self.of or (self.name,)
        return sum(units[name][key] for name in names) if all(name in units for name in names) else None


def goals(dense: "dict[str, float] | None") -> list[Goal]:
    """The limits; NCE's is 1.6 times what InfoNCE takes."""
    nce = [Goal(name="dense NCE", instructions=1.6 * dense["instructions"])] if dense else []
    return [
        Goal(name="dense InfoNCE", instructions=560, stall_cycles=1300),
        *nce,
        Goal(name="sampled InfoNCE", instructions=330),
        Goal(name="render_views", instructions=200, of=("render_views, mean", "render_views, pixels")),
    ]
