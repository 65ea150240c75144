"""The patches of an image whose averaged features stand for it in evaluations of methods that train on patches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Patches in reading order: of a grid of cells, or at a stride."""

    patch_size: int
    """Side of a patch in pixels."""
    cells: int | None = None
    """Cells per side, each with a patch in its centre; None: patches every ``stride`` pixels from the corner on."""
    stride: int | None = None
    """Pixels from one patch to the next."""
    size: int
    """Side of the images, unless the user names another one."""
    normalise: Callable[[Tensor], Tensor] | None = None
    """What is done to patches ``[B, P, 3, p, p]`` before the trunk, as in training."""
    source: str
    """Who evaluates such patches."""
    by_default: bool = False
    """Whether that is how the number that the recipe quotes was measured."""

    def cut(self, pixels: Tensor) -> Tensor:
        """``[B, 3, S, S]`` to patches ``[B, P, 3, p, p]``.

        Raises:
            ValueError: they do not fit.
        """
        side, patch = pixels.shape[-1], self.patch_size
        stride = side // self.cells if self.cells else self.stride or patch
        if (stride if self.cells else side) < patch:
            raise ValueError(
                f"patches of {patch} pixels do not fit images of {side}: raise --size to at least "
                f"{patch * (self.cells or 1)}, or pass --patches off"
            )
        first = (stride - patch) // 2 if self.cells else 0
        found = pixels[..., first:, first:].unfold(2, patch, stride).unfold(3, patch, stride)  # [B, 3, G, G, p, p]
        found = found[:, :, : self.cells, : self.cells]
        patches = found.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        return patches if self.normalise is None else self.normalise(patches)

    def identity(self) -> dict[str, Any]:
        """What features depend on, as JSON values."""
        return {
            "patch_size": self.patch_size,
            "cells": self.cells,
            "stride": self.stride,
            "normalise": None if self.normalise is None else self.normalise.__name__,
        }

    def __str__(self) -> str:
        where = f"in the centre of {self.cells} x {self.cells} cells" if self.cells else f"every {self.stride} pixels"
        each = "" if self.normalise is None else f", {self.normalise.__name__}"
        return f"mean over patches of {self.patch_size} pixels {where}{each}; as {self.source}"
