"""Rotation (RotNet): classify by how many quarter turns an image was rotated (Gidaris, Singh & Komodakis, ICLR 2018).

Objective: ``loss = 1/4 Σ_k -log softmax(W f(rot_k(x)))_k`` over ``k = 0 .. 3`` quarter turns of every image (eq. 3), or
the one term of a drawn ``k`` (VISSL). f is the trunk, W one linear layer. The crop is flipped before it is rotated, as
in the authors' code, so that the label matches the image; VISSL flips behind the rotation, where a mirrored picture at
90 degrees looks like an upright one mirrored and at 270. Rotation moves whole pixels and leaves no artefacts at the
border.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sslfast.methods.base import BaseConfig, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.models import build_trunk, seeded
from sslfast.ops import rotate90
from sslfast.views import View, ViewConfig

IMAGE = "image"


@register_method
class Rotation(Method):
    """The method as a module. No state besides the weights."""

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """Four-way classification of rotations."""

        name: ClassVar[str] = "rotation"

        all_turns: bool = False
        """True: every image in all four rotations, four times the work of a step, as in the paper. False: one drawn
        rotation of each, as in VISSL."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The upright image; the rotation is added."""

        def views(self) -> dict[str, ViewConfig]:
            """The views that a step needs, in the order that numbers their random streams."""
            return {IMAGE: replace(self.image_view, rotation=not self.all_turns)}

        def preview_views(self) -> dict[str, ViewConfig]:
            """The rotated image, also where a step uses all four rotations."""
            return {IMAGE: replace(self.image_view, rotation=True)}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            if self.image_view.jigsaw is not None or self.image_view.rotation:
                raise ValueError(
                    f"method.image_view must be a whole upright image, got jigsaw={self.image_view.jigsaw}, "
                    f"rotation={self.image_view.rotation}; set neither"
                )

        def build(self, context: MethodContext) -> "Rotation":
            """The module for a run."""
            return Rotation(self, context)

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = nn.Linear(self.trunk.out_features, 4)

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``accuracy``, the share of correct rotations (detached).

        Args:
            views: "image", with quarter turns unless ``all_turns``.
            sample_ids: ``[B]`` int64; not used.
            step: not used.
        """
        pixels, turns = views[IMAGE].pixels, views[IMAGE].quarter_turns
        if self.config.all_turns:
            # [4 B]: the four rotations of an image are adjacent, as their gradients are summed.
            turns = torch.arange(4, device=pixels.device).repeat(len(pixels))
            pixels = rotate90(pixels.repeat_interleave(4, dim=0), turns)
        if turns is None:
            raise ValueError("the view has no quarter_turns; set rotation=True in its configuration")
        logits = self.head(self.trunk(pixels)).float()
        accuracy = (logits.argmax(dim=1) == turns).float().mean()
        return {"loss": cross_entropy(logits, turns), "accuracy": accuracy}
