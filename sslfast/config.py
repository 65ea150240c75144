"""Configurations: dataclasses to plain JSON values and back, with one clear line for every mistake.

``to_dict`` and ``from_dict`` are inverse for dataclasses made of bool, int, float, str, None, Path, Enum, Literal,
Optional, unions, tuples, lists, dicts with string keys and nested dataclasses. A dataclass with a class variable
``name`` (``name: ClassVar[str] = "pirl"``) stores it. The members of a union of dataclasses are told apart by it, or by
the choices of a field ``name`` of type Literal; :class:`OneOf` is a union that can grow.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from sslfast.files import ANOTHER_PLACE, open_regular, reason_of, write_file

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """``Annotated[Base, OneOf(classes)]``: an instance of any of ``classes``, dataclasses by their ``name``."""

    classes: Mapping[str, type]
    """May grow: it is looked up when a value is read."""
    remedy: str
    """What to do about a name that is missing there, for the message."""


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict (JSON values only: dict, list, str, int, float, bool, None) of a dataclass instance."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"to_dict needs a dataclass instance, got {config!r}")
    name = _class_name(type(config))
    encoded: dict[str, Any] = {} if name is None else {"name": name}
    for field in dataclasses.fields(config):
        encoded[field.name] = _encode(getattr(config, field.name), field.name)
    return encoded


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """The dataclass ``cls`` that :func:`to_dict` made ``data`` from.

    Keys that ``data`` lacks take their defaults. ``where`` is put before field names in messages. A dataclass with a
    classmethod ``migrate(data: Mapping) -> dict`` is given what earlier versions wrote, renamed fields and values say,
    before it is decoded.

    Raises:
        ValueError: unknown key, missing key without a default, or a value of another type: names field and remedy.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config field {where or '(top)'}: expected a table of {cls.__name__} fields, got {data!r}")
    migrate = getattr(cls, "migrate", None)
    data = data if migrate is None else migrate(data)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    name = _class_name(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key in fields:
            values[key] = _decode(hints[key], value, path)
        elif key == "name" and name is not None:
            if value != name:
                raise ValueError(f"config field {path}: expected {name!r}, got {value!r}; its other fields differ")
        else:
            raise ValueError(f"config field {path} is unknown; {_suggestion(str(key), fields)}")
    for field in fields.values():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            path = f"{where}.{field.name}" if where else field.name
            raise ValueError(f"config field {path} is missing and has no default; add it")
    return cls(**values)


def decode(hint: Any, value: Any, *, where: str) -> Any:
    """The value of type ``hint``, for example a union of dataclasses, that :func:`to_dict` stored as ``value``.

    Raises:
        ValueError: as :func:`from_dict` does, for the field ``where``.
    """
    return _decode(hint, value, where)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str = "") -> list[tuple[str, Any, Any]]:
    """``(dotted field, old value, new value)`` wherever two plain dicts differ; a missing side is ``None``."""
    found: list[tuple[str, Any, Any]] = []
    for key in [*old, *(key for key in new if key not in old)]:
        path = f"{where}.{key}" if where else str(key)
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, where=path)
        elif before != after or isinstance(before, bool) != isinstance(after, bool):
            found.append((path, before, after))
    return found


def check_numbers(config: Any, limits: Mapping[str, tuple[float, float]], *, where: str = "") -> None:
    """Check every number in a dataclass instance, in nested ones, tuples and lists too: finite, and inside its limits.

    Args:
        config: the instance.
        limits: smallest and largest value by the field's dotted name or its last parts, longest first:
            ``"crop.size"`` holds for ``method.image_view.crop.size``. A field without an entry must be finite.
        where: put before field names in messages.

    Raises:
        ValueError: names the first field that is not, its value and what is allowed.
    """
    for field in dataclasses.fields(config):
        path, value = f"{where}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_numbers(value, limits, where=f"{path}.")
            continue
        for number in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{path} must be a finite number, got {value}")
            names = path.split(".")
            known = (limits.get(".".join(names[first:])) for first in range(len(names)))
            low, high = next((found for found in known if found is not None), (-math.inf, math.inf))
            if not low <= number <= high:
                allowed = f"at least {low:,}" if number < low else f"at most {high:,}"
                raise ValueError(f"{path} must be {allowed}, got {value}")


def resumable(default: T) -> T:
    """Field of a configuration that may change when a run is resumed: it does not change what a step computes, but for
    rounding. Every other field is fixed for the life of a run.

    Written in place of the default: ``workers: int = resumable(4)``. A subclass may give another default; the field
    stays resumable.
    """
    return dataclasses.field(default=default, metadata={"resumable": True})


def resumable_fields(config: Any, *, where: str = "") -> set[str]:
    """Dotted names of all fields of a dataclass instance declared :func:`resumable`, those of nested ones included."""
    found: set[str] = set()
    declared = [vars(cls).get("__dataclass_fields__", {}) for cls in type(config).__mro__]
    for field in dataclasses.fields(config):
        path, value = f"{where}{field.name}", getattr(config, field.name)
        if any(field.name in fields and fields[field.name].metadata.get("resumable") for fields in declared):
            found.add(path)
        elif dataclasses.is_dataclass(value):
            found |= resumable_fields(value, where=f"{path}.")
    return found


