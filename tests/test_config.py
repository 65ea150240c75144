import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslfast.config import (
    differences,
    from_dict,
    load_json,
    merge,
    nearest,
    resumable,
    resumable_fields,
    save_json,
    to_dict,
)


class Color(Enum):
    RED = (1, 0, 0)
    BLUE = (0, 0, 1)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(kw_only=True)
class Circle:
    name: ClassVar[str] = "circle"
    radius: float = 1.0


@dataclass(kw_only=True)
class Square:
    name: ClassVar[str] = "square"
    side: int = 2


@dataclass(kw_only=True)
class Renamed:
    """Its field was called ``old``, and its value "slow" is "careful" now."""

    new: str = "fast"

    @classmethod
    def migrate(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        values = {"new" if key == "old" else key: value for key, value in data.items()}
        return values | ({"new": "careful"} if values.get("new") == "slow" else {})


@dataclass(kw_only=True)
class Holder:
    one: Renamed = field(default_factory=Renamed)
    maybe: Renamed | None = None
    many: list[Renamed] = field(default_factory=list)


@dataclass(kw_only=True)
class Top:
    shape: Circle | Square = field(default_factory=Circle)
    only: Square = field(default_factory=Square)
    maybe: Circle | None = None
    flag: bool = True
    count: int = 3
    rate: float = 0.5
    text: str = "a"
    mode: Literal["fast", "slow", 3] = "fast"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = (1, 2, 3)
    words: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    path: Path | None = None
    color: Color = Color.RED
    level: Level = Level.LOW
    marked: Annotated[int, "anything"] = 1
    either: int | str = 1


FULL = Top(
    shape=Square(side=5),
    maybe=Circle(radius=2.5),
    flag=False,
    mode=3,
    pair=(0.25, 1e-300),
    many=(),
    words=["x", "ä"],
    table={"k": 1},
    path=Path("a/b"),
    color=Color.BLUE,
    level=Level.HIGH,
    either="2",
)


@pytest.mark.parametrize("config", [Top(), FULL])
def test_round_trip_through_json(config: Top) -> None:
    data = json.loads(json.dumps(to_dict(config)))
    assert data == to_dict(config)
    assert from_dict(Top, data) == config


@given(
    rate=st.floats(allow_nan=False),
    count=st.integers(),
    text=st.text(),
    pair=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    shape=st.builds(Circle, radius=st.floats(allow_nan=False)) | st.builds(Square, side=st.integers()),
    maybe=st.none() | st.builds(Circle),
)
def test_round_trip_of_any_values(**values: Any) -> None:
    config = Top(**values)
    assert from_dict(Top, json.loads(json.dumps(to_dict(config)))) == config


def test_names_are_stored() -> None:
    assert to_dict(Top())["shape"] == {"name": "circle", "radius": 1.0}


def test_missing_keys_take_defaults_and_ints_become_floats() -> None:
    config = from_dict(Top, {"rate": 1})
    assert config == Top(rate=1.0)
    assert type(config.rate) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cuont": 1}, "config field cuont is unknown; did you mean count"),
        ({"only": {"sied": 1}}, "config field only.sied is unknown; did you mean side"),
        ({"zzzzzz": 1}, "config field zzzzzz is unknown; known: shape, only"),
        ({"count": 1.5}, "config field count: expected a whole number, got 1.5"),
        ({"count": True}, "config field count: expected a whole number, got True"),
        ({"flag": 1}, "config field flag: expected true or false, got 1"),
        ({"rate": "0.5"}, "config field rate: expected a number, got '0.5'"),
        ({"text": None}, "config field text: expected a text, got None"),
        ({"mode": "fats"}, "config field mode: 'fats' is not one of 'fast', 'slow', 3"),
        ({"pair": [1.0]}, "config field pair: expected a list of 2 values"),
        ({"many": [1, "x"]}, r"config field many\[1\]: expected a whole number, got 'x'"),
        ({"words": "abc"}, "config field words: expected a list, got 'abc'"),
        ({"table": []}, "config field table: expected a table"),
        ({"table": {"k": "v"}}, "config field table.k: expected a whole number"),
        ({"path": 3}, "config field path: expected a path, got 3"),
        ({"color": "GREEN"}, "config field color: 'GREEN' is not one of RED, BLUE"),
        ({"only": {"name": "circle"}}, "config field only.name: expected 'square', got 'circle'"),
        ({"only": 3}, "config field only: expected a table of Square fields, got 3"),
        ({"shape": {"name": "triangle"}}, "config field shape.name: 'triangle' is not one of circle, square"),
        ({"shape": {"name": "square", "radius": 1}}, "config field shape.radius is unknown"),
        ({"either": 1.5}, "config field either: expected int or str, got 1.5"),
    ],
)
def test_every_mistake_is_one_line_with_field_and_value(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(Top, data)
    assert "\n" not in str(caught.value)


def test_configurations_of_earlier_versions_are_migrated_at_any_depth() -> None:
    data = {"one": {"old": "slow"}, "maybe": {"new": "slow"}, "many": [{"old": "x"}, {}]}
    config = from_dict(Holder, data)
    assert config == Holder(
        one=Renamed(new="careful"), maybe=Renamed(new="careful"), many=[Renamed(new="x"), Renamed()]
    )
    assert data["one"] == {"old": "slow"}  # what was read stays as it was
    assert from_dict(Holder, to_dict(config)) == config
    with pytest.raises(ValueError, match=r"config field one\.odd is unknown"):
        from_dict(Holder, {"one": {"odd": 1}})


def test_missing_required_field() -> None:
    @dataclass
    class Needs:
        x: int

    with pytest.raises(ValueError, match=r"config field a\.x is missing"):
        from_dict(Needs, {}, where="a")


def test_what_cannot_be_stored_is_named() -> None:
    @dataclass
    class Odd:
        x: Any = object

    with pytest.raises(ValueError, match="config field x: type cannot be stored"):
        to_dict(Odd())


def test_differences_are_dotted() -> None:
    old, new = to_dict(Top()), to_dict(Top(shape=Circle(radius=2.0), count=4, many=(1,)))
    assert differences(old, new) == [("shape.radius", 1.0, 2.0), ("count", 3, 4), ("many", [1, 2, 3], [1])]
    assert differences(old, json.loads(json.dumps(old))) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1.0, "d": None, "b": 3}) == [("b", {"c": 2}, 3)]
    assert differences({"a": 1}, {"a": True}) == [("a", 1, True)]


