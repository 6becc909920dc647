from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError

from mitigate.compose.schemas import check_value, defaults_of, native, parameters_of, plain, schema_of, type_name
from mitigate.core import Point
from mitigate.errors import ConfigError, PluginError
from tests.toys import Toy


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


@dataclass(frozen=True, kw_only=True)
class Wide:
    """Every kind of annotation.

    Attributes
    ----------
    needed, number
        Shared text.
    """

    needed: int
    number: float = 1.0
    maybe: int | None = None
    either: int | str = 3
    names: tuple[str, ...] = ("a",)
    rows: Sequence[int] = (1,)
    listed: list[float] = field(default_factory=lambda: [0.5])
    table: dict[str, int] = field(default_factory=dict)
    kind: Literal["x", "y"] = "x"
    level: Literal[1, 2] | None = 1
    point: Point = Point.VISION
    size: Size = Size.SMALL
    pair: tuple[float, float] = (0.0, 1.0)
    spans: tuple[tuple[int, int], ...] = ((0, 1),)
    anything: Any = None


def test_node_is_writable_typed_and_closed() -> None:
    node = OmegaConf.structured(schema_of("toy", Toy))
    assert node.name == "toy"
    assert node.picks == [1, 2]
    node.beta = 1
    assert node.beta == 1.0
    with pytest.raises(ValidationError):
        node.window = 1.5
    with pytest.raises((ConfigAttributeError, ConfigKeyError)):
        OmegaConf.update(node, "betta", 1)


def test_unset_node_tells_set_from_default() -> None:
    node = OmegaConf.structured(schema_of("toy", Toy, extras=("preset",), unset=True))
    assert OmegaConf.missing_keys(node) == {"preset", "beta", "window", "layers", "picks", "ceiling", "strict"}


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("number", 2, 2.0),
        ("maybe", None, None),
        ("either", "s", "s"),
        ("names", ["b", "c"], ["b", "c"]),
        ("table", {"k": 1}, {"k": 1}),
        ("kind", "y", "y"),
        ("level", 2, 2),
        ("level", None, None),
        ("point", "vision", "vision"),
        ("point", "VISION", "vision"),
        ("size", "LARGE", 2),
        ("size", 2, 2),
        ("pair", [1, 2], [1.0, 2.0]),
        ("spans", [[0, 1], [2, 3]], [[0, 1], [2, 3]]),
        ("anything", [1], [1]),
    ],
)
def test_right_types_pass(key: str, value: Any, kept: Any) -> None:
    checked = check_value(Wide, key, value, "text")
    assert checked == kept
    assert type(checked) is type(kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", "a"),
        ("number", None),
        ("maybe", "a"),
        ("names", "a"),
        ("table", {"k": "x"}),
        ("rows", ["a"]),
        ("needed", 1.5),
        ("kind", [1]),
    ],
)
def test_wrong_types_name_key_and_type(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"text has the wrong type: {key} is "):
        check_value(Wide, key, value, "text")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kind", "z", "text is none of x, y"),
        ("level", 3, "text is none of 1, 2"),
        ("point", "sight", "text is none of .*vision"),
        ("size", 3, "text is none of 1, 2"),
        ("pair", [1.0], "text has the wrong length: it takes 2 values, not 1"),
        ("spans", [[0, 1, 2]], "text has the wrong length: it takes 2 values, not 3"),
    ],
)
def test_what_is_no_choice_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_value(Wide, key, value, "text")


def test_values_come_back_as_the_dataclass_wants_them() -> None:
    plain_values = {"needed": 1, "names": ["a"], "rows": [1], "listed": [0.5], "point": "vision", "spans": [[2, 3]]}
    values = native(Wide, plain_values)
    assert values == {
        **plain_values,
        "names": ("a",),
        "rows": (1,),
        "point": Point.VISION,
        "spans": ((2, 3),),
    }
    assert Wide(**values).point is Point.VISION
    assert native(Wide, {"size": 2, "pair": [0.5, 1.0]}) == {"size": Size.LARGE, "pair": (0.5, 1.0)}


def test_parameters_are_described() -> None:
    known = {parameter.name: parameter for parameter in parameters_of(Wide)}
    assert known["needed"].required
    assert not known["number"].required
    assert (known["needed"].doc, known["number"].doc) == ("Shared text.", "Shared text.")
    assert known["maybe"].type == "int | None"
    assert known["names"].default == ["a"]
    assert "needed" not in defaults_of(Wide)
    assert parameters_of(Toy)[0].doc == "Gain of the toy, on two lines."
    assert type_name(tuple[int, ...]) == "tuple[int, ...]"


def test_plain_values_are_json() -> None:
    assert plain({"a": (Point.VISION,), "b": frozenset({2, 1})}) == {"a": ["vision"], "b": [1, 2]}


def test_what_cannot_be_a_schema_is_a_plugin_error() -> None:
    class Bare:
        pass

    @dataclass
    class Reserved:
        preset: str = ""

    @dataclass
    class Unresolved:
        value: "NoSuchName" = None  # type: ignore[name-defined]  # noqa: F821, UP037, RUF100

    for plugin, message in ((Bare, "is no dataclass"), (Reserved, "reserved"), (Unresolved, "cannot be read")):
        with pytest.raises(PluginError, match=message):
            schema_of("x", plugin)

    @dataclass
    class Placed:
        folder: Path = Path("x")

    with pytest.raises(PluginError, match=r"Placed: default PosixPath\('x'\) of folder cannot be written"):
        defaults_of(Placed)
