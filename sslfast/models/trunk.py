"""What a trunk must offer, and trunks from a function outside this package."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from sslfast.plugins import PluginDict

TRUNKS: dict[str, str] = PluginDict()
"""Networks by the name that ``--model.name`` takes -> ``module:function`` of their factory; see
:func:`register_trunk`."""
F = TypeVar("F", bound=Callable[..., nn.Module])


class Trunk(nn.Module):
    """The interface of the network that is pretrained. Any ``nn.Module`` with these members is a trunk; it need not
    derive from this class, which exists for type checkers and as documentation.

    - ``out_features``: int, the number of columns of ``forward``.
    - ``forward(images)``: float ``[B, 3, H, W]``, normalised, to float ``[B, out_features]``. A method calls it with
      whole images or with patches, so it must accept the crop and patch sizes of the configuration, and any B.
    - optional ``stages(images)``: list of feature maps ``[B, C, h, w]`` from shallow to deep. The evaluations of single
      layers need the five of a ResNet (conv1, res2, res3, res4, res5); methods that reconstruct images need the last.

    All state is in parameters and buffers, and no output depends on a global random generator, else a resumed run is
    not bit-equal. An output that depends on other images of the batch (BatchNorm) is allowed.
    """

    out_features: int

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, out_features]`` of images ``[B, 3, H, W]``."""
        raise RuntimeError(f"{type(self).__name__} defines no forward")


def trunk_factory(function: F) -> F:
    """Decorator: lets configurations name ``function`` as ``module:function`` (:class:`CustomTrunkConfig`).

    Configurations are also read from run directories, which may come from others. Only decorated functions are ever
    called by the name in such a file.
    """
    function.__dict__["is_trunk_factory"] = True
    return function


def register_trunk(name: str) -> Callable[[F], F]:
    """Decorator: a :func:`trunk_factory` that ``--model.name`` knows by a name of its own.

    The configuration keeps ``module:function``, so a run is read without the registration.

    Raises:
        ValueError: a name with / or :, or one that another factory has.
    """

    def register(function: F) -> F:
        place = f"{function.__module__}:{function.__qualname__}"
        if not name or set(name) & set("/: "):
            raise ValueError(f"register_trunk takes a name without / and :, got {name!r}")
        if dict.get(TRUNKS, name, place) != place:
            raise ValueError(f"network {name!r} of {place} is already that of {TRUNKS[name]}; choose another name")
        TRUNKS[name] = place
        return trunk_factory(function)

    return register


@dataclass(kw_only=True)
class CustomTrunkConfig:
    """A trunk made by a function of your own, in place of a ResNet."""

    name: ClassVar[str] = "custom"

    factory: str
    """MODULE:FUNCTION, a function decorated with sslfast.models.trunk_factory that returns a trunk."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Keyword arguments of the function."""

    def build(self) -> Trunk:
        """The function's module.

        Raises:
            ValueError: the module cannot be imported, it has no such factory, or what the factory returns is no trunk.
        """
        trunk: Any = self._function()(**self.options)
        features = getattr(trunk, "out_features", None)
        if not isinstance(trunk, nn.Module) or not isinstance(features, int) or features < 1:
            raise ValueError(
                f"model.factory={self.factory} must return an nn.Module with out_features, an int of at least 1, got "
                f"{type(trunk).__name__} with out_features={features!r}; see sslfast.models.Trunk"
            )
        return trunk  # type: ignore[return-value]  # has the members of a Trunk

    def _function(self) -> Callable[..., nn.Module]:
        module, _, name = self.factory.partition(":")
        if not module or not name:
            raise ValueError(f"model.factory must be MODULE:FUNCTION, got {self.factory!r}")
        try:
            function = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise ValueError(
                f"model.factory={self.factory}: {module} cannot be imported ({error}); install it, or put its folder "
                "on PYTHONPATH"
            ) from None
        if not getattr(function, "is_trunk_factory", False):
            raise ValueError(
                f"model.factory={self.factory}: {module} has no trunk factory {name!r}; decorate the function with "
                "sslfast.models.trunk_factory"
            )
        return function  # type: ignore[return-value]  # not None: it has the mark
