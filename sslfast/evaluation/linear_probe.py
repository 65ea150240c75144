"""A linear probe on frozen features, trained to the optimum by L-BFGS: protocol ``linear-frozen-avgpool-lbfgs``.

Features are the pooled output of the trunk in eval mode on centre crops, standardised per column with the training
set's mean and deviation. One linear layer minimises

    ``mean_i CE(W x_i + b, y_i) + λ/2 ‖W‖²``

by full-batch L-BFGS, in float64; where features take more than :data:`BLOCK_BYTES` in float64, in float32 products of
blocks of rows, so that memory does not grow with the number of images. λ is the one of ``strengths`` with the best
accuracy on a fifth of the training images (of every class, drawn by Philox), the stronger at a tie; the layer is then
trained again on all of them. The problem is convex, so the result depends on no learning rate, schedule or
augmentation. It is not comparable with protocols that train the layer by SGD on augmented images
(:mod:`sslfast.evaluation.linear_sgd`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sslfast.device import resolve_device
from sslfast.distributed import own_rows, sum_over_ranks
from sslfast.evaluation.config import check_positive
from sslfast.evaluation.dataset import EvaluationSet
from sslfast.evaluation.folders import UnsuitableError
from sslfast.evaluation.results import accuracy_row, mean_and_spread, write_result
from sslfast.ops.philox import Stream, random_uint32

PROBE_PROTOCOL = "linear-frozen-avgpool-lbfgs"
L2_STRENGTHS = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
SOURCE = "this library's own: multinomial logistic regression; no published protocol trains it like this"
BLOCK_BYTES = 1 << 30
"""Of a block of features with its scores. Peak memory of the probe beside the features on disk is at most this, the
search's ``4 HISTORY (D + 1) C`` and the ``6 D²`` float64 numbers of second moments and axes: 2.6 GB for 2048 columns
and 1000 classes."""
HISTORY = 20
HELD_OUT = 5
"""One in this many training images of every class chooses λ."""


@dataclass(kw_only=True)
class LinearLayer:
    """``logits = x @ weight + bias`` for standardised features."""

    weight: Tensor
    """``[D, C]`` float64."""
    bias: Tensor
    """``[C]`` float64."""
    iterations: int
    """L-BFGS iterations of the last fit."""
    gradient: float
    """Largest absolute entry of the gradient there, in the search's own coordinates."""

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias


Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Blocks of standardised features ``[n, D]`` and labels ``[n]``, the same at every call."""


def fit_linear(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strength: float,
    start: LinearLayer | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> LinearLayer:
    """:func:`fit_blocks` of features in memory: ``[N, D]`` float64, centred, with int64 labels ``[N]``."""
    return fit_blocks(
        lambda: [(features, labels)],
        features.square().mean(0),
        count=len(features),
        classes=classes,
        strength=strength,
        start=start,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )


def fit_blocks(
    blocks: Blocks,
    moments: Tensor,
    *,
    count: int,
    classes: int,
    strength: float,
    axes: Tensor | None = None,
    start: LinearLayer | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> LinearLayer:
    """The minimum of ``mean CE(W x + b, y) + strength/2 ‖W‖²`` by L-BFGS with strong Wolfe line search.

    The search runs in ``V = W / s`` with ``s_j = (mean(x_j²) / C + strength)^-1/2``, about one over the root of the
    curvature along column j. That moves no optimum; it saves most iterations where columns are uncorrelated. Products
    have the type of the blocks; sums over blocks, weights and the search are float64.

    Args:
        blocks: features and labels.
        moments: ``[R]`` float64, the mean square of every coordinate over all images.
        count: images in all blocks, of all ranks where they share them.
        classes: C, columns of the layer.
        strength: λ, positive.
        axes: ``[D, R]``: the coordinates of the search; None: the columns of the features.
        start: where to start from; None: zeros. The optimum does not depend on it.
        max_iterations: bound.
        tolerance: stop where no entry of the gradient (with respect to V and b) is larger.
        total: the sum over ranks, where they share the images.

    Returns:
        The layer in the coordinates of ``axes``.
    """
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength=}")
    scale = (moments / classes + strength).rsqrt()[:, None]
    parameters = moments.new_zeros(len(moments) + 1, classes)
    if start is not None:
        parameters[:-1], parameters[-1] = start.weight / scale, start.bias
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        # The gradient in closed form: half the time of autograd, which keeps the [N, C] intermediates.
        weight = scale * parameters[:-1]
        columns = weight if axes is None else axes @ weight
        sums = moments.new_zeros(len(columns) + 2, classes)  # of x residual, of the residual, of the loss
        for features, labels in blocks():
            kind = features.dtype
            shares = torch.addmm(parameters[-1].to(kind), features, columns.to(kind)).log_softmax(1)
            own = labels[:, None]
            sums[-1, 0] -= shares.gather(1, own).sum(dtype=torch.float64)
            residual = shares.exp_().scatter_add_(1, own, -torch.ones_like(own, dtype=kind))
            sums[:-2] += features.T @ residual
            sums[-2] += residual.sum(0)
        sums = total(sums) / count
        gradient = torch.empty_like(parameters)
        towards = sums[:-2] if axes is None else axes.T @ sums[:-2]
        gradient[:-1] = scale * (towards + strength * weight)
        gradient[-1] = sums[-2]
        parameters.grad = gradient
        return sums[-1, 0] + strength / 2 * weight.square().sum()

    optimizer.step(closure)
    closure()
    assert parameters.grad is not None
    solution = parameters.detach()
    return LinearLayer(
        weight=scale * solution[:-1],
        bias=solution[-1],
        iterations=int(optimizer.state[parameters]["n_iter"]),
        gradient=parameters.grad.abs().max().item(),
    )


def principal_axes(second_moments: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal ``[D, R]`` and the eigenvalues ``[R]`` of ``xᵀx`` above rounding, R at most ``min(N, D)``.

    The penalty ``‖W‖²`` does not change under a rotation, and the optimum lies in the span of the features: the
    problem in these axes is the same, smaller where ``N < D``, and its columns are uncorrelated.
    """
    values, axes = torch.linalg.eigh(second_moments)
    kept = values > 1e-12 * values[-1].clamp_min(1e-300)
    return axes[:, kept], values[kept]