def save_json(path: Path, data: Mapping[str, Any], *, remedy: str = ANOTHER_PLACE) -> None:
    """Write ``data`` as readable JSON; the file is replaced at once or not at all, also where the machine stops.

    ``remedy`` and errors as of :func:`sslfast.files.replacing`.
    """
    write_file(path, json.dumps(data, indent=2) + "\n", remedy=remedy)


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is not JSON or holds no table.
    """
    try:
        with open_regular(path) as file:
            data = json.loads(file.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give a run directory that sslfast pretrain wrote") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); restore it or start a new run") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it or start a new run") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}, expected a table; restore it or start a new run")
    return data


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a plain dict with some values replaced, for :func:`from_dict` to check.

    Keys of ``overrides`` may be dotted (``"model.width"``); a mapping replaces the keys that it has, any other value
    (a dataclass instance too) the whole entry. Values are stored as :func:`to_dict` stores them.
    """
    merged = dict(base)
    for key, value in overrides.items():
        first, dot, rest = key.partition(".")
        value = {rest: value} if dot else value
        if isinstance(value, Mapping):
            old = merged.get(first)
            merged[first] = merge(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[first] = _encode(value, key)
    return merged


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Words for a message about an unknown name: the near matches, else everything known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"


def _suggestion(key: str, fields: Mapping[str, Any]) -> str:
    return nearest(key, fields) if fields else "this table has no fields; remove it"


def _class_name(cls: type) -> str | None:
    """The ``name`` class variable of a dataclass, None where there is none or where ``name`` is a field."""
    if any(field.name == "name" for field in dataclasses.fields(cls)):
        return None
    name = getattr(cls, "name", None)
    return name if isinstance(name, str) else None


def _names(cls: type) -> tuple[str, ...]:
    """Names that choose this dataclass in a union: its class variable, or the choices of its field."""
    name = _class_name(cls)
    if name is not None:
        return (name,)
    hint = typing.get_type_hints(cls).get("name")
    return get_args(hint) if get_origin(hint) is Literal else ()


def _encode(value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_encode(item, f"{path}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, dict):
        return {str(key): _encode(item, f"{path}.{key}") for key, item in value.items()}
    raise ValueError(f"config field {path}: {type(value).__name__} cannot be stored as JSON; use a plain value")


def _decode(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        choice = next((note for note in arguments[1:] if isinstance(note, OneOf)), None)
        if choice is not None:
            return _decode_named(choice.classes, value, path, remedy=f"; {choice.remedy}")
    if origin in (Annotated, ClassVar):
        return _decode(arguments[0], value, path)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, path)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
        raise ValueError(f"config field {path}: {value!r} is not one of {', '.join(map(repr, arguments))}")
    if origin in (tuple, list):
        return _decode_sequence(origin, arguments, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, "a table", value)
        return {str(key): _decode(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where=path)
    if isinstance(hint, type):
        return _decode_scalar(hint, value, path)
    raise ValueError(f"config field {path}: type {hint} is not supported in a configuration")


def _decode_scalar(hint: type, value: Any, path: str) -> Any:
    if issubclass(hint, Enum):
        members = hint.__members__
        if isinstance(value, str) and value in members:
            return members[value]
        raise ValueError(f"config field {path}: {value!r} is not one of {', '.join(members)}")
    if issubclass(hint, Path):
        if isinstance(value, str):
            return hint(value)
        raise _wrong(path, "a path", value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        if value is None:
            return None
        raise _wrong(path, "null", value)
    if hint in (bool, int, float, str):
        if type(value) is hint:
            return value
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise _wrong(path, words[hint], value)
    raise ValueError(f"config field {path}: type {hint.__name__} is not supported in a configuration")


def _decode_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    tables = [m for m in members if dataclasses.is_dataclass(m) and isinstance(m, type)]
    if isinstance(value, Mapping) and len(tables) > 1:
        return _decode_named({name: table for table in tables for name in _names(table)}, value, path)
    if isinstance(value, Mapping) and tables:
        return from_dict(tables[0], value, where=path)
    reasons = []
    for member in members:
        if member in tables or member is type(None):
            continue
        try:
            return _decode(member, value, path)
        except ValueError as error:
            reasons.append(error)
    raise reasons[0] if len(reasons) == 1 else _wrong(path, " or ".join(map(_type_name, members)), value)


def _decode_named(classes: Mapping[str, type], value: Any, path: str, *, remedy: str = "") -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(path, "a table", value)
    name = value.get("name")
    if name is None:  # a field ``name`` may have a default
        name = next((getattr(cls, "name", None) for cls in classes.values() if _class_name(cls) is None), None)
    if isinstance(name, str) and name in classes:
        return from_dict(classes[name], value, where=path)
    raise ValueError(f"config field {path}.name: {name!r} is not one of {', '.join(classes)}{remedy}")


def _decode_sequence(origin: type, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(path, "a list", value)
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        return origin(_decode(arguments[0], item, f"{path}[{position}]") for position, item in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong(path, f"a list of {len(arguments)} values", value)
    return tuple(
        _decode(hint, item, f"{path}[{position}]")
        for position, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _type_name(hint: Any) -> str:
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _wrong(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"config field {path}: expected {expected}, got {value!r}; correct it")
