"""Sets of permutations with large pairwise Hamming distances, and published ones from files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslfast.ops.permutations import MAX_CELLS, max_hamming_permutations

__all__ = ["MAX_CELLS", "max_hamming_permutations", "read_permutations"]


def read_permutations(path: Path | str, cells: int) -> Tensor:
    """The set in a ``.npy`` file, as fair_self_supervision_benchmark and VISSL publish theirs.

    Args:
        path: an integer array ``[K, cells]``; rows are permutations of ``0 .. cells-1``, or of ``1 .. cells``.
        cells: of the jigsaw.

    Returns:
        ``[K, cells]`` int64, from 0.

    Raises:
        ValueError: the file cannot be read, or is no such set; names it.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"method.permutation_file={str(path)!r} cannot be read as .npy: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] != cells or found.dtype.kind not in "iu":
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise ValueError(
            f"method.permutation_file={str(path)!r} must hold integers [K, {cells}], one permutation of the {cells} "
            f"patches a row, got {kind}"
        )
    rows = torch.from_numpy(found.astype(np.int64))
    rows = rows - rows.min() if len(rows) else rows
    wrong = (rows.sort(dim=1).values != torch.arange(cells)).any(dim=1).nonzero()[:, 0]
    if len(wrong):
        raise ValueError(
            f"method.permutation_file={str(path)!r}: row {int(wrong[0])} is no permutation of the {cells} patches: "
            f"{found[int(wrong[0])].tolist()}"
        )
    if len(torch.unique(rows, dim=0)) != len(rows):
        raise ValueError(f"method.permutation_file={str(path)!r} holds a permutation twice: two classes would be one")
    return rows
