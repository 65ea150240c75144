"""The view stage: uint8 crops to network input, on the device of the crops.

A view is drawn first (:func:`draw_view`: every random number of it, a function of seed, view position, epoch and
row), then rendered (:func:`render`: a pure function of crops and drawn parameters). Order of a rendering: rotate by
quarter turns, cut into jigsaw patches, then per image or patch flip, jitter, photometric operations, grayscale, blur
and normalisation (``ops/render_views.py``). A view that turns and has no jigsaw is mirrored before it is turned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sslfast.loaders.batch import AugmentConfig, Batch, JigsawConfig, View, ViewConfig
from sslfast.loaders.color import BLUR_WORDS, WORDS, PixelParameters, draw_pixel_parameters, uint32_below
from sslfast.ops.philox import Stream, random_uint32
from sslfast.ops.pixels import MAX_BLUR_SIGMA
from sslfast.ops.render_views import DTYPES, render_views

_BLOCK = 4  # uint32 numbers in a Philox block
MAX_VIEWS = 15
"""Views that a recipe can have: the width of the Philox stream range ``Stream.VIEW``."""


@dataclass(kw_only=True)
class ViewParameters:
    """Every random choice of one view of a batch: ``B`` samples, ``P`` jigsaw cells, ``M`` = ``P`` or 1 images."""

    quarter_turns: Tensor | None
    """``[B]`` int64 in 0..3, counter-clockwise; None: the view does not rotate."""
    permutation: Tensor | None
    """``[B, P]`` int64: the cell that each slot shows; None: the view has no jigsaw."""
    offsets: Tensor | None
    """``[B, P, 2]`` int64: y and x of the patch inside its cell, by cell (not by slot)."""
    pixel: PixelParameters
    """Leading dimensions ``[B, M]``, by cell, so that a cell's pixels do not depend on the permutation."""


def max_offset(config: ViewConfig, jigsaw: JigsawConfig) -> int:
    """Largest patch offset inside a cell, in pixels."""
    if jigsaw.max_offset is not None:
        return jigsaw.max_offset
    return config.crop.size // jigsaw.grid - jigsaw.patch_size


