"""Configurations from a recipe, from a file (YAML, TOML or JSON of ``sslfast pretrain --config``) or from a run, with
changes."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from sslfast.config import from_dict, load_json, merge, nearest, to_dict
from sslfast.files import open_regular, reason_of
from sslfast.models import CustomTrunkConfig, choose_trunk
from sslfast.recipes.registry import RECIPES, find_recipe
from sslfast.training import TrainConfig

_NO_RECIPE = (None, "custom")


def configure(recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a recipe, a name in ``RECIPES``, with some fields changed; see :func:`changed`."""
    return changed(find_recipe(recipe), overrides)


def changed(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """A configuration with some fields changed.

    Args:
        config: of a recipe; may be used up.
        overrides: field name of ``TrainConfig`` -> value; nested fields by dotted name
            (``{"method.num_negatives": 64}``) or as a mapping (``{"method": {"num_negatives": 64}}``). A dataclass
            instance replaces the whole field, so that it may be of another method or trunk.

    Raises:
        ValueError: unknown field, wrong type, or value out of range; names it with the remedy.
    """
    wanted = merge({}, overrides).get("model")
    if isinstance(wanted, Mapping) and not is_dataclass(overrides.get("model")):
        config.model = choose_trunk(config.model, wanted)
    before = to_dict(config)
    values = merge(before, overrides)
    if isinstance(wanted, Mapping) and isinstance(config.model, CustomTrunkConfig):
        values["model"]["name"] = config.model.name  # that of a registered network is in its factory
    method, new = before["method"].get("name"), values["method"]
    if isinstance(new, Mapping) and new.get("name") != method and not is_dataclass(overrides.get("method")):
        raise ValueError(
            f"config field method.name is {method!r} in recipe {config.recipe!r} and cannot become "
            f"{new.get('name')!r}, which has other fields; choose a recipe of that method"
        )
    return from_dict(type(config), values)


def load_settings(path: Path | str, recipe: str | None = None) -> TrainConfig:
    """The configuration that a file or a run directory gives.

    A file (``.yaml``, ``.yml``, ``.toml``, ``.json``) holds fields of :class:`~sslfast.training.TrainConfig` as tables
    or by dotted names, all of them or those that differ from a recipe. The recipe is the file's field ``recipe`` or
    the argument; without any, the field ``method.name`` is needed, and what is missing has the defaults of the
    classes. A run directory, or its ``config.json``, gives the configuration of that run.

    Raises:
        ValueError, FileNotFoundError: the file cannot be read, has an unknown field, a wrong type or a value out of
            range, or another recipe than the argument; names the file and the field.
    """
    path = Path(path)
    is_run = path.is_dir() or (path.name == "config.json" and (path.parent / "versions.json").exists())
    if path.is_dir():
        path /= "config.json"
    data = load_json(path) if is_run else _read(path)
    try:
        return _configured(data, recipe, is_complete=is_run)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: a table holds itself; correct its anchors") from None


def _configured(data: Mapping[str, Any], recipe: str | None, *, is_complete: bool) -> TrainConfig:
    own = data.get("recipe")
    if not isinstance(own, str | None):
        raise ValueError(f"config field recipe: expected a text, got {own!r}; correct it")
    if recipe is not None and own not in (*_NO_RECIPE, recipe):
        raise ValueError(f"it is based on recipe {own}, --recipe {recipe} is another one; leave one of them out")
    if is_complete:
        config = from_dict(TrainConfig, data)
        return config if recipe is None else changed(config, {"recipe": recipe})
    base = recipe if own in _NO_RECIPE else own
    if base is not None:
        return changed(find_recipe(base), {**data, "recipe": base})
    method = data.get("method")
    if not (isinstance(method, Mapping) and "name" in method) and "method.name" not in data:
        raise ValueError(f"config field recipe is missing; add one ({nearest('', RECIPES)}), or method.name")
    name = data["method.name"] if "method.name" in data else method["name"]  # type: ignore[index]
    return changed(from_dict(TrainConfig, {"method": {"name": name}}), data)


def as_yaml(config: TrainConfig) -> str:
    """A whole configuration as YAML, which :func:`load_settings` reads back to an equal one."""
    yaml = _yaml("printing a configuration")

    base: Any = yaml.SafeDumper

    class Dumper(base):
        pass

    def inline(dumper: Any, values: list[Any]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)

    Dumper.add_representer(list, inline)
    text: str = yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)
    return text


def _read(path: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[str], Any]] = {
        ".json": lambda text: json.loads(text, object_pairs_hook=_unique),
        ".toml": tomllib.loads,
        ".yaml": _load_yaml,
        ".yml": _load_yaml,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} is no configuration: name a run directory or a file {', '.join(readers)}")
    if path.suffix in (".yaml", ".yml"):
        _yaml(str(path))  # a missing package is no fault of the file
    try:
        with open_regular(path) as file:
            data = readers[path.suffix](file.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; correct the path of the configuration") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); correct that") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no {path.suffix[1:].upper()}: {' '.join(str(error).split())}; correct it"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} must hold a table of fields such as `epochs: 100`, got {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError for a key that is given twice, which the reader would resolve in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _yaml(purpose: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{purpose} needs the package pyyaml; pip install pyyaml, or use .toml or .json") from None
    return yaml


def _load_yaml(text: str) -> Any:
    yaml = _yaml("YAML")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


@cache
def _loader() -> Any:
    """PyYAML's loader with the plain values of YAML 1.2: ``off`` is a text, ``1e-4`` a number, a date a text, and a
    key that is given twice is an error. PyYAML itself has those of YAML 1.1."""
    yaml = _yaml("YAML")

    base: Any = yaml.SafeLoader

    class Loader(base):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            self.flatten_mapping(node)
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            try:
                _unique([(key, None) for key in keys])
            except (TypeError, ValueError) as error:
                raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
            mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    def integer(loader: Any, node: Any) -> int:
        return int(loader.construct_scalar(node), 10)

    def number(loader: Any, node: Any) -> float:
        return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))

    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    Loader.add_constructor("tag:yaml.org,2002:float", number)
    for tag, pattern, first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("merge", r"<<", "<"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))
    return Loader
