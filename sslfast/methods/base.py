"""What a method is to the trainer, to the preview and to the evaluations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from sslfast.models import ResNetConfig
from sslfast.views import View, ViewConfig


class Method(nn.Module):
    """A pretraining method. Its state, parameters and buffers, is all that a bit-equal resume needs of it.

    Under several processes every rank holds one and ``forward`` sees that rank's part of the batch; gradients are
    averaged over ranks by the trainer, everything else is exchanged through ``sslfast.distributed``.
    """

    trunk: nn.Module
    """What is pretrained for: images ``[B, 3, S, S]`` to features ``[B, out_features]``."""

    def needs_feature_pass(self, epoch: int) -> bool:
        """Whether :meth:`collect` gets all samples of this epoch before it begins."""
        return False

    def collect(self, views: Mapping[str, View], rows: Tensor) -> None:
        """A batch of a pass over the data between two epochs: in evaluation mode, without gradients, weights fixed.

        Args:
            views: as the configuration's ``feature_views()`` names them.
            rows: ``[B]`` int64, manifest row of each sample of this rank.
        """
        raise RuntimeError(f"{type(self).__name__} has no feature pass")

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of every epoch, not when a run resumes in the middle of one."""

    def forward(self, views: Mapping[str, View], rows: Tensor, *, step: int | Tensor) -> dict[str, Tensor]:
        """``loss`` (0-d, differentiable, mean over this rank's samples) and detached 0-d values for the log.

        Args:
            views: as the configuration's ``views()`` names them.
            rows: ``[B]`` int64, manifest row of each sample.
            step: of the run; random draws are functions of the seed, this and the row.
        """
        raise RuntimeError(f"{type(self).__name__} defines no forward")

    def after_step(self) -> None:
        """Called once after the optimizer's step: bank rows, queues, momentum encoders.

        ``forward`` is called once per micro-batch before it (``accumulate_steps``), each with rows of its own and the
        same ``step``: what it leaves for this call it appends, and this call uses all of it and clears it.
        """

    def embeddings(self) -> Tensor | None:
        """``[N, D]`` of all rows as the steps so far have left them, any norm; None where a method keeps no such thing.

        Every rank calls it. Where rows are split over ranks the first gets them all, others what they have.
        """
        return None

    def full_state_dict(self) -> dict[str, Tensor]:
        """``state_dict()`` of the whole run, which any number of processes can load. Every rank calls it.

        A method whose state is split over ranks puts it together here and takes its part when it loads.
        """
        return self.state_dict()

    def full_state_bytes(self) -> int:
        """Size of the tensors of :meth:`full_state_dict`."""
        return sum(value.nbytes for value in self.state_dict().values())

    def replicated(self) -> list[Tensor]:
        """What must be equal on all ranks besides the parameters."""
        return []


@dataclass(kw_only=True)
class BaseConfig:
    """What every method's ``Config`` offers. Subclasses have ``name`` and ``image_view``: a view whose ``crop.size``,
    ``mean`` and ``std`` are those of whole images, which evaluations use."""

    name: ClassVar[str]
    trunk_input: ClassVar[Literal["rgb", "lightness"]] = "rgb"
    """Colours that the trunk sees; lightness: CIE L three times over, see ``methods/colorization.py``."""

    image_view: ViewConfig

    def views(self) -> dict[str, ViewConfig]:
        """The views that a step needs, in the order that numbers their random streams."""
        return {"image": self.image_view}

    def feature_views(self) -> dict[str, ViewConfig]:
        """The views that :meth:`Method.collect` gets; empty for a method without a feature pass."""
        return {}

    def preview_views(self) -> dict[str, ViewConfig]:
        """Views on the preview sheet."""
        return self.views()

    def preview_panels(self, views: Mapping[str, View], rows: Tensor, *, seed: int) -> dict[str, Tensor]:
        """Further columns of the preview sheet: heading to RGB pictures ``[B, 3, H, W]`` float in 0..1.

        What is asked of the network where the views alone do not show it: a masked image, a target. Draws are those of
        ``seed`` and step 0.
        """
        return {}

    def validate(self) -> None:
        """Raises ValueError with the field, its value and what is allowed."""

    def check_at_least(self, least: int, *names: str) -> None:
        """ValueError unless each of these fields is ``least`` or more."""
        for name in names:
            if not getattr(self, name) >= least:
                raise ValueError(f"method.{name} must be at least {least}, got {getattr(self, name)}")

    def check_positive(self, *names: str) -> None:
        """ValueError unless each of these fields is above 0 and finite."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"method.{name} must be positive and finite, got {getattr(self, name)}")

    def check_whole_image(self) -> None:
        """ValueError where ``image_view`` is cut into patches."""
        if self.image_view.jigsaw is not None:
            raise ValueError(f"method.image_view.jigsaw must not be set: {self.name} takes whole images")

    def build(self, *, model: ResNetConfig, num_rows: int, seed: int) -> Method:
        """The module for a data set of ``num_rows`` samples."""
        raise RuntimeError(f"{type(self).__name__} builds nothing")
