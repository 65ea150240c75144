"""The interface of a pretraining method, for the trainer, the preview and the evaluations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sslfast.distributed import Shard, gather_to_rank0, row_shard, shard_bounds, split_evenly, world_size
from sslfast.methods.shared.grid import PatchGrid
from sslfast.models import Trunk, TrunkConfig
from sslfast.optim import ParameterOptions
from sslfast.views import View, ViewConfig


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """What a method is built for: the run around it."""

    model: TrunkConfig
    """The trunk; :func:`sslfast.models.build_trunk` builds it."""
    num_rows: int
    """Rows of the manifest. Sample ids are in ``0 .. num_rows - 1``."""
    seed: int
    """Of the run: initial weights and every random draw are functions of it."""
    steps_per_epoch: int
    """Optimizer steps of an epoch."""
    total_steps: int
    """Optimizer steps of the whole run, for schedules."""

    @property
    def epochs(self) -> int:
        """Epochs of the run."""
        return self.total_steps // self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """How the samples of an optimizer step are split over processes and forward passes."""

    batch_size: int
    """Samples of a step, a multiple of ``ranks * accumulate_steps``."""
    ranks: int = 1
    """Processes."""
    accumulate_steps: int = 1
    """Forward passes of a step on each of them."""
    sync_batchnorm: bool = False
    """Whether BatchNorm is over all processes."""

    @property
    def samples(self) -> int:
        """Samples of one forward pass of one process."""
        return self.batch_size // (self.ranks * self.accumulate_steps)

    @property
    def contrasted(self) -> int:
        """Samples of one forward pass of all processes."""
        return self.batch_size // self.accumulate_steps

    @property
    def normalised(self) -> int:
        """Samples that BatchNorm takes its statistics from."""
        return self.contrasted if self.sync_batchnorm else self.samples

    def __str__(self) -> str:
        return (
            f"batch_size={self.batch_size} on {self.ranks} process{'es' if self.ranks > 1 else ''} in "
            f"accumulate_steps={self.accumulate_steps}"
        )

    def check_normalised(self, layer: str, *, per_sample: int = 1, remedy: str = "") -> None:
        """ValueError where BatchNorm has too few values of each channel: 1 has no variance; 2 become -1 and 1 whatever
        they were, so that no gradient passes.

        Args:
            layer: what is normalised, for the message.
            per_sample: values of a channel in one sample.
            remedy: a further one.
        """
        if self.normalised * per_sample < MIN_NORMALISED:
            raise ValueError(
                f"{self} leaves BatchNorm in {layer} {self.normalised * per_sample} of the {MIN_NORMALISED} values per "
                "channel that it needs for a gradient; raise batch_size or lower accumulate_steps"
                f"{' or the number of processes' if self.ranks > 1 else ''}{remedy}"
            )


MIN_NORMALISED = 3
"""Values of a channel that BatchNorm needs to pass a gradient."""


class Method(nn.Module):
    """A pretraining method. Its parameters and buffers are all the state that a bit-equal resume needs.

    Under several processes every rank holds one and ``forward`` gets that rank's part of the batch. The trainer
    averages gradients over ranks; everything else is exchanged through ``sslfast.distributed``.
    """

    Config: ClassVar[type["BaseConfig"]]
    """Its configuration, a nested dataclass that :func:`sslfast.methods.register_method` adds to the registry."""

    nan_until_set: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that may be NaN in a good state, since no step has set them yet. Everything else is finite, or
    the run ends."""

    embedding_head: ClassVar[str] = "projection"
    """Attribute of the module whose output the loss compares, where there is one; its statistics are logged."""

    evaluation_head: ClassVar[str | None] = None
    """What evaluations take in its place, where that is another: dotted name of a module."""

    trunk: Trunk
    """The network that is pretrained: images ``[B, 3, S, S]`` to features ``[B, out_features]``. Where a method also
    has a ``teacher_trunk``, ``sslfast.load`` and the evaluations take that one from its checkpoints."""

    orders_epochs: bool = False
    """Whether :meth:`epoch_order` says which rows an epoch trains on."""

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """``[num_rows]`` rows of the epoch in their order, in place of each row once; a function of the state as
        :meth:`start_epoch` left it, the same on every rank."""
        raise RuntimeError(f"{type(self).__name__} does not order epochs")

    def needs_feature_pass(self, epoch: int) -> bool:
        """Whether :meth:`store_features` gets all samples of this epoch before it begins."""
        return False

    def store_features(self, views: Mapping[str, View], sample_ids: Tensor) -> None:
        """A batch of the feature pass between two epochs: in evaluation mode, without gradients, weights fixed.

        Args:
            views: as the configuration's ``feature_views()`` names them.
            sample_ids: ``[B]`` int64, manifest row of each sample of this rank.
        """
        raise RuntimeError(f"{type(self).__name__} has no feature pass")

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of every epoch, not when a run resumes in the middle of one."""

    def forward(self, views: Mapping[str, View], sample_ids: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` (0-d, differentiable, mean over this rank's samples) and detached 0-d values for the log.

        Args:
            views: as the configuration's ``views()`` names them.
            sample_ids: ``[B]`` int64, manifest row of each sample.
            step: of the run; random draws are functions of the seed, the step and the sample id.
        """
        raise RuntimeError(f"{type(self).__name__} defines no forward")

    def after_step(self) -> None:
        """Called once after the optimizer's step: updates of memory banks, queues and momentum encoders.

        Before it, ``forward`` is called once per micro-batch (``accumulate_steps``), with other samples and the same
        ``step``. What ``forward`` leaves for this call it appends; this call uses all of it and clears it.
        """

    def embeddings(self) -> Tensor | None:
        """``[N, D]`` embeddings of all rows as the steps so far have left them, of any norm; None where the method
        keeps none. Where :attr:`embeddings_are_split`, the rows of this rank.
        """
        return None

    @property
    def embeddings_are_split(self) -> bool:
        """Whether :meth:`embeddings` are this rank's part of the rows, of those that
        :func:`~sslfast.distributed.own_rows` names; else each rank has all of them."""
        return False

    def split_rows(self) -> Mapping[str, tuple[int, int]]:
        """What of ``state_dict()`` is split over ranks by rows: name -> (first row of this rank, rows of all ranks).

        Ranks hold contiguous parts in their order, as :func:`sslfast.distributed.shard_bounds` splits them, and
        ``load_state_dict`` takes its part of a whole tensor.
        """
        return {}

    def full_state_dict(self) -> dict[str, Tensor]:
        """``state_dict()`` of the whole run, which any number of processes can load. Every rank calls it.

        What is split over ranks is gathered on the host of rank 0; the others get their own part.
        """
        state = self.state_dict()
        for name, (_, num_rows) in self.split_rows().items():
            whole = gather_to_rank0(state[name], shard_bounds(num_rows, world_size()))
            state[name] = state[name] if whole is None else whole
        return state

    def own_state_dict(self) -> dict[str, Tensor | Shard]:
        """``state_dict()`` of the whole run as a checkpoint takes it to which every rank writes its part.

        A large tensor is a :class:`~sslfast.distributed.Shard` where ranks hold parts of it, or are known to hold the
        same.
        """
        split, equal = self.split_rows(), {x.data_ptr() for x in (*self.parameters(), *self.replicated())}
        found: dict[str, Tensor | Shard] = {}
        for name, value in self.state_dict().items():
            if name in split:
                found[name] = row_shard(value, *split[name])
            else:
                found[name] = split_evenly(value) if value.data_ptr() in equal else value
        return found

    def full_state_bytes(self) -> int:
        """Size of the tensors of :meth:`full_state_dict`."""
        split = self.split_rows()
        return sum(
            value.nbytes // len(value) * split[name][1] if name in split else value.nbytes
            for name, value in self.state_dict().items()
        )

    def parameter_options(self) -> Mapping[str, ParameterOptions]:
        """What the optimizer does differently with some parameters, by the name of a parameter or of a submodule:
        factor or constancy of the rate, weight decay, momentum, steps without an update."""
        return {}

    def replicated(self) -> list[Tensor]:
        """Tensors besides the parameters that must be equal on all ranks."""
        return []