def draw_view(rows: Tensor, config: ViewConfig, *, seed: int, position: int, epoch: int | Tensor) -> ViewParameters:
    """Draw the parameters of one view: a function of ``(seed, position, epoch, row)``, the same on every device.

    Of a row's Philox blocks (four uint32 each), block 0 is the header (word 0: quarter turns), the next ``P`` belong
    to the jigsaw cells (word 0: sort key, 1 and 2: offset), the following three per image or patch to its pixels and
    the last one each to its blur (:func:`~sslfast.loaders.color.draw_pixel_parameters`). The permutation sorts the
    cells by their keys, ties by position, so all ``P!`` orders are equally likely.

    Args:
        rows: ``[B]`` int64 manifest rows.
        config: of the view.
        seed: ``0 <= seed < 2**63``.
        position: of the view in its recipe, 0..14.
        epoch: int or 0-d int64 tensor.
    """
    cells = config.jigsaw.grid**2 if config.jigsaw is not None else 0
    images = max(1, cells)
    counts = (_BLOCK * (1 + cells), WORDS * images, BLUR_WORDS * images)
    words = random_uint32(rows, sum(counts), seed=seed, stream=Stream.VIEW + position, step=epoch)
    words, *of_pixels = words.split(counts, dim=1)
    pixel_words = torch.cat([part.unflatten(1, (images, -1)) for part in of_pixels], dim=-1)
    permutation = offsets = None
    if config.jigsaw is not None:
        cell_words = words[:, _BLOCK:].unflatten(1, (cells, _BLOCK))
        permutation = cell_words[:, :, 0].argsort(dim=1, stable=True)
        offsets = uint32_below(cell_words[:, :, 1:3], max_offset(config, config.jigsaw) + 1)
    return ViewParameters(
        quarter_turns=uint32_below(words[:, 0], 4) if config.rotation else None,
        permutation=permutation,
        offsets=offsets,
        pixel=draw_pixel_parameters(pixel_words, config.augment),
    )


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
        config: of the view.
        parameters: as drawn for it, on the device of the crops.
        dtype: of the pixels.
        channels_last: memory format of the images, or of every patch.

    Returns:
        :class:`View` with pixels ``[B, 3, S, S]``, or ``[B, P, 3, p, p]`` where the view has a jigsaw.
    """
    pixel, turns = parameters.pixel, parameters.quarter_turns
    augment = config.augment
    if config.jigsaw is None:
        if turns is not None:
            # Turning the other way before mirroring is mirroring before turning: the number of turns stays what can be
            # seen in the picture. Patches are mirrored one by one.
            turns = torch.where(pixel.flip[:, 0], -turns, turns)
        pixels = render_views(
            crops,
            pixel.pack(),
            quarter_turns=turns,
            mean=augment.mean,
            std=augment.std,
            dtype=dtype,
            channels_last=channels_last,
            photometric=augment.photometric_probability > 0,
            blur=augment.blur_probability > 0,
        )
        return View(pixels=pixels, quarter_turns=parameters.quarter_turns)
    permutation, offsets = parameters.permutation, parameters.offsets
    if permutation is None or offsets is None:
        raise ValueError("parameters were drawn for a view without a jigsaw; draw them with this config")
    pixels = render_views(
        crops,
        pixel.permute(permutation).pack(),
        quarter_turns=turns,
        permutation=permutation,
        offsets=offsets,
        grid=config.jigsaw.grid,
        patch_size=config.jigsaw.patch_size,
        mean=augment.mean,
        std=augment.std,
        dtype=dtype,
        channels_last=channels_last,
        photometric=augment.photometric_probability > 0,
        blur=augment.blur_probability > 0,
    )
    return View(
        pixels=pixels.unflatten(0, permutation.shape),
        permutation=permutation,
        quarter_turns=parameters.quarter_turns,
    )


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
            name: draw_view(batch.rows, config, seed=self.seed, position=position, epoch=batch.epoch)
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
            shape = [len(batch.rows), 3, config.crop.size, config.crop.size]
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


def check_views(views: Mapping[str, ViewConfig]) -> None:
    """Raise ValueError for a config that cannot be rendered, naming the view, the value and the remedy."""
    if not 1 <= len(views) <= MAX_VIEWS:
        raise ValueError(f"a recipe needs 1 to {MAX_VIEWS} views, got {len(views)}")
    for name, config in views.items():
        if config.crop.size < 1:
            raise ValueError(f"view {name!r}: crop.size must be at least 1, got {config.crop.size}")
        if config.jigsaw is not None:
            _check_jigsaw(name, config, config.jigsaw)
        _check_augment(name, config.augment)


def _check_jigsaw(name: str, config: ViewConfig, jigsaw: JigsawConfig) -> None:
    if jigsaw.grid < 1:
        raise ValueError(f"view {name!r}: jigsaw.grid must be at least 1, got {jigsaw.grid}")
    cell = config.crop.size // jigsaw.grid
    if not 1 <= jigsaw.patch_size <= cell:
        raise ValueError(
            f"view {name!r}: jigsaw.patch_size must be in [1, {cell}], the cell side of a "
            f"{config.crop.size}-pixel crop in {jigsaw.grid} x {jigsaw.grid} cells, got {jigsaw.patch_size}"
        )
    if jigsaw.max_offset is not None and not 0 <= jigsaw.max_offset <= cell - jigsaw.patch_size:
        raise ValueError(
            f"view {name!r}: jigsaw.max_offset must be in [0, {cell - jigsaw.patch_size}], cell side less patch side, "
            f"got {jigsaw.max_offset}"
        )


def _check_augment(name: str, augment: AugmentConfig) -> None:
    for gate in ("flip", "jitter", "photometric", "grayscale", "blur"):
        field = f"{gate}_probability"
        if not 0 <= getattr(augment, field) <= 1:
            raise ValueError(f"view {name!r}: {field} must be in [0, 1], got {getattr(augment, field)}")
    for field in ("brightness", "contrast", "saturation"):
        if not 0 <= getattr(augment, field) < float("inf"):
            raise ValueError(f"view {name!r}: {field} must be at least 0, got {getattr(augment, field)}")
    if not 0 <= augment.hue <= 0.5:
        raise ValueError(f"view {name!r}: hue must be in [0, 0.5] turns, got {augment.hue}")
    low, high = augment.blur_sigma
    if not 0 < low <= high <= MAX_BLUR_SIGMA:
        raise ValueError(
            f"view {name!r}: blur_sigma must hold two sigmas, 0 < low <= high <= {MAX_BLUR_SIGMA}, got {low} and {high}"
        )
    if len(augment.mean) != 3 or len(augment.std) != 3 or min(augment.std) <= 0:
        raise ValueError(
            f"view {name!r}: mean and std must have 3 values, std above 0, got {augment.mean} and {augment.std}"
        )
