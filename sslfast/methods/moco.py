"""MoCo: momentum contrast (v1: He et al., CVPR 2020; v2: Chen, Fan, Girshick & He, arXiv 2003.04297).

Objective (He et al. eq. 1): ``loss = -log( exp(q·k/τ) / (exp(q·k/τ) + sum_j exp(q·n_j/τ)) )``, where q is the embedding
of one view of an image by the trained encoder, k that of another view by an encoder whose weights are a moving average
of the trained ones (eq. 2: ``θ_k = m θ_k + (1 - m) θ_q``), and ``n_j`` are the K newest keys of earlier batches, a
queue. No gradient reaches keys or queue. Version 2 has an MLP head, τ = 0.2 and, in its recipe, blur and a cosine
schedule.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.distributed import gather_rows, rank, world_size
from sslfast.methods.base import BaseConfig, BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.momentum import rising_momentum
from sslfast.models import MLPHead, build_trunk, initial_rows, seeded
from sslfast.ops import bank_enqueue_, bank_nce_dense, ema_update_
from sslfast.ops.philox import Stream, random_uint32
from sslfast.views import View, ViewConfig

QUERY, KEY = "query", "key"


@register_method
class MoCo(Method):
    """The method as a module. State: both encoders, ``queue`` (random unit vectors at first) and ``head``, the
    position of its oldest key.

    After the step the key encoder is updated, then the batch's keys replace the oldest of the queue; under several
    processes the keys of all ranks, in the order of ranks.
    """

    @dataclass(kw_only=True)
    class Config(BaseConfig):
        """MoCo v1; v2 with ``projection="mlp"`` and ``temperature=0.2``."""

        name: ClassVar[str] = "moco"

        projection: Literal["linear", "mlp"] = "linear"
        """Head on the trunk: linear (v1), or two layers with a ReLU between, as wide as the trunk's features (v2)."""
        dimensions: int = 128
        """Columns of the queue."""
        temperature: float = 0.07
        """τ of the scores; 0.2 in v2."""
        queue_size: int = 65536
        """K, keys in the queue; need not be a multiple of the batch size."""
        momentum: float = 0.999
        """m, factor of the key encoder's old weights."""
        momentum_schedule: Literal["constant", "cosine"] = "constant"
        """cosine: m rises from ``momentum`` to 1 over the run (MoCo v3, BYOL)."""
        shuffle: bool = True
        """Encode keys in an order shuffled over ranks, so that a query and its key do not share BatchNorm statistics
        (He et al. section 3.3). There is nothing to shuffle where one process has one batch: see
        ``batchnorm_samples``."""
        batchnorm_samples: int = 0
        """Samples that BatchNorm takes its statistics from: a process encodes its samples in equal parts of at least as
        many, so that shuffling works in one process too. 32 in the authors' runs, on 8 GPUs. 0: all of a process."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The view that query and key are two draws of."""

        def views(self) -> dict[str, ViewConfig]:
            """Two draws of the image view."""
            return {QUERY: self.image_view, KEY: self.image_view}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "queue_size")
            self.check_directions("dimensions")
            self.check_at_least(0, "batchnorm_samples")
            self.check_positive("temperature")
            if not 0 <= self.momentum <= 1:
                raise ValueError(f"method.momentum must be in [0, 1], got {self.momentum}")
            self.check_whole_image()

        def parts(self, samples: int) -> int:
            """Parts that ``samples`` of a process are encoded in."""
            return max(1, samples // self.batchnorm_samples) if self.batchnorm_samples else 1

        def remarks(self, split: BatchSplit) -> list[str]:
            """Whether a query and its key are normalised with the same samples."""
            alone = split.ranks == 1 and self.parts(split.samples) == 1
            if self.shuffle and not alone and not split.sync_batchnorm:
                return []
            return [
                "queries and keys are normalised with the same samples, which gives positives away (He et al. 2020, "
                "section 3.3): use several processes without sync_batchnorm, or method.batchnorm_samples=32, and "
                "method.shuffle"
            ]

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where the queue does not hold the keys of one batch."""
            if self.queue_size < split.batch_size:
                raise ValueError(
                    f"method.queue_size must be at least batch_size={split.batch_size}, whose keys enter the queue "
                    f"together, got {self.queue_size}; raise it or lower batch_size"
                )

        def build(self, context: MethodContext) -> "MoCo":
            """The module for a run."""
            return MoCo(self, context)

    queue: Tensor
    head: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.seed, self.total_steps = context.seed, context.total_steps
        self.trunk = build_trunk(context.model, seed=context.seed)
        features, dimensions = self.trunk.out_features, config.dimensions
        with seeded(context.seed + 1):
            self.projection: nn.Module = (
                nn.Linear(features, dimensions)
                if config.projection == "linear"
                else MLPHead(features, features, dimensions)
            )
        self.key_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.key_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.register_buffer("queue", initial_rows(config.queue_size, dimensions, seed=context.seed))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))
        self._pending: list[Tensor] = []
        self._step: int | Tensor = 0

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "query" and "key".
            sample_ids: ``[B]`` int64; not used.
            step: of the run: with the seed it fixes the shuffled order.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``similarity``, the mean of q·k.
        """
        queries = self._in_parts(self._query, views[QUERY].pixels)
        keys, all_keys = self._encode_keys(views[KEY].pixels, step)
        self._pending.append(all_keys)
        self._step = step
        similarity = (queries * keys).sum(dim=1)  # [B]
        loss = queue_loss(queries, similarity, self.queue, temperature=self.config.temperature)
        return {"loss": loss.mean(), "similarity": similarity.detach().mean()}

    def after_step(self) -> None:
        """Updates the key encoder with the weights of the step just taken, and enqueues the batch's keys."""
        if not self._pending:
            raise RuntimeError("MoCo.after_step was called before a forward pass")
        momentum: float | Tensor = self.config.momentum
        if self.config.momentum_schedule == "cosine":
            momentum = rising_momentum(self.config.momentum, self._step, self.total_steps, device=self.queue.device)
        ema_update_(
            chain(self.key_trunk.parameters(), self.key_projection.parameters()),
            chain(self.trunk.parameters(), self.projection.parameters()),
            momentum=momentum,
        )
        bank_enqueue_(self.queue, self.head, torch.cat(self._pending))
        self._pending = []

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.queue, self.head]

    @torch.no_grad()
    def _encode_keys(self, pixels: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys of this rank's images ``[B, D]``, and of all ranks' in their order ``[ranks * B, D]``, fp32."""
        alone = world_size() == 1 and self.config.parts(len(pixels)) == 1
        if alone or not self.config.shuffle:
            keys = self._in_parts(self._key, pixels)
            return keys, gather_rows(keys)
        own = slice(rank() * len(pixels), (rank() + 1) * len(pixels))
        gathered = gather_rows(pixels)
        order = batch_order(len(gathered), seed=self.seed, step=step, device=pixels.device)
        shuffled = gather_rows(self._in_parts(self._key, gathered[order[own]]))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys[own], keys

    def _in_parts(self, encode: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """``[B, D]``: each part with BatchNorm statistics of its own."""
        parts = pixels.tensor_split(self.config.parts(len(pixels)))
        return torch.cat([encode(part) for part in parts])

    def _query(self, pixels: Tensor) -> Tensor:
        return normalize(self.projection(self.trunk(pixels)).float(), dim=1)

    def _key(self, pixels: Tensor) -> Tensor:
        return normalize(self.key_projection(self.key_trunk(pixels)).float(), dim=1)


def queue_loss(queries: Tensor, similarity: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """``[B]`` losses ``log(exp(q·k/τ) + sum_j exp(q·n_j/τ)) - q·k/τ``: InfoNCE of one positive and the K keys.

    Args:
        queries: ``[B, D]`` fp32 (fp64 for an fp64 queue).
        similarity: ``[B]``, q·k of each query and its key.
        queue: ``[K, D]``; takes no gradient.
        temperature: τ > 0.
    """
    no_positive = torch.full((len(queries),), -1, device=queries.device)  # no positive lies in the queue
    # ``[1, B]`` log-sum-exp over the queue
    negatives, _ = bank_nce_dense(queries[None], queue, no_positive, temperature=temperature)
    positive = similarity / temperature
    return torch.logaddexp(negatives[0], positive) - positive


def batch_order(count: int, *, seed: int, step: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` int64: a permutation of 0 .. count-1, a function of seed and step."""
    slots = torch.arange(count, device=device)
    return random_uint32(slots, 1, seed=seed, stream=Stream.BATCH_ORDER, step=step)[:, 0].argsort(stable=True)
