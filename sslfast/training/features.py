"""Statistics of the features of a training step, which show a collapse: taken from the step's own forward pass."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.distributed import gather_rows, world_size
from sslfast.methods import Method
from sslfast.models import ResNetTrunk

SAMPLES = 256
"""Maximum number of feature vectors that the statistics are of, over all processes."""
COLLAPSED_STD = 0.01
"""A spread below it is a collapse: a mean cosine above 0.9999. An untrained ResNet-18 and 50 in training mode have 0.27
to 0.48 on noise."""


class CollapseError(RuntimeError):
    """The features of all images have become the same."""


def feature_statistics(features: Tensor) -> dict[str, Tensor]:
    """Spread, effective rank and mean cosine of feature vectors.

    With ``ẑ_i = z_i / |z_i|`` and the singular values ``σ_k`` of the matrix z:

    - ``std = (D mean_j Var_i ẑ_ij)^1/2``: 1 where directions are uniform on the sphere, 0 where all are the
      same (SimSiam, Chen & He 2021, section 4.1, times ``√D``);
    - ``rank = exp(-Σ_k p_k log p_k)`` with ``p_k = σ_k / Σ σ``: between 1 and ``min(N, D)`` (RankMe, Garrido et al.
      2023, equation 1);
    - ``cosine``: mean of ``ẑ_i · ẑ_k`` over pairs of different vectors.

    Args:
        features: ``[N, D]`` float, N at least 2.

    Returns:
        ``std``, ``rank``, ``cosine``: 0-d float64, NaN where a feature is not finite.
    """
    is_finite = features.isfinite().all()
    features = torch.where(is_finite, features.double(), 0.0)  # eigvalsh raises for values that are not finite
    directions = normalize(features, dim=1)
    count = len(features)
    variance = directions.var(dim=0, correction=0).sum()
    cosine = (directions.sum(0).square().sum() - directions.square().sum()) / (count * (count - 1))
    wide = features.shape[1] > count
    gram = features @ features.T if wide else features.T @ features
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    found = {"std": variance.sqrt(), "rank": torch.special.entr(shares).sum().exp(), "cosine": cosine}
    return {name: torch.where(is_finite, value, torch.nan) for name, value in found.items()}


class FeatureWatch:
    """Statistics of the trunk's features, and of the embeddings that a method's loss compares, at a log record.

    Hooks keep the pooled output of the last forward pass of a step: at most :data:`SAMPLES` vectors, no further pass.
    Where a method calls its trunk several times in a step, they are those of the last call. Under several processes
    each gives an equal share.

    Args:
        method: ``trunk``, and the module that ``method.embedding_head`` names, if it has one.
        stop: raise CollapseError at a collapse, instead of one line.
        report: takes that line.
    """

    def __init__(self, method: Method, *, stop: bool, report: Callable[[str], None]) -> None:
        self._stop, self._report, self._is_reported = stop, report, False
        self._share = max(1, SAMPLES // world_size())
        self._seen: dict[str, Tensor] = {}
        trunk: nn.Module = method.trunk
        watched = {"feature": trunk.layer4 if isinstance(trunk, ResNetTrunk) else trunk}
        head = getattr(method, method.embedding_head, None)
        if isinstance(head, nn.Module):
            watched["embedding"] = head
        for name, module in watched.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim >= 2:
                some = output.detach()[: self._share]
                self._seen[name] = some.flatten(2).mean(2) if some.ndim > 2 else some

        return keep

    def read(self, step: int) -> dict[str, float]:
        """``feature_std``, ``feature_rank``, ``feature_cosine`` of the last step; likewise ``embedding_``. Empty where
        there are fewer than two vectors. Waits for the device; every rank calls it.

        Raises:
            CollapseError: with ``stop``, where a spread is below :data:`COLLAPSED_STD`.
        """
        values: dict[str, float] = {}
        for name, features in self._seen.items():
            features = gather_rows(features.float().contiguous())
            if len(features) < 2:
                continue
            found = feature_statistics(features)
            numbers = zip(found, torch.stack([*found.values()]).tolist(), strict=True)
            values.update({f"{name}_{key}": value for key, value in numbers if math.isfinite(value)})
        self._seen.clear()
        self._check(step, values)
        return values

    def _check(self, step: int, values: dict[str, float]) -> None:
        for name, what in (("feature", "features"), ("embedding", "embeddings")):
            if not values.get(f"{name}_std", 1.0) < COLLAPSED_STD:
                continue
            line = (
                f"step {step}: the {what} of different images are the same (mean cosine "
                f"{values[f'{name}_cosine']:.6f}, spread {values[f'{name}_std']:.2g}), so the method has collapsed; "
                "lower the learning rate, lengthen the warm-up, or check its temperature and momentum"
            )
            if self._stop:
                raise CollapseError(line)
            if not self._is_reported:
                self._is_reported = True
                self._report(line)