def held_out_mask(labels: Tensor, *, seed: int = 0) -> Tensor:
    """``[N]`` bool: a fifth (rounded down) of the rows of every class, by Philox draws of (seed, row).

    Raises:
        UnsuitableError: no class has five images.
    """
    count = len(labels)
    draws = random_uint32(torch.arange(count), 1, seed=seed, stream=Stream.PROBE_SPLIT, step=0)[:, 0]
    mask = torch.zeros(count, dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        mask[rows[draws[rows].argsort(stable=True)][: len(rows) // HELD_OUT]] = True
    if not mask.any():
        raise UnsuitableError(
            f"no class has {HELD_OUT} training images, so none can be held out to choose the L2 strength of a linear "
            "probe; give more images, or one strength with --strengths"
        )
    return mask


@dataclass(kw_only=True)
class Probe:
    """A trained linear probe and how its strength was chosen."""

    layer: LinearLayer
    mean: Tensor
    """``[D]`` of the training features."""
    deviation: Tensor
    """``[D]``; 1 where a column does not vary."""
    strength: float
    """Chosen λ."""
    held_out: dict[float, float]
    """λ -> accuracy on the held-out fifth; empty where only one was given."""

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``[N, C]`` float64 of features ``[N, D]``."""
        return self.layer((features.double() - self.mean) / self.deviation)


class StandardFeatures:
    """Features ``[N, D]`` of a tensor or a mapped file, standardised per column, in blocks of rows.

    Up to :data:`BLOCK_BYTES` in float64 they are kept on the device, in the coordinates of their principal axes. Larger
    ones are read again at every pass, in blocks of that size in float32, each rank its part; memory does not depend on
    their number.
    """

    def __init__(self, features: Tensor, labels: Tensor, *, classes: int, device: torch.device) -> None:
        self.features, self.labels, self.device = features, labels, device
        self.count, columns = features.shape
        row_bytes = 8 * (2 * columns + 3 * classes)
        self.block = max(1, BLOCK_BYTES // row_bytes)
        self.is_whole = self.count <= self.block
        self.rows = range(self.count) if self.is_whole else own_rows(self.count)
        self.dtype = torch.float64 if self.is_whole else torch.float32
        self.mean = torch.zeros(columns, dtype=torch.float64, device=device)
        self.deviation = torch.ones(columns, dtype=torch.float64, device=device)
        self._standardise()
        self.axes, values = principal_axes(self._second_moments())
        self.moments = values / self.count
        self._kept = (self._read(range(self.count)) @ self.axes) if self.is_whole else None

    def _read(self, rows: range) -> Tensor:
        found = self.features[rows.start : rows.stop].to(self.device).double()
        return (found - self.mean) / self.deviation

    def _parts(self) -> Iterator[range]:
        for start in range(self.rows.start, self.rows.stop, self.block):
            yield range(start, min(start + self.block, self.rows.stop))

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.is_whole else sum_over_ranks(x)

    def _standardise(self) -> None:
        sums = torch.zeros_like(self.mean)
        for part in self._parts():
            sums += self._read(part).sum(0)
        mean = self._sum(sums) / self.count
        if not bool(mean.isfinite().all()):
            raise ValueError("features hold infinite values or NaN; the encoder's weights are broken")
        self.mean, squares = mean, torch.zeros_like(mean)
        for part in self._parts():
            squares += self._read(part).square().sum(0)
        deviation = (self._sum(squares) / self.count).sqrt()
        # A column that does not vary but for rounding carries nothing; dividing by its deviation would make it noise.
        self.deviation = torch.where(deviation > 1e-7 * (1 + mean.abs()), deviation, 1.0)

    def _second_moments(self) -> Tensor:
        columns = len(self.mean)
        moments = torch.zeros(columns, columns, dtype=torch.float64, device=self.device)
        for part in self._parts():
            x = self._read(part)
            moments += x.T @ x
        return self._sum(moments)

    def blocks(self, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks in the type and coordinates of the search, of the rows that the mask ``chosen`` ``[N]`` names."""
        for part in self._parts():
            inside = slice(part.start, part.stop)
            x = self._read(part).to(self.dtype) if self._kept is None else self._kept[inside]
            labels = self.labels[inside].to(self.device)
            if chosen is not None:
                mask = chosen[inside].to(self.device)
                x, labels = x[mask], labels[mask]
            yield x, labels

    def fit(
        self, *, classes: int, strength: float, tolerance: float, chosen: Tensor | None, start: LinearLayer | None
    ) -> LinearLayer:
        """The optimum on the chosen rows, in the coordinates of ``axes``."""
        count = self.count if chosen is None else int(chosen.sum())
        kept = list(self.blocks(chosen)) if self.is_whole else None
        return fit_blocks(
            lambda: self.blocks(chosen) if kept is None else kept,
            self.moments,
            count=count,
            classes=classes,
            strength=strength,
            axes=None if self.is_whole else self.axes,
            start=start,
            # float32: the gradient's rounding, times the scale of the search's coordinates
            tolerance=tolerance if self.is_whole else max(tolerance, 1e-4),
            total=self._sum,
        )

    def accuracy(self, layer: LinearLayer, chosen: Tensor) -> float:
        """Share of the chosen rows that a layer in the coordinates of ``axes`` classifies rightly."""
        weight = layer.weight if self.is_whole else self.axes @ layer.weight
        hits = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, labels in self.blocks(chosen):
            hits += ((x @ weight.to(x.dtype) + layer.bias.to(x.dtype)).argmax(1) == labels).sum()
        return self._sum(hits).item() / int(chosen.sum())


def train_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    seed: int = 0,
    device: torch.device | None = None,
) -> Probe:
    """Choose λ on a held-out fifth, then train on everything.

    Args:
        features: ``[N, D]`` float; may be a mapped file (:class:`StandardFeatures`).
        labels: ``[N]`` int64 in ``[0, classes)``.
        classes: number of classes.
        strengths: candidates for λ, each positive.
        seed: of the held-out draw.
        device: to train on; None: that of the features.

    Raises:
        ValueError: no or a non-positive strength, non-finite features, too few images to hold any out.
    """
    check_positive("strengths", strengths)
    found = StandardFeatures(features, labels, classes=classes, device=device or features.device)
    ordered = sorted(set(strengths), reverse=True)
    held_out: dict[float, float] = {}
    best = ordered[0]
    if len(ordered) > 1:
        out = held_out_mask(labels.cpu(), seed=seed)
        layer = None
        for strength in ordered:  # from strong to weak, each starting at the one before
            layer = found.fit(classes=classes, strength=strength, tolerance=1e-4, chosen=~out, start=layer)
            held_out[strength] = found.accuracy(layer, out)
        best = max(ordered, key=lambda strength: held_out[strength])
    layer = found.fit(classes=classes, strength=best, tolerance=1e-5, chosen=None, start=None)
    layer.weight = found.axes @ layer.weight
    return Probe(layer=layer, mean=found.mean, deviation=found.deviation, strength=best, held_out=held_out)


@torch.no_grad()
def probe_scores(probe: Probe, features: Tensor, labels: Tensor, *, classes: int) -> tuple[float, float, float]:
    """Top-1, top-5 and mean cross-entropy of a probe on ``[N, D]`` features, a block of rows at a time."""
    device = probe.mean.device
    step = max(1, BLOCK_BYTES // (8 * (2 * features.shape[1] + 3 * classes)))
    top1 = top5 = loss = 0.0
    for first in range(0, len(features), step):
        own = labels[first : first + step].to(device)
        logits = probe(features[first : first + step].to(device))
        hits = logits.topk(min(5, classes), dim=1).indices == own[:, None]
        top1 += hits[:, 0].sum().item()
        top5 += hits.sum().item()
        loss += cross_entropy(logits, own, reduction="sum").item()
    return top1 / len(features), top5 / len(features), loss / len(features)


def linear_result(
    evaluation: EvaluationSet,
    *,
    strengths: Sequence[float] = L2_STRENGTHS,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    output: Path | None = None,
) -> dict[str, Any]:
    """Accuracy of the probe on features that are already computed; written where ``output`` is given."""
    chosen = resolve_device(device)
    train_labels, val_labels = evaluation.train_labels, evaluation.val_labels
    classes = len(evaluation.classes)
    rows = []
    for name, features in evaluation.train.items():
        pairs, losses, probes = [], [], []
        for seed in seeds:
            probe = train_probe(features, train_labels, classes=classes, strengths=strengths, seed=seed, device=chosen)
            top1, top5, loss = probe_scores(probe, evaluation.val[name], val_labels, classes=classes)
            pairs.append((top1, top5))
            losses.append(loss)
            probes.append(probe)
        first = probes[0]
        rows.append(
            {
                "encoder": name,
                "protocol": PROBE_PROTOCOL,
                "features": features.shape[1],
                **accuracy_row(pairs, len(val_labels)),
                "validation_loss": mean_and_spread(losses)[0],
                "strength": first.strength,
                "strength_of_seeds": [probe.strength for probe in probes],
                "held_out_top1": {f"{key:g}": value for key, value in first.held_out.items()},
                "iterations": first.layer.iterations,
                "largest_gradient": max(probe.layer.gradient for probe in probes),
            }
        )
    result = {
        "protocol": PROBE_PROTOCOL,
        "source": SOURCE,
        "strengths": list(strengths),
        "seeds": list(seeds),
        "results": rows,
        **evaluation.facts,
    }
    if output is not None:
        write_result(result, output)
    return result
