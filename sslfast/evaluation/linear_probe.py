"""A linear probe on frozen features, trained to the optimum by L-BFGS: protocol ``linear-frozen-avgpool-lbfgs``.

Features are the pooled output of the trunk in eval mode on centre crops, standardised per column with the training
set's mean and deviation. One linear layer minimises

    ``mean_i CE(W x_i + b, y_i) + λ/2 ‖W‖²``

by full-batch L-BFGS in float64. λ is the one of ``strengths`` with the best accuracy on a fifth of the training
images (of every class, drawn by Philox), the stronger at a tie; the layer is then trained again on all of them. The
problem is convex, so the result depends on no learning rate, schedule or augmentation. It is not comparable with
protocols that train the layer by SGD on augmented images (:mod:`sslfast.evaluation.linear_sgd`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sslfast.device import resolve_device
from sslfast.evaluation.config import check_positive
from sslfast.evaluation.dataset import EvaluationSet
from sslfast.evaluation.folders import UnsuitableError
from sslfast.evaluation.results import accuracy_row, mean_and_spread, write_result
from sslfast.ops.philox import Stream, random_uint32

PROBE_PROTOCOL = "linear-frozen-avgpool-lbfgs"
L2_STRENGTHS = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
SOURCE = "this library's own: multinomial logistic regression; no published protocol trains it like this"
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
    """The minimum of ``mean CE(W x + b, y) + strength/2 ‖W‖²`` by L-BFGS with strong Wolfe line search.

    The search runs in ``V = W / s`` with ``s_j = (mean(x_j²) / C + strength)^-1/2``, about one over the root of the
    curvature along column j. That moves no optimum; it saves most iterations where columns are uncorrelated.

    Args:
        features: ``[N, D]`` float64, centred.
        labels: ``[N]`` int64 in ``[0, classes)``.
        classes: C, columns of the layer.
        strength: λ, positive.
        start: where to start from; None: zeros. The optimum does not depend on it.
        max_iterations: bound.
        tolerance: stop where no entry of the gradient (with respect to V and b) is larger.
    """
    if not strength > 0:
        raise ValueError(f"strength must be positive, got {strength=}")
    scale = (features.square().mean(0) / classes + strength).rsqrt()[:, None]
    parameters = features.new_zeros(features.shape[1] + 1, classes)
    if start is not None:
        parameters[:-1], parameters[-1] = start.weight / scale, start.bias
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    one_hot = torch.nn.functional.one_hot(labels, classes).to(features.dtype)

    def closure() -> Tensor:
        # The gradient in closed form: half the time of autograd, which keeps the [N, C] intermediates.
        with torch.no_grad():
            weight = scale * parameters[:-1]
            log_shares = torch.addmm(parameters[-1], features, weight).log_softmax(1)
            loss = -(log_shares * one_hot).sum() / len(labels) + strength / 2 * weight.square().sum()
            residual = (log_shares.exp() - one_hot) / len(labels)
            gradient = torch.empty_like(parameters)
            gradient[:-1] = scale * (features.T @ residual + strength * weight)
            gradient[-1] = residual.sum(0)
            parameters.grad = gradient
        return loss

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


def principal_axes(features: Tensor) -> Tensor:
    """Orthonormal ``[D, R]``: eigenvectors of ``xᵀx`` with eigenvalues above rounding, R at most ``min(N, D)``.

    The penalty ``‖W‖²`` does not change under a rotation, and the optimum lies in the span of the features: the
    problem in these axes is the same, smaller where ``N < D``, and its columns are uncorrelated.
    """
    values, axes = torch.linalg.eigh(features.T @ features)
    return axes[:, values > 1e-12 * values[-1].clamp_min(1e-300)]


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


def train_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strengths: Sequence[float] = L2_STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Choose λ on a held-out fifth, then train on everything.

    Args:
        features: ``[N, D]`` float.
        labels: ``[N]`` int64 in ``[0, classes)``, on the same device.
        classes: number of classes.
        strengths: candidates for λ, each positive.
        seed: of the held-out draw.

    Raises:
        ValueError: no or a non-positive strength, non-finite features, too few images to hold any out.
    """
    check_positive("strengths", strengths)
    if not bool(features.isfinite().all()):
        raise ValueError("features hold infinite values or NaN; the encoder's weights are broken")
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A column that does not vary but for rounding carries nothing; dividing by its deviation would make it noise.
    deviation = torch.where(deviation > 1e-7 * (1 + mean.abs()), deviation, 1.0)
    standard = (features - mean) / deviation
    axes = principal_axes(standard)
    rotated = standard @ axes
    ordered = sorted(set(strengths), reverse=True)
    held_out: dict[float, float] = {}
    best = ordered[0]
    if len(ordered) > 1:
        out = held_out_mask(labels.cpu(), seed=seed).to(labels.device)
        layer = None
        for strength in ordered:  # from strong to weak, each starting at the one before
            layer = fit_linear(
                rotated[~out], labels[~out], classes=classes, strength=strength, start=layer, tolerance=1e-4
            )
            held_out[strength] = (layer(rotated[out]).argmax(1) == labels[out]).double().mean().item()
        best = max(ordered, key=lambda strength: held_out[strength])
    layer = fit_linear(rotated, labels, classes=classes, strength=best)
    layer.weight = axes @ layer.weight
    return Probe(layer=layer, mean=mean, deviation=deviation, strength=best, held_out=held_out)


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
    train_labels, val_labels = evaluation.train_labels.to(chosen), evaluation.val_labels.to(chosen)
    classes = len(evaluation.classes)
    rows = []
    for name, features in evaluation.train.items():
        pairs, losses, probes = [], [], []
        for seed in seeds:
            probe = train_probe(features.to(chosen), train_labels, classes=classes, strengths=strengths, seed=seed)
            logits = probe(evaluation.val[name].to(chosen))
            hits = logits.topk(min(5, classes), dim=1).indices == val_labels[:, None]
            pairs.append((hits[:, 0].double().mean().item(), hits.any(1).double().mean().item()))
            losses.append(cross_entropy(logits, val_labels).item())
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
