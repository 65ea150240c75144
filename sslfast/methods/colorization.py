"""Colorization: predict the colours of an image from its lightness (Zhang, Isola & Efros, ECCV 2016).

Objective (Zhang 2016 eq. 2): ``loss = -mean v(Z) Σ_q Z_q log p_q`` over samples and cells of ``stride`` x ``stride``
pixels. p is the decoder's softmax over Q bins of the ab plane, given CIE L alone; Z is the soft code of the cell's ab:
its 5 nearest bins, 10 in the authors' code, weighted by ``exp(-d² / 2σ²)`` with σ = 5 and normalised (section 2.1). ab
is the mean of the cell's pixels, or as in the authors' code (``models/colorization_train_val_v2.prototxt``) that of its
first one; the mean of different colours is grayer than they are. ``v(Z) = w_q*`` with q*
the nearest bin, and ``w_q ∝ ((1 - λ) p̃_q + λ / Q)⁻¹``, ``Σ p̃_q w_q = 1`` (eq. 3 and 4), λ = 1/2, so that rare,
saturated colours count; with ``mask_gray`` 0 for images without colour (``resources/caffe_traininglayers.py``).

Bins: multiples of 10 in a and b to which some sRGB colour is nearest: Q = 261, found from the surface of the 8-bit RGB
cube. (A line of constant ab leaves the cube through its surface, so the surface has every ab of the interior.) The
paper's set, published as a file, has 313, among them bins that no sRGB colour is nearest to.

p̃: the paper uses the bin frequencies of ImageNet, smoothed in ab by a Gaussian of σ = 5. Here it is the mean soft code
over the batches of all ranks so far, about the last 1000: the soft code contains that Gaussian, no pass over the data
is needed, and it is part of the state that a run resumes with. A batch is counted before it is weighted.

The trunk sees ``L / 100`` in all three channels, normalised as colours would be (``trunk_input = "lightness"``);
evaluations give it the same input, from :func:`lightness`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sslfast.distributed import mean_over_ranks
from sslfast.methods.base import MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.reconstruction import PixelSpace, Reconstruction, ReconstructionConfig, clean_pixels
from sslfast.models import require_resnet, trunk_stride
from sslfast.ops import rgb_to_lab
from sslfast.views import View

GRID = 10
"""Distance of neighbouring bins in a and b."""
GRAY = 5.0
"""Largest |a| and |b| of the cells of an image that counts as gray."""
SIGMA = 5.0
"""Deviation of the soft code's Gaussian, in units of ab."""
_WINDOW = 1000  # batches in the moving average of the frequencies
_UNITS = 2**20  # fixed point of a soft code's weight: integer sums are the same in every order


