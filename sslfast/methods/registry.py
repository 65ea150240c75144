"""The method registry: configuration classes by name, and modules outside this package that add theirs."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, TypeAlias, TypeVar

from sslfast.config import OneOf
from sslfast.methods.base import BaseConfig, Method

M = TypeVar("M", bound=Method)

METHODS: dict[str, type[BaseConfig]] = {}
"""Configuration classes by their name."""

MethodConfig: TypeAlias = Annotated[
    BaseConfig, OneOf(METHODS, "load the module that registers it with sslfast.methods.load_plugin")
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


def load_plugin(module: str) -> ModuleType:
    """Import a module that registers methods, recipes or trunk factories.

    Args:
        module: a module name, or the path of a .py file, which is imported under its stem. Loading the same one again
            does nothing.

    Raises:
        ValueError: it cannot be found, or it fails to import.
    """
    path = Path(module)
    name = path.stem if path.suffix == ".py" else module
    if name in sys.modules:
        loaded = sys.modules[name]
        origin = getattr(loaded, "__file__", None)
        if path.suffix == ".py" and (origin is None or Path(origin).resolve() != path.resolve()):
            raise ValueError(f"plugin {module}: a module named {name} is loaded already ({origin}); rename the file")
        return loaded
    try:
        return importlib.import_module(name) if path.suffix != ".py" else _import_file(name, path)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"plugin {module} cannot be imported: {error}; install it or give its .py file") from error


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look their module up
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded
