"""Context network of CPC: a stack of masked convolutions over a grid of features."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import pad, relu


class _Block(nn.Module):
    """Residual: 1x1, then 1x3 along the row, then 2x1 over this row and the one above, then 1x1."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(features, hidden, 1)
        self.along = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(hidden, hidden, (2, 1))
        self.expand = nn.Conv2d(hidden, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.along(relu(self.reduce(x)))
        hidden = self.down(pad(hidden, (0, 0, 1, 0)))  # zero padding above: row i sees rows i - 1 and i
        return cast(Tensor, x + self.expand(relu(hidden)))


class RowContext(nn.Module):
    """``[B, C, G, G]`` -> ``[B, C, G, G]``: output row i depends on input rows i - ``blocks`` .. i only.

    Masked convolutions as in PixelCNN, without its blind spot: all of the own row is visible, no row below (van den
    Oord et al. 2018, section 3.3).
    """

    def __init__(self, features: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(features, hidden) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.blocks(x))
