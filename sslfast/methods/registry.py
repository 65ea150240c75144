"""The method registry: configuration classes by name. A module outside this package adds its own."""

from typing import Annotated, TypeAlias, TypeVar

from sslfast.config import OneOf
from sslfast.methods.base import BaseConfig, Method
from sslfast.plugins import PluginDict

M = TypeVar("M", bound=Method)

METHODS: dict[str, type[BaseConfig]] = PluginDict()
"""Configuration classes by their name."""

MethodConfig: TypeAlias = Annotated[
    BaseConfig,
    OneOf(
        METHODS, "import the module that registers it, on the command line with --plugin MODULE, or install its package"
    ),
]
"""Configuration of any registered method; ``name`` says which."""


def register_method(method: type[M]) -> type[M]:
    """Class decorator of a :class:`Method`: adds its ``Config`` to the registry under ``Config.name``.

    Configurations with that name can then be read from ``config.json``, so runs of the method resume and evaluate.

    Raises:
        ValueError: another method has the name.
    """
    config = method.Config
    known = METHODS.setdefault(config.name, config)
    if (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
        raise ValueError(
            f"method name {config.name!r} is taken by {known.__module__}.{known.__qualname__}; "
            f"choose another one for {config.__module__}.{config.__qualname__}"
        )
    METHODS[config.name] = config  # of the newest import, where a module is reloaded
    return method
