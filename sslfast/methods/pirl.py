"""PIRL: representations that are invariant to a pretext transform (Misra & van der Maaten, CVPR 2020).

Objective (PIRL eq. 5): ``loss = λ · L(m_I, g(v_It)) + (1 - λ) · L(m_I, f(v_I))``, where ``m_I`` is the memory-bank
vector of image I, ``f(v_I)`` the embedding of the image, ``g(v_It)`` that of its transform (jigsaw patches, or a
rotated image), and L the noise-contrastive loss against K vectors of the bank (NCE, or its softmax form InfoNCE). After
the step ``m_I`` moves toward ``f(v_I)``. ``λ = 0`` is NPID (Wu et al. 2018): no transformed view is computed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sslfast.config import resumable
from sslfast.distributed import ignore_in_ddp, mean_over_ranks
from sslfast.methods.base import Method, MethodContext
from sslfast.methods.registry import register_method
from sslfast.methods.shared.patches import (
    PatchConfig,
    augment_crop,
    gather_patches,
    jigsaw_view,
    mosaic,
    slots_of_cells,
)
from sslfast.methods.shared.reconstruction import PixelSpace
from sslfast.models import MemoryBank, MLPHead, PatchHead, build_trunk, seeded
from sslfast.ops import estimate_z
from sslfast.views import View, ViewConfig

IMAGE, PRETEXT = "image", "pretext"


@register_method
class PIRL(Method):
    """The method as a module: ``method(views, sample_ids, step=...)`` -> losses, then ``method.after_step()``.

    State in buffers: ``bank.vectors`` and ``z`` (NaN until the first batch has set it).
    """

    @dataclass(kw_only=True)
    class Config(PatchConfig):
        """PIRL and, with ``pretext_weight=0``, NPID."""

        name: ClassVar[str] = "pirl"

        pretext: Literal["jigsaw", "rotation", "rotation+jigsaw"] = "jigsaw"
        """Transform that the representation is made invariant to."""
        pretext_weight: float = 0.5
        """λ, weight of the transformed view's loss; the image view has 1 - λ. 0 is NPID."""
        projection: Literal["linear", "mlp"] = "linear"
        """Heads. linear: as published. mlp: a hidden layer as wide as the trunk's features, with ReLU; of patches a
        ReLU behind their second layer too (VISSL's ``models/resnet50_mlphead.yaml``)."""
        dimensions: int = 128
        """Columns of the memory bank."""
        temperature: float = 0.07
        """τ of the scores."""
        negatives: Literal["sampled", "shared", "full"] = "sampled"
        """sampled: K vectors of the bank drawn for every sample, as published. shared: K drawn once for the batch.
        full: the whole bank, nothing drawn; faster than sampled from some batch size on
        (benchmarks/studies/crossover.py)."""
        num_negatives: int = 32000
        """K, negatives drawn per sample and step; not used with negatives full."""
        loss: Literal["nce", "infonce"] = "nce"
        """nce: binary loss with normaliser Z. infonce: softmax over the positive and the K negatives."""
        z: Literal["frozen", "running", "exact"] = "frozen"
        """frozen: Z estimated from the first batch. running: moving average of the estimates of all batches. exact: Z
        of each batch over the whole bank, mean_q sum_j exp(q . m_j / τ), at the cost of a pass over the bank."""
        z_momentum: float = 0.99
        """Weight of the old value with z running."""
        z_from: Literal["all", "pretext"] = "all"
        """Which views' scores estimate Z."""
        exclude_self: bool = True
        """Never draw a sample's own vector as its negative."""
        separate_draws: bool = False
        """Draw separate negatives for the transformed view and the image view."""
        bank_momentum: float = 0.5
        """Weight of the old vector in the bank update."""
        running_stats: Literal["image", "mixed"] = "image"
        """Which batch statistics update BatchNorm's running ones, which evaluations use. image: the image view's only.
        mixed: also the transformed view's, as VISSL's two trunk calls do; patches differ from images, and features on
        mixed statistics vary from seed to seed. Training normalises by each call's own batch either way."""
        bank_dtype: Literal["fp32", "bf16"] = "fp32"
        """Storage of the bank; sums are fp32 either way."""
        bank_layout: Literal["replicated", "sharded"] = resumable("replicated")
        """replicated: every process holds the whole bank. sharded: each holds its part of it, and losses are those of
        the whole bank; for banks that do not fit one device (docs/scale.md)."""
        image_view: ViewConfig = field(default_factory=ViewConfig)
        """The image I."""
        jigsaw_view: ViewConfig = field(default_factory=jigsaw_view)
        """I_t for pretext jigsaw and rotation+jigsaw (rotation comes first)."""
        rotation_view: ViewConfig = field(default_factory=lambda: ViewConfig(rotation=True))
        """I_t for pretext rotation."""

        def views(self) -> dict[str, ViewConfig]:
            """The views that a step needs, in the order that numbers their random streams."""
            views = {IMAGE: self.image_view}
            if self.pretext_weight > 0:
                views[PRETEXT] = {
                    "jigsaw": self.jigsaw_view,
                    "rotation": self.rotation_view,
                    "rotation+jigsaw": replace(self.jigsaw_view, rotation=True),
                }[self.pretext]
            return views

        def preview_views(self) -> dict[str, ViewConfig]:
            """``views()`` as a run draws them, then the transforms that this configuration does not use."""
            views = self.views()
            if "jigsaw" not in self.pretext or PRETEXT not in views:
                views["jigsaw, unused"] = self.jigsaw_view
            if self.pretext != "rotation" or PRETEXT not in views:
                views["rotation, unused"] = self.rotation_view
            return views

        def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
            """The patches by their cells, after the changes of the whole crop."""
            jigsaw = self.views()[PRETEXT].jigsaw if self.changes_crops else None
            if jigsaw is None:
                return {}
            space = PixelSpace(self.jigsaw_view.augment)
            view = augment_crop(views[PRETEXT], sample_ids, self, space, seed=seed, step=0)
            patches = gather_patches(view.pixels, slots_of_cells(view))
            return {"the patches in their cells": mosaic(space.to_rgb(patches), jigsaw.grid)}

        def validate(self) -> None:
            """Raises ValueError with the field, its value and what is allowed."""
            if not 0 <= self.pretext_weight <= 1:
                raise ValueError(f"method.pretext_weight must be in [0, 1], got {self.pretext_weight}")
            self.check_whole_image()
            self.check_positive("temperature")
            self.check_at_least(1, "num_negatives")
            self.check_directions("dimensions")
            if not 0 <= self.bank_momentum <= 1:
                raise ValueError(f"method.bank_momentum must be in [0, 1], got {self.bank_momentum}")
            if "jigsaw" in self.pretext and self.jigsaw_view.jigsaw is None:
                raise ValueError(f"method.jigsaw_view.jigsaw must be set for {self.pretext=}")
            jigsaw = self.jigsaw_view.jigsaw
            if "jigsaw" in self.pretext and jigsaw is not None and jigsaw.grid < 2:
                raise ValueError(
                    f"method.jigsaw_view.jigsaw.grid must be at least 2: one patch has one order, got {jigsaw.grid}"
                )
            if self.changes_crops and ("jigsaw" not in self.pretext or self.pretext_weight == 0):
                raise ValueError(
                    "method.crop_flip_probability and method.crop_grayscale_probability change crops that are cut into "
                    f"patches, of which there are none with {self.pretext=} and {self.pretext_weight=}; set both to 0"
                )
            if self.z_from == PRETEXT and self.pretext_weight == 0:
                raise ValueError("method.z_from=pretext needs pretext_weight > 0; NPID has only the image view")

        def build(self, context: MethodContext) -> "PIRL":
            """The module for a run."""
            return PIRL(self, context)

    nan_until_set = ("z",)
    embedding_head = "image_head"
    z: Tensor

    def __init__(self, config: Config, context: MethodContext) -> None:
        super().__init__()
        config.validate()
        if context.num_rows < 2:
            raise ValueError(f"PIRL contrasts images with one another and needs at least 2, got {context.num_rows}")
        self.config = config
        self.seed = context.seed
        self.pixel_space = PixelSpace(config.jigsaw_view.augment)
        self.trunk = build_trunk(context.model, seed=context.seed)
        features, dimensions = self.trunk.out_features, config.dimensions
        with seeded(context.seed + 1):
            self.image_head = self._project(features)
            self.pretext_head: nn.Module | None = None
            if config.pretext_weight > 0:
                jigsaw = config.views()[PRETEXT].jigsaw
                if jigsaw is None:
                    self.pretext_head = self._project(features)
                else:
                    head = self.pretext_head = PatchHead(features, dimensions, jigsaw.grid**2)
                    if config.projection == "mlp":
                        head.patch = nn.Sequential(  # type: ignore[assignment]
                            self._project(features), nn.ReLU()
                        )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.bank_dtype]
        self.bank = MemoryBank(
            context.num_rows,
            dimensions,
            momentum=config.bank_momentum,
            seed=context.seed,
            dtype=dtype,
            layout=config.bank_layout,
        )
        if self.bank.is_sharded:
            ignore_in_ddp(self, ["bank.vectors"])
        self.register_buffer("z", torch.full((), float("nan"), dtype=torch.float64))
        self._z_is_set = False
        self._pending: list[tuple[Tensor, Tensor]] = []

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._z_is_set = False

    def _project(self, features: int) -> nn.Module:
        """A head on the trunk's features."""
        dimensions = self.config.dimensions
        if self.config.projection == "linear":
            return nn.Linear(features, dimensions)
        return MLPHead(features, features, dimensions)

    def embed(self, views: Mapping[str, View]) -> Tensor:
        """Unit embeddings ``[V, B, D]`` fp32, the transformed view first where there is one."""
        embeddings = []
        if self.pretext_head is not None:
            pixels = views[PRETEXT].pixels
            with self._running_stats_kept():
                features = self.trunk(pixels.flatten(0, -4))  # [B * P, C], or [B, C] without patches
            embeddings.append(self.pretext_head(features.unflatten(0, pixels.shape[:-3])))
        embeddings.append(self.image_head(self.trunk(views[IMAGE].pixels)))
        return normalize(torch.stack(embeddings).float(), dim=-1)

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            views: "image" and, unless λ is 0, "pretext".
            sample_ids: ``[B]`` int64, manifest row of each sample, which is its position in the bank.
            step: number of the step: with the seed and the sample id it fixes the negatives.

        Returns:
            ``loss`` (0-d, differentiable) and detached 0-d ``loss_image``, ``loss_pretext``, ``z``.
        """
        config = self.config
        if config.changes_crops:
            changed = augment_crop(views[PRETEXT], sample_ids, config, self.pixel_space, seed=self.seed, step=step)
            views = {**views, PRETEXT: changed}
        queries = self.embed(views)  # [V, B, D]
        self._pending.append((sample_ids, queries[-1].detach()))
        if config.loss == "nce" and config.z == "exact":
            self._set_z(self._exact_z(queries.detach(), sample_ids))
        elif config.loss == "nce" and not self._z_is_set and not self.z.is_meta:
            # Read in the next step, since a first step with a non-finite loss may be undone, and Z with it.
            self._z_is_set = not bool(self.z.isnan())  # host sync: two steps of a run, one after a load
            if not self._z_is_set:
                self._set_z(self._estimate_z(self._score(queries.detach(), sample_ids, step=step, loss="infonce")[1]))
        losses, lse = self._score(queries, sample_ids, step=step, loss=config.loss)
        if config.loss == "nce" and config.z == "running":
            self.z.lerp_(mean_over_ranks(self._estimate_z(lse)), 1 - config.z_momentum)
        per_view = losses.mean(dim=1)
        logs = {"loss_image": per_view[-1].detach().clone()}  # compiled code must not return two views of one tensor
        loss = per_view[-1].clone()
        if self.pretext_head is not None:
            loss = config.pretext_weight * per_view[0] + (1 - config.pretext_weight) * loss
            logs["loss_pretext"] = per_view[0].detach().clone()
        if config.loss == "nce":
            logs["z"] = self.z.clone()
        return {"loss": loss, **logs}

    def after_step(self) -> None:
        """Moves the batch's vectors in the bank toward the image embeddings of the step just taken."""
        if not self._pending:
            raise RuntimeError("PIRL.after_step was called before a forward pass")
        self.bank.update_(*(torch.cat(column) for column in zip(*self._pending, strict=True)))
        self._pending = []

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return [*self.bank.replicated(), self.z]

    def embeddings(self) -> Tensor:
        """The memory bank."""
        return self.bank.vectors

    @property
    def embeddings_are_split(self) -> bool:
        """Whether the bank is sharded."""
        return self.bank.is_sharded

    def split_rows(self) -> dict[str, tuple[int, int]]:
        """The rows of a sharded bank."""
        return {"bank.vectors": (self.bank.first_row, self.bank.num_rows)} if self.bank.is_sharded else {}

    @contextmanager
    def _running_stats_kept(self) -> Iterator[None]:
        """BatchNorm inside normalises by its batch and leaves its running statistics unchanged."""
        norms = [m for m in self.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        if self.config.running_stats == "image":
            for norm in norms:
                norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def _score(
        self, queries: Tensor, sample_ids: Tensor, *, step: int | Tensor, loss: Literal["nce", "infonce"]
    ) -> tuple[Tensor, Tensor]:
        """(losses ``[V, B]``, log-sum-exp of the scores ``[V, B]``)."""
        config = self.config
        separate = config.separate_draws and config.negatives != "full" and queries.shape[0] > 1
        parts = [
            self.bank.score(
                part,
                sample_ids,
                temperature=config.temperature,
                negatives=config.negatives,
                num_negatives=config.num_negatives,
                loss=loss,
                z=self.z if loss == "nce" else None,
                exclude_self=config.exclude_self,
                seed=self.seed + draw,
                step=step,
            )
            for draw, part in enumerate(queries.split(1) if separate else [queries])
        ]
        losses, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        return losses, lse

    def _estimate_z(self, lse: Tensor, *, whole_bank: bool = False) -> Tensor:
        used = lse[:1] if self.config.z_from == PRETEXT else lse
        num_rows = self.bank.num_rows
        whole_bank = whole_bank or self.config.negatives == "full"
        return estimate_z(
            used, num_negatives=num_rows - 1 if whole_bank else self.config.num_negatives, num_rows=num_rows
        )

    def _exact_z(self, queries: Tensor, sample_ids: Tensor) -> Tensor:
        options = {"temperature": self.config.temperature, "negatives": "full", "loss": "infonce"}
        _, lse = self.bank.score(queries, sample_ids, **options)  # the log-sum-exp over the whole bank
        return self._estimate_z(lse, whole_bank=True)

    @torch.no_grad()
    def _set_z(self, z: Tensor) -> None:
        self.z.copy_(mean_over_ranks(z))
