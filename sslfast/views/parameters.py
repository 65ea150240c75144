"""The random choices of a view, drawn as a pure function of (seed, view position, epoch, sample id)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sslfast.ops.philox import Stream, random_uint32, uint32_below
from sslfast.views.augment import WORD_GROUPS, draw_pixel_parameters
from sslfast.views.types import JigsawConfig, ViewConfig

_BLOCK = 4  # uint32 numbers in a Philox block


@dataclass(kw_only=True)
class ViewParameters:
    """Every random choice of one view of a batch: ``B`` samples, ``P`` jigsaw cells, ``M`` = ``P`` or 1 images."""

    quarter_turns: Tensor | None
    """``[B]`` int64 in 0..3, counter-clockwise; None: the view does not rotate."""
    permutation: Tensor | None
    """``[B, P]`` int64: the cell that each slot shows; None: the view has no jigsaw."""
    offsets: Tensor | None
    """``[B, P, 2]`` int64: y and x of the patch inside its cell, by cell (not by slot)."""
    pixel: Tensor
    """``[B, M, len(ViewParameter)]`` float32, by cell, so that a cell's pixels do not depend on the permutation."""


def max_offset(config: ViewConfig, jigsaw: JigsawConfig) -> int:
    """Largest patch offset inside a cell, in pixels."""
    if jigsaw.max_offset is not None:
        return jigsaw.max_offset
    return config.crop.size // jigsaw.grid - jigsaw.patch_size


def draw_view(
    sample_ids: Tensor, config: ViewConfig, *, seed: int, position: int, epoch: int | Tensor
) -> ViewParameters:
    """Draw the parameters of one view; the same numbers on every device.

    Of a sample's Philox blocks (four uint32 each), block 0 is the header (word 0: quarter turns), the next ``P`` belong
    to the jigsaw cells (word 0: sort key, 1 and 2: offset), and the rest to the pixels of each image or patch, group
    by group (:data:`~sslfast.views.augment.WORD_GROUPS`). The permutation sorts the cells by their keys, ties by
    position, so all ``P!`` orders are equally likely.

    Args:
        sample_ids: ``[B]`` int64.
        config: configuration of the view.
        seed: ``0 <= seed < 2**63``.
        position: index of the view in its recipe, 0..14.
        epoch: int or 0-d int64 tensor.
    """
    cells = config.jigsaw.grid**2 if config.jigsaw is not None else 0
    images = max(1, cells)
    counts = (_BLOCK * (1 + cells), *(images * words for words in WORD_GROUPS))
    words = random_uint32(sample_ids, sum(counts), seed=seed, stream=Stream.VIEW + position, step=epoch)
    words, *of_pixels = words.split(counts, dim=1)
    pixel_words = torch.cat([group.unflatten(1, (images, -1)) for group in of_pixels], dim=-1)
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
