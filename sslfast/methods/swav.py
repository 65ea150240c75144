"""SwAV: swapping assignments between views (Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, NeurIPS 2020).

Objective (eq. 1 and 2), with several small crops (section 3.3): every crop predicts the codes of the two large ones,
``loss = 1 / (2 (V - 1)) sum_(i < 2) sum_(v != i) -q_i · log softmax(C z_v / τ)``, where z are unit embeddings behind an
MLP, the rows of C unit prototypes, and the codes q an equal partition of the batch over the prototypes: Sinkhorn's
iterations on ``exp(C z / ε)`` (eq. 3 to 5; ``methods/shared/sinkhorn.py``). No gradient reaches the codes.

Small batches: embeddings of earlier batches, a queue, take part in the partition from epoch ``queue_start_epoch`` on,
once it is full (section 4.3). Prototypes stay as they are in the first steps (appendix A), and are scaled to norm 1
after each. Under several processes the partition is that of all ranks' samples, and BatchNorm should be synchronised
(``sync_batchnorm``, which the recipe sets). Crops of one size are one batch for BatchNorm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.distributed import gather_rows, own_rows
from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.sinkhorn import sinkhorn_codes
from sslfast.methods.shared.views import MultiCropConfig, encode_crops, swapped_cross_entropy, upcast
from sslfast.models import MLPHead, build_trunk, full_precision, seeded
from sslfast.ops import bank_enqueue_
from sslfast.optim import ParameterOptions
from sslfast.views import View


@register_method
class SwAV(Method):
    """The method as a module. State: the weights, ``queue`` (embeddings of the two large crops side by side), ``head``,
    the position of its oldest row, and ``queued``, the rows that entered it since ``queue_start_epoch``."""

    @dataclass(kw_only=True)
    class Config(MultiCropConfig):
        """SwAV."""

        name: ClassVar[str] = "swav"

        hidden_features: int = 2048
        """Width of the projection's hidden layer."""
        dimensions: int = 128
        """Dimensions of an embedding."""
        prototypes: int = 3000
        """K."""
        temperature: float = 0.1
        """τ of the predictions."""
        epsilon: float = 0.05
        """ε of the codes; smaller ones are sharper."""
        iterations: int = 3
        """Iterations of Sinkhorn."""
        queue_size: int = 0
        """Samples of earlier batches in the partition; 0: none."""
        queue_start_epoch: int = 15
        """First epoch whose batches enter the queue; it is used once it is full."""
        frozen_steps: int = 313
        """Steps from the beginning of the run that leave the prototypes as they are."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features", "iterations")
            self.check_directions("dimensions")
            self.check_at_least(2, "prototypes")
            self.check_at_least(0, "queue_size", "queue_start_epoch", "frozen_steps")
            self.check_positive("temperature", "epsilon")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where there is nothing to partition, or the queue does not hold one batch."""
            self.check_contrasted(split)
            split.check_normalised("swav's projection", per_sample=2 + self.local_crops)
            if 0 < self.queue_size < split.batch_size:
                raise ValueError(
                    f"method.queue_size must be 0 or at least batch_size={split.batch_size}, which enters the queue "
                    f"together, got {self.queue_size}; change it or lower batch_size"
                )

        def build(self, context: MethodContext) -> "SwAV":
            """The module for a run."""
            return SwAV(self, context)

    queue: Tensor
    head: Tensor
    queued: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.queue_start = config.queue_start_epoch * context.steps_per_epoch
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.projection = MLPHead(
                self.trunk.out_features, config.hidden_features, config.dimensions, hidden_norm=True
            )
            self.prototypes = nn.Linear(config.dimensions, config.prototypes, bias=False)
        self._normalise_prototypes()
        self.register_buffer("queue", torch.zeros(config.queue_size, 2 * config.dimensions))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        self._pending: list[Tensor] = []
        self._step: int | Tensor | None = None

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first", "second" and the small crops.
            sample_ids: ``[B]`` int64; not used.
            step: of the run: the queue begins with the epoch.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``code_entropy``, the mean entropy of a code in nats:
            log K where codes are uniform, 0 where each is one prototype.
        """
        self._step = step
        features = encode_crops(self.trunk, [views[name].pixels for name in self.config.views()])
        embeddings = normalize(upcast(self.projection(features)), dim=1)
        with full_precision(embeddings.device):
            scores = self.prototypes(embeddings).unflatten(0, (-1, len(sample_ids)))  # [V, B, K]
        large = embeddings.detach().unflatten(0, (-1, len(sample_ids)))[:2]
        codes = torch.stack([self._codes(scores[crop].detach(), crop) for crop in range(2)])
        if self.config.queue_size:
            self._pending.append(gather_rows(torch.cat((large[0], large[1]), dim=1)))
        loss = swapped_cross_entropy(scores / self.config.temperature, codes)
        return {"loss": loss.mean(), "code_entropy": torch.special.entr(codes).sum(dim=2).mean()}

    def after_step(self) -> None:
        """Scales the prototypes to norm 1, and enqueues the batch's embeddings."""
        if self._step is None:
            raise RuntimeError("SwAV.after_step was called before a forward pass")
        self._normalise_prototypes()
        if self._pending:
            rows = torch.cat(self._pending)
            bank_enqueue_(self.queue, self.head, rows)
            begun = torch.as_tensor(self._step, device=self.queued.device) >= self.queue_start
            self.queued += begun * len(rows)
        self._pending, self._step = [], None

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The prototypes are frozen at the beginning."""
        return {"prototypes": ParameterOptions(frozen_steps=self.config.frozen_steps)}

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.queue, self.head, self.queued]

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(normalize(self.prototypes.weight, dim=1))

    @torch.no_grad()
    def _codes(self, scores: Tensor, crop: int) -> Tensor:
        """``[B, K]`` codes of this rank's part of the batch, from its scores ``[B, K]`` for one of the large crops."""
        config, count = self.config, len(scores)
        if not config.queue_size:
            return sinkhorn_codes(scores, epsilon=config.epsilon, iterations=config.iterations)
        own = own_rows(config.queue_size)  # every rank scores its part of the queue
        kept = self.queue[own.start : own.stop].unflatten(1, (2, -1))[:, crop]
        with full_precision(scores.device):
            earlier = self.prototypes(kept)
        used = (self.queued >= config.queue_size).to(scores.dtype)
        weights = torch.cat((scores.new_ones(count), used.expand(len(own))))
        codes = sinkhorn_codes(
            torch.cat((scores, earlier)), epsilon=config.epsilon, iterations=config.iterations, weights=weights
        )
        return codes[:count]