def test_files(tmp_path: Path) -> None:
    save_json(tmp_path / "c.json", to_dict(FULL))
    assert from_dict(Top, load_json(tmp_path / "c.json")) == FULL
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(FileNotFoundError, match=r"missing\.json does not exist"):
        load_json(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        load_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, expected a table"):
        load_json(tmp_path / "list.json")


def test_near_matches() -> None:
    assert nearest("prl-paper", ["pirl-paper", "npid"]) == "did you mean pirl-paper?"
    assert nearest("xyz", ["pirl-paper", "npid"]) == "known: pirl-paper, npid"


@dataclass(kw_only=True)
class Reader:
    workers: int | None = resumable(None)
    shuffle: bool = True


@dataclass(kw_only=True)
class Run:
    reader: Reader = field(default_factory=Reader)
    device: Literal["cpu", "cuda"] = resumable("cpu")
    seed: int = 0


@dataclass(kw_only=True)
class ShortRun(Run):
    device: Literal["cpu", "cuda"] = "cuda"


def test_resumable_fields_are_found_through_nesting_and_subclasses() -> None:
    assert Run() == Run(device="cpu", reader=Reader(workers=None))
    assert resumable_fields(Run()) == resumable_fields(ShortRun()) == {"device", "reader.workers"}
    assert from_dict(ShortRun, to_dict(ShortRun())) == ShortRun()


def test_merge_takes_dotted_names_and_mappings_and_changes_nothing_given() -> None:
    base = {"a": 1, "model": {"name": "r", "width": 1.0}, "absent": None}
    overrides = {"a": 2, "model.width": 2.0, "absent": {"deep.er": 3}, "new": {"x": (1, Path("p"))}}
    assert merge(base, overrides) == {
        "a": 2, "model": {"name": "r", "width": 2.0}, "absent": {"deep": {"er": 3}}, "new": {"x": [1, "p"]},
    }  # fmt: skip
    assert base == {"a": 1, "model": {"name": "r", "width": 1.0}, "absent": None}
    assert merge(base, {"model": {"width": 3}, "model.name": "s"})["model"] == {"name": "s", "width": 3}
    with pytest.raises(ValueError, match="config field a: object cannot be stored as JSON"):
        merge(base, {"a": object()})
