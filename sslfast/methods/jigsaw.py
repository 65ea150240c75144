"""Jigsaw: classify which of a fixed set of permutations an image's patches are shown in (Noroozi & Favaro, ECCV 2016).

Objective: ``loss = -log softmax(h(f(x_π(1)), ..., f(x_π(P))))_c``, where ``x_1 .. x_P`` are the patches of an image's
cells, ``π = π_c`` the permutation of class ``c``, drawn uniformly for each sample and step from a set of maximal
Hamming distance (``permutations.py``) or from a file, f the trunk and h the head: linear, BatchNorm and ReLU for every
patch, the results concatenated in the order shown, and a linear layer to the classes (VISSL's form for ResNets; the
paper's is an AlexNet). The trunk sees every patch by itself, so features are computed in the order of the view stage
and then permuted into that of the class: the same result as for permuted pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import factorial
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from sslfast.methods.base import Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.grid import PatchGrid
from sslfast.methods.shared.patches import (
    PatchConfig,
    adjacent_patches,
    augment_crop,
    gather_patches,
    jigsaw_view,
    mosaic,
    normalise_patches,
    slots_of_cells,
)
from sslfast.methods.shared.permutations import MAX_CELLS, max_hamming_permutations, read_permutations
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models import JigsawHead, build_trunk, seeded
from sslfast.ops.philox import Stream, random_integers
from sslfast.views import View, ViewConfig

JIGSAW = "jigsaw"
MAX_PERMUTATIONS = 10_000
"""The most that the literature uses; choosing them takes four seconds."""


def draw_classes(sample_ids: Tensor, count: int, *, seed: int, step: int | Tensor) -> Tensor:
    """``[B]`` int64 uniform on ``0 .. count-1``: the permutation that each sample is shown in."""
    return random_integers(sample_ids, 1, count, seed=seed, stream=Stream.PRETEXT, step=step)[:, 0]


@register_method
class Jigsaw(Method):
    """The method as a module. State in buffers: ``permutations`` ``[K, P]``, cell shown in each slot."""

    @dataclass(kw_only=True)
    class Config(PatchConfig):
        """Jigsaw puzzles as a classification of permutations."""

        name: ClassVar[str] = "jigsaw"

        num_permutations: int = 2000
        """Classes: permutations of maximal Hamming distance; 100, 2,000 and 10,000 are compared in the literature."""
        permutation_file: str = ""
        """A .npy file with the permutations, integers [num_permutations, patches] from 0 or 1, as VISSL's
        hamming_perms_2000_patches_9_max_avg.npy; empty: they are chosen by the run's seed."""
        patch_features: int = 1000
        """Features of each patch after the head's first layer."""
        normalise_patches: bool = False
        """Mean 0 and standard deviation 1 for every channel of every patch, as in the paper; VISSL does not."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """Whole images, for evaluations only."""
        jigsaw_view: ViewConfig = field(default_factory=jigsaw_view)
        """The patches; their order in the view does not matter."""

        def views(self) -> dict[str, ViewConfig]:
            """The views that a step needs, in the order that numbers their random streams."""
            return {JIGSAW: self.jigsaw_view}

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The patches in the order of the drawn class."""
            space = PixelSpace(self.jigsaw_view.augment)
            view, jigsaw = views[JIGSAW], self.jigsaw_view.jigsaw
            assert jigsaw is not None
            view = augment_crop(view, sample_ids, self, space, seed=seed, step=0)
            shown = self.permutations(seed)[draw_classes(sample_ids, self.num_permutations, seed=seed, step=0)]
            patches = gather_patches(view.pixels, slots_of_cells(view).gather(1, shown))
            pictures = mosaic(space.to_rgb(patches), jigsaw.grid)
            return {f"which of {self.num_permutations} orders?": pictures}

        def evaluation_patches(self) -> PatchGrid | None:
            """Adjacent patches of the training's size."""
            return adjacent_patches(self.jigsaw_view, normalise_patches if self.normalise_patches else None)

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            jigsaw = self.jigsaw_view.jigsaw
            if jigsaw is None:
                raise ValueError("method.jigsaw_view.jigsaw must be set, got None")
            cells = jigsaw.grid**2
            if not 4 <= cells <= MAX_CELLS:
                raise ValueError(f"method.jigsaw_view.jigsaw.grid must be 2 or 3, got {jigsaw.grid}")
            most = min(factorial(cells), MAX_PERMUTATIONS)
            if not 2 <= self.num_permutations <= most:
                raise ValueError(
                    f"method.num_permutations must be in [2, {most}] for {cells} patches, got {self.num_permutations}"
                )
            self.check_at_least(1, "patch_features")

        def permutations(self, seed: int) -> Tensor:
            """``[K, P]`` int64, cell shown in each slot; ValueError for a file that does not fit."""
            assert self.jigsaw_view.jigsaw is not None
            cells = self.jigsaw_view.jigsaw.grid**2
            if not self.permutation_file:
                return max_hamming_permutations(self.num_permutations, cells, seed)
            rows = read_permutations(self.permutation_file, cells)
            if len(rows) != self.num_permutations:
                raise ValueError(
                    f"method.num_permutations must be {len(rows)}, the rows of {self.permutation_file}, "
                    f"got {self.num_permutations}"
                )
            return rows

        def build(self, context: MethodContext) -> "Jigsaw":
            """The module for a run."""
            return Jigsaw(self, context)

    permutations: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config, self.seed = config, context.seed
        self.register_buffer("permutations", config.permutations(context.seed))
        cells = self.permutations.shape[1]
        self.pixel_space = PixelSpace(config.jigsaw_view.augment)
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = JigsawHead(self.trunk.out_features, config.patch_features, cells, config.num_permutations)

    def logits(self, view: View, classes: Tensor) -> Tensor:
        """``[B, K]``: scores of every permutation for the patches shown in those of ``classes`` ``[B]``."""
        pixels = normalise_patches(view.pixels) if self.config.normalise_patches else view.pixels
        features = self.trunk(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])  # [B, P, C] by slot of the view
        slots = slots_of_cells(view).gather(1, self.permutations[classes])
        scores: Tensor = self.head(gather_patches(features, slots))
        return scores

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of correct permutations (detached).

        Args:
            views: "jigsaw".
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: number of the step: with the seed and the sample id it fixes the class.
        """
        classes = draw_classes(sample_ids, len(self.permutations), seed=self.seed, step=step)
        view = augment_crop(views[JIGSAW], sample_ids, self.config, self.pixel_space, seed=self.seed, step=step)
        logits = self.logits(view, classes)
        accuracy = (logits.argmax(dim=1) == classes).float().mean()
        return {"loss": cross_entropy(logits.float(), classes), "accuracy": accuracy}