@dataclass(kw_only=True)
class BaseConfig:
    """The interface of every method's ``Config``. Subclasses define ``name`` and ``image_view``, a view of whole images
    whose ``crop.size``, ``mean`` and ``std`` evaluations use."""

    name: ClassVar[str]
    trunk_input: ClassVar[Literal["rgb", "lightness"]] = "rgb"
    """Colours that the trunk sees; lightness: CIE L in all three channels, see ``methods/colorization.py``."""

    image_view: ViewConfig

    def views(self) -> dict[str, ViewConfig]:
        """The views that a step needs, in the order that numbers their random streams."""
        return {"image": self.image_view}

    def trunk_sizes(self) -> dict[str, int]:
        """Sides in pixels of what the trunk sees of each view."""
        views = {**self.views(), **self.feature_views()}
        return {name: v.crop.size if v.jigsaw is None else v.jigsaw.patch_size for name, v in views.items()}

    def evaluation_patches(self) -> PatchGrid | None:
        """The patches whose averaged features stand for an image where evaluations ask for them; None: the method
        trains on whole images."""
        return None

    def feature_views(self) -> dict[str, ViewConfig]:
        """The views that :meth:`Method.store_features` gets; empty for a method without a feature pass."""
        return {}

    def preview_views(self) -> dict[str, ViewConfig]:
        """Views on the preview sheet."""
        return self.views()

    def preview_panels(self, views: Mapping[str, View], sample_ids: Tensor, *, seed: int) -> dict[str, Tensor]:
        """Further columns of the preview sheet: heading to RGB images ``[B, 3, H, W]`` float in 0..1.

        The pretext task, where the views alone do not show it: a masked input, a target. Draws are those of ``seed``
        and step 0.
        """
        return {}

    def validate(self) -> None:
        """Raises ValueError with the field, its value and what is allowed."""

    def remarks(self, split: BatchSplit) -> list[str]:
        """Lines of the plan of a run about what this split of a batch does to the method."""
        return []

    def check_batch(self, split: BatchSplit) -> None:
        """Raises ValueError where the loss of batches that are split like this would be constant or mean nothing."""

    def check_contrasted(self, split: BatchSplit) -> None:
        """ValueError where a forward pass has one image alone, and so no other one to contrast it with."""
        if split.contrasted < 2:
            raise ValueError(
                f"{split} leaves 1 sample in a forward pass, and {self.name} contrasts it with the others: "
                "raise batch_size or lower accumulate_steps"
            )

    def check_at_least(self, least: int, *names: str) -> None:
        """ValueError unless each of these fields is ``least`` or more."""
        for name in names:
            if not getattr(self, name) >= least:
                raise ValueError(f"method.{name} must be at least {least}, got {getattr(self, name)}")

    def check_directions(self, name: str) -> None:
        """ValueError unless this field, the size of vectors that are divided by their norms, is at least 2."""
        if not getattr(self, name) >= 2:
            raise ValueError(
                f"method.{name} must be at least 2, got {getattr(self, name)}: a vector of one number, divided by its "
                "norm, is 1 or -1 whatever it was, and gives no gradient"
            )

    def check_positive(self, *names: str) -> None:
        """ValueError unless each of these fields is above 0 and finite."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"method.{name} must be positive and finite, got {getattr(self, name)}")

    def check_whole_image(self) -> None:
        """ValueError where ``image_view`` is cut into patches."""
        if self.image_view.jigsaw is not None:
            raise ValueError(f"method.image_view.jigsaw must not be set: {self.name} takes whole images")

    def resolve(self, context: MethodContext) -> Self:
        """This configuration with the values that it leaves to the run filled in, as ``config.json`` records it."""
        return self

    def build(self, context: MethodContext) -> Method:
        """The module for a run.

        Raises:
            ValueError: a bad field, or a run that the method cannot train: names the field, its value and the remedy.
        """
        raise RuntimeError(f"{type(self).__name__} defines no build")
