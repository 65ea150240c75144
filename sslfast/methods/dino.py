"""DINO: self-distillation with no labels (Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin, ICCV 2021).

Objective (eq. 2 and 3, algorithm 1): every crop of an image predicts, through the student, the teacher's distribution
of the two large ones, ``loss = 1 / (2 (V - 1)) sum_(i < 2) sum_(v != i) -P_t(x_i) · log P_s(x_v)`` with ``P_s =
softmax(g_s / τ_s)`` and ``P_t = softmax((g_t - c) / τ_t)`` over K outputs. The teacher's weights are a moving average
of the student's, whose momentum rises to 1 along a cosine; the centre c is a moving average of its outputs, ``c = m c +
(1 - m) mean g_t`` over all ranks (eq. 4); τ_t grows linearly over the first epochs. No gradient reaches the teacher.

Head (appendix C): three layers with GELU, unit vectors of the bottleneck, and a last layer of unit rows without bias,
which stays as it is in the first epoch. Crops of one size are one batch for BatchNorm, in both networks. Evaluations
and ``sslfast.load`` use the teacher's trunk, as the paper does.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from sslfast.distributed import mean_over_ranks
from sslfast.methods.base import BatchSplit, Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.momentum import rising_momentum
from sslfast.methods.shared.views import FIRST, SECOND, MultiCropConfig, encode_crops, swapped_cross_entropy, upcast
from sslfast.models import MLPHead, build_trunk, full_precision, seeded
from sslfast.ops import ema_update_
from sslfast.optim import ParameterOptions
from sslfast.views import View


class DINOHead(nn.Module):
    """``[B, C]`` to ``[B, K]`` fp32: an MLP to a unit vector, and its products with K unit rows."""

    def __init__(
        self, in_features: int, hidden_features: int, bottleneck_features: int, out_features: int, *, norm: bool
    ) -> None:
        super().__init__()
        self.mlp = MLPHead(
            in_features, hidden_features, bottleneck_features, layers=3, hidden_norm=norm, activation=nn.GELU
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = nn.Linear(bottleneck_features, out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = normalize(upcast(self.mlp(features)), dim=1)
        return upcast(linear(hidden, normalize(self.last_layer.weight, dim=1)))


@register_method
class DINO(Method):
    """The method as a module. State: student and teacher (trunk and head each), and ``centre`` ``[K]`` of the teacher's
    outputs."""

    @dataclass(kw_only=True)
    class Config(MultiCropConfig):
        """DINO."""

        name: ClassVar[str] = "dino"

        hidden_features: int = 2048
        """Width of the head's hidden layers."""
        bottleneck_features: int = 256
        """Dimensions of the unit vectors before the last layer."""
        dimensions: int = 65536
        """K, outputs."""
        head_norm: bool = False
        """BatchNorm in the head's hidden layers."""
        temperature: float = 0.1
        """τ_s of the student."""
        teacher_temperature: float = 0.04
        """τ_t of the teacher behind its warm-up; above 0.07 training is unstable (appendix D)."""
        warmup_teacher_temperature: float = 0.04
        """τ_t in the first epoch."""
        teacher_warmup_epochs: int = 0
        """Epochs over which τ_t grows."""
        momentum: float = 0.996
        """Factor of the teacher's old weights at the first step; it rises to 1 by the last one."""
        center_momentum: float = 0.9
        """m, factor of the old centre."""
        frozen_epochs: int = 1
        """Epochs from the beginning that leave the head's last layer as it is."""

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            self.check_at_least(1, "hidden_features")
            self.check_directions("bottleneck_features")
            self.check_at_least(2, "dimensions")
            self.check_positive("temperature", "teacher_temperature", "warmup_teacher_temperature")
            self.check_at_least(0, "teacher_warmup_epochs", "frozen_epochs")
            for name in ("momentum", "center_momentum"):
                if not 0 <= getattr(self, name) <= 1:
                    raise ValueError(f"method.{name} must be in [0, 1], got {getattr(self, name)}")
            self.check_views_are_whole()

        def check_batch(self, split: BatchSplit) -> None:
            """Raises ValueError where BatchNorm in the head has too few crops; the teacher sees the large ones."""
            if self.head_norm:
                split.check_normalised("dino's head", per_sample=2)

        def build(self, context: MethodContext) -> "DINO":
            """The module for a run."""
            return DINO(self, context)

    evaluation_head = "teacher_head.mlp"
    centre: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.steps_per_epoch, self.total_steps = context.steps_per_epoch, context.total_steps
        self.trunk = build_trunk(context.model, seed=context.seed)
        with seeded(context.seed + 1):
            self.head = DINOHead(
                self.trunk.out_features,
                config.hidden_features,
                config.bottleneck_features,
                config.dimensions,
                norm=config.head_norm,
            )
        self.teacher_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(config.dimensions))
        self._pending: list[Tensor] = []
        self._step: int | Tensor = 0

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            views: "first", "second" and the small crops.
            sample_ids: ``[B]`` int64; not used.
            step: of the run: the teacher's temperature and momentum depend on it.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``teacher_entropy``, the mean entropy of the teacher's
            distributions in nats: log K or 0 where it has collapsed (section 5.3).
        """
        self._step = step
        count = len(sample_ids)
        student = self.head(encode_crops(self.trunk, [views[name].pixels for name in self.config.views()]))
        with torch.no_grad():
            outputs = self.teacher_head(encode_crops(self.teacher_trunk, [views[n].pixels for n in (FIRST, SECOND)]))
            self._pending.append(outputs.mean(dim=0))
            targets = ((outputs - self.centre) / self._teacher_temperature(step)).softmax(dim=1)
        logits = student.unflatten(0, (-1, count)) / self.config.temperature
        with full_precision(logits.device):
            loss = swapped_cross_entropy(logits, targets.unflatten(0, (-1, count)))
        return {"loss": loss.mean(), "teacher_entropy": torch.special.entr(targets).sum(dim=1).mean()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Updates the teacher with the weights of the step just taken, and its centre."""
        if not self._pending:
            raise RuntimeError("DINO.after_step was called before a forward pass")
        momentum = rising_momentum(self.config.momentum, self._step, self.total_steps, device=self.centre.device)
        ema_update_(
            chain(self.teacher_trunk.parameters(), self.teacher_head.parameters()),
            chain(self.trunk.parameters(), self.head.parameters()),
            momentum=momentum,
        )
        mean = mean_over_ranks(torch.stack(self._pending).mean(dim=0))
        self.centre.lerp_(mean, 1 - self.config.center_momentum)
        self._pending = []

    def parameter_options(self) -> dict[str, ParameterOptions]:
        """The head's last layer is frozen at the beginning."""
        return {"head.last_layer": ParameterOptions(frozen_steps=self.config.frozen_epochs * self.steps_per_epoch)}

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [self.centre]

    def _teacher_temperature(self, step: int | Tensor) -> Tensor:
        """τ_t of a step's epoch, 0-d fp32 on the device: equal steps over the warm-up epochs, which end at the last."""
        config = self.config
        epoch = torch.as_tensor(step, device=self.centre.device) // self.steps_per_epoch
        share = (epoch / max(1, config.teacher_warmup_epochs - 1)).clamp(max=1.0)
        if config.teacher_warmup_epochs == 0:
            share = torch.ones_like(share)
        start = config.warmup_teacher_temperature
        return start + (config.teacher_temperature - start) * share
