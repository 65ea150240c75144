"""The view stage: uint8 crops to network input, on the device of the crops.

A view is drawn first (:func:`draw_view`: all of its random parameters, a function of seed, view position, epoch and
sample id), then rendered (:func:`render`: a pure function of crops and drawn parameters). Rendering rotates by quarter
turns, cuts into jigsaw patches, and augments each image or patch (``ops/render_views.py``). A view that rotates and has
no jigsaw is mirrored before it is rotated.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslfast.ops import ViewParameter, render_views
from sslfast.ops.render_views import DTYPES
from sslfast.views.parameters import ViewParameters, draw_view
from sslfast.views.types import Batch, View, ViewConfig, check_views


def render(
    crops: Tensor,
    config: ViewConfig,
    parameters: ViewParameters,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> View:
    """Render one view: a pure function, the arithmetic in float32.

    Args:
        crops: ``[B, 3, S, S]`` uint8.
        config: configuration of the view.
        parameters: as drawn for this config, on the device of the crops.
        dtype: of the pixels.
        channels_last: memory format of the images, or of every patch.

    Returns:
        :class:`View` with pixels ``[B, 3, S, S]``, or ``[B, P, 3, p, p]`` where the view has a jigsaw.
    """
    turns, pixel, jigsaw = parameters.quarter_turns, parameters.pixel, config.jigsaw
    permutation, offsets = parameters.permutation, parameters.offsets
    placement: dict[str, Any] = {}
    if jigsaw is not None:
        if permutation is None or offsets is None:
            raise ValueError("parameters were drawn for a view without a jigsaw; draw them with this config")
        pixel = torch.take_along_dim(pixel, permutation[:, :, None], dim=1)  # from cells to slots
        placement = {
            "permutation": permutation,
            "offsets": offsets,
            "grid": jigsaw.grid,
            "patch_size": jigsaw.patch_size,
        }
    elif turns is not None:
        # Rotating the other way before mirroring equals mirroring before rotating: quarter_turns stays the rotation
        # that is visible in the picture. Patches are mirrored one by one.
        turns = torch.where(pixel[:, 0, ViewParameter.FLIP] != 0, -turns, turns)
    pixels = render_views(
        crops,
        pixel,
        quarter_turns=turns,
        **placement,
        mean=config.augment.mean,
        std=config.augment.std,
        dtype=dtype,
        channels_last=channels_last,
        photometric=config.augment.photometric_probability > 0,
        blur=config.augment.blur_probability > 0,
    )
    if jigsaw is None or permutation is None:
        return View(pixels=pixels, quarter_turns=parameters.quarter_turns)
    pixels = pixels.unflatten(0, permutation.shape)
    return View(pixels=pixels, permutation=permutation, quarter_turns=parameters.quarter_turns)


class ViewStage:
    """Renders every view of a recipe from a loader's batch.

    Args:
        views: view name to config; the order of the mapping is the view's position in the Philox streams.
        seed: ``0 <= seed < 2**63``.
        dtype: of the pixels.
        channels_last: memory format of the pixels.

    Raises:
        ValueError: a config that cannot be rendered, naming the view, the value and the remedy.
    """

    def __init__(
        self,
        views: Mapping[str, ViewConfig],
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        check_views(views)
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed=}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.views = dict(views)
        self.seed = seed
        self.dtype = dtype
        self.channels_last = channels_last

    def draw(self, batch: Batch) -> dict[str, ViewParameters]:
        """The parameters of every view of a batch."""
        return {
            name: draw_view(batch.sample_ids, config, seed=self.seed, position=position, epoch=batch.epoch)
            for position, (name, config) in enumerate(self.views.items())
        }

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, View]:
        """Draw and render every view of a batch.

        Raises:
            ValueError: the batch lacks a view's crops or they have another size.
        """
        for name, config in self.views.items():
            crops = batch.crops.get(name)
            shape = [len(batch.sample_ids), 3, config.crop.size, config.crop.size]
            if crops is None:
                raise ValueError(f"the batch has no crops for view {name!r}; it has {sorted(batch.crops)}")
            if list(crops.shape) != shape or crops.dtype != torch.uint8:
                raise ValueError(
                    f"crops of view {name!r} must be uint8 {shape}, got {crops.dtype} {list(crops.shape)}; "
                    "give loader and view stage the same views"
                )
        parameters = self.draw(batch)
        return {
            name: render(
                batch.crops[name], config, parameters[name], dtype=self.dtype, channels_last=self.channels_last
            )
            for name, config in self.views.items()
        }