@register_method
class Colorization(Reconstruction):
    """The method as a module: ``method(views, sample_ids, step=...)`` -> losses.

    State in buffers: ``frequencies``, p̃ as float64 ``[Q]``, and ``batches``, the number of batches in it.
    """

    @dataclass(kw_only=True)
    class Config(ReconstructionConfig):
        """Colorization as classification of ab bins."""

        name: ClassVar[str] = "colorization"
        trunk_input: ClassVar[Literal["rgb", "lightness"]] = "lightness"

        stride: int = 4
        """Side in pixels of the cells whose mean colour is predicted, a power of two."""
        neighbours: int = 5
        """Bins in the soft code of a cell."""
        cell_colour: Literal["mean", "first"] = "mean"
        """ab of a cell: the mean of its pixels, or that of its first one."""
        mask_gray: bool = False
        """Leave images whose cells all have |a| and |b| of at most 5 out of the loss."""
        uniform_share: float = 0.5
        """λ, share of the uniform distribution in the rebalancing: 1 weights all bins equally, 0 by inverse
        frequency alone."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            super().validate()
            if not 1 <= self.neighbours <= len(gamut_bins()):
                raise ValueError(f"method.neighbours must be in [1, {len(gamut_bins())}], got {self.neighbours}")
            size = self.image_view.crop.size
            if self.stride < 1 or self.stride & (self.stride - 1) or size % self.stride:
                raise ValueError(
                    "method.stride must be a power of two that divides method.image_view.crop.size="
                    f"{size}, got {self.stride}"
                )
            if not 0 < self.uniform_share <= 1:
                raise ValueError(
                    f"method.uniform_share must be in (0, 1], got {self.uniform_share}; at 0 colours that have not "
                    "occurred have no finite weight"
                )

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The lightness that the trunk sees, and the target: the mean colour of each soft code, at that
            lightness."""
            rgb = PixelSpace(self.image_view.augment).to_rgb(clean_pixels(views))
            lab, bins = rgb_to_lab(rgb), gamut_bins().to(rgb.device)
            cells, weights = soft_code(cell_colours(lab, self.stride, self.cell_colour), bins, self.neighbours)
            ab = (bins[cells] * weights[..., None]).sum(dim=-2)  # [B, h, w, 2]
            ab = ab.movedim(-1, 1).repeat_interleave(self.stride, dim=2).repeat_interleave(self.stride, dim=3)
            return {"input": lightness(rgb), "target": lab_to_rgb(torch.cat((lab[:, :1], ab), dim=1)).clamp(0.0, 1.0)}

        def build(self, context: MethodContext) -> "Colorization":
            """The module for a run."""
            model = require_resnet(context.model, purpose="method colorization")
            if self.stride > trunk_stride(model):
                raise ValueError(
                    f"method.stride must be at most {trunk_stride(model)}, the stride of {model.name} with stem "
                    f"{model.stem}, got {self.stride}"
                )
            return Colorization(self, context)

    bins: Tensor
    frequencies: Tensor
    batches: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        bins = gamut_bins()
        super().__init__(config, context, out_channels=len(bins), out_stride=config.stride)
        self.config = config
        self.register_buffer("bins", bins.clone(), persistent=False)
        self.register_buffer("frequencies", torch.full((len(bins),), 1 / len(bins), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` of one batch and ``loss_unweighted``, the same with v = 1 (detached).

        Args:
            views: "image".
            sample_ids: ``[B]`` int64; not used.
            step: not used.
        """
        rgb = self.pixel_space.to_rgb(clean_pixels(views))
        config = self.config
        colours = cell_colours(rgb_to_lab(rgb), config.stride, config.cell_colour)
        cells, weights = soft_code(colours, self.bins, config.neighbours)
        if self.training:
            self._count(cells, weights)
        scores = self.predict(self.pixel_space.from_rgb(lightness(rgb))).log_softmax(dim=1)
        losses = -(scores.movedim(1, -1).gather(-1, cells) * weights).sum(dim=-1)  # [B, h, w]
        rebalanced = rebalancing(self.frequencies, config.uniform_share).float()[cells[..., 0]]
        if config.mask_gray:
            rebalanced = rebalanced * (colours.abs().amax(dim=(1, 2, 3), keepdim=True)[..., 0] > GRAY)
        return {"loss": (rebalanced * losses).mean(), "loss_unweighted": losses.detach().mean()}

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.frequencies, self.batches]

    @torch.no_grad()
    def _count(self, cells: Tensor, weights: Tensor) -> None:
        """Adds a batch to the frequencies: the mean of the first batches, then an exponential moving average."""
        units = (weights * _UNITS).round().long()
        sums = torch.zeros_like(self.frequencies, dtype=torch.int64).index_add_(0, cells.flatten(), units.flatten())
        batch = mean_over_ranks(sums.double() / sums.sum())
        self.batches += 1
        self.frequencies.lerp_(batch, 1 / self.batches.clamp(max=_WINDOW).double())


def lightness(rgb: Tensor) -> Tensor:
    """CIE L / 100 in all three channels: sRGB float ``[N, 3, H, W]`` in 0..1 to float32 ``[N, 3, H, W]`` in 0..1."""
    return (rgb_to_lab(rgb)[:, :1] / 100).expand(-1, 3, -1, -1)


@cache
def gamut_bins() -> Tensor:
    """The ab bins: float32 ``[Q, 2]``, multiples of 10 to which some sRGB colour is nearest, by a, then b."""
    levels = torch.arange(256, dtype=torch.float32) / 255
    first, second = torch.meshgrid(levels, levels, indexing="ij")
    faces = []
    for channel in range(3):
        for level in (0.0, 1.0):
            face = [first, second]
            face.insert(channel, torch.full_like(first, level))
            faces.append(torch.stack(face))
    ab = rgb_to_lab(torch.stack(faces))[:, 1:].movedim(1, -1).reshape(-1, 2)
    return torch.unique((ab / GRID).round(), dim=0) * GRID


def cell_colours(lab: Tensor, stride: int, colour: Literal["mean", "first"] = "mean") -> Tensor:
    """ab of each cell, the mean or its first pixel's: Lab ``[B, 3, H, W]`` to ``[B, H / stride, W / stride, 2]``."""
    if colour == "first":
        return lab[:, 1:, ::stride, ::stride].movedim(1, -1)
    return torch.nn.functional.avg_pool2d(lab[:, 1:], stride).movedim(1, -1)


def soft_code(ab: Tensor, bins: Tensor, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """The nearest bins of colours and their weights.

    Args:
        ab: ``[..., 2]`` float32.
        bins: ``[Q, 2]`` float32.
        neighbours: n, bins in the code.

    Returns:
        Bins ``[..., n]`` int64, nearest first, and weights ``[..., n]`` float32 that sum to 1.
    """
    squared = (ab[..., None, 0] - bins[:, 0]).square_()  # [..., Q]: 0.8 GB for 256 images of 224 px
    squared += (ab[..., None, 1] - bins[:, 1]).square_()
    nearest, index = squared.topk(neighbours, dim=-1, largest=False)
    return index, (nearest / (-2 * SIGMA**2)).softmax(dim=-1)


def rebalancing(frequencies: Tensor, uniform_share: float) -> Tensor:
    """``w_q ∝ ((1 - λ) p̃_q + λ / Q)⁻¹`` with ``Σ p̃_q w_q = 1`` (Zhang 2016 eq. 4); ``[Q]`` float64."""
    weights = 1 / ((1 - uniform_share) * frequencies + uniform_share / len(frequencies))
    return weights / (frequencies * weights).sum()


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIE Lab (D65, 2 degrees) ``[N, 3, H, W]`` to sRGB, 0..1 inside the gamut; the inverse of ``rgb_to_lab``."""
    lightness, a, b = lab.unbind(dim=1)
    middle = (lightness + 16) / 116
    root = torch.stack((middle + a / 500, middle, middle - b / 200), dim=1)
    edge = 6 / 29
    xyz = torch.where(root > edge, root**3, 3 * edge**2 * (root - 4 / 29))
    white = torch.tensor((0.95047, 1.0, 1.08883), device=lab.device)[:, None, None]
    matrix = torch.tensor(
        ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)),
        dtype=torch.float64,
    )
    linear = torch.einsum("ij,njhw->nihw", matrix.inverse().to(lab), xyz * white)
    curved = 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear)
