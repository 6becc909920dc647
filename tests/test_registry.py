from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import mitigate.registry as module
from mitigate import discovery
from mitigate.errors import DuplicateName, PluginError, UnknownName
from mitigate.registry import Entry, Registry, methods, register_method
from tests.toys import Toy

BASE = "mitigate.core.method:Method"


def entry_point(name: str, value: str, package: str) -> Any:
    return SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name=package))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Entry points that seem installed; tests add to the list."""
    points: list[Any] = []
    monkeypatch.delenv("MITIGATE_PLUGINS", raising=False)
    monkeypatch.setattr(discovery, "entry_points", lambda group: points)
    return points


def registry(builtin: dict[str, str] | None = None) -> Registry[Any]:
    return Registry("method", "mitigate.methods", {"toy": "tests.toys:Toy"} if builtin is None else builtin, BASE)


def test_names_are_known_before_anything_is_imported() -> None:
    found = registry({"ghost": "no_such_module:Ghost", "toy": "tests.toys:Toy"})
    assert found.names() == ["ghost", "toy"]
    assert found.get("toy") is Toy


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown method 'toi'; did you mean 'toy'\?"):
        registry().get("toi")
    with pytest.raises(UnknownName, match="unknown method 'zzz'; known: toy"):
        registry().get("zzz")


def test_entry_points_add_names(outside: list[Any]) -> None:
    outside.append(entry_point("chooser", "tests.toys:Chooser", "other"))
    assert registry().entries() == [
        Entry("chooser", "tests.toys:Chooser", "other"),
        Entry("toy", "tests.toys:Toy", "mitigate"),
    ]


def test_two_packages_with_one_name_are_refused_by_name(outside: list[Any]) -> None:
    outside.append(entry_point("toy", "other:Toy", "other"))
    assert registry().names() == ["toy"]
    with pytest.raises(DuplicateName, match="'toy' comes from both mitigate and other"):
        registry().get("toy")


@pytest.mark.parametrize(("limit", "names"), [("none", ["toy"]), ("other", ["chooser", "toy"])])
def test_environment_limits_packages(
    outside: list[Any], monkeypatch: pytest.MonkeyPatch, limit: str, names: list[str]
) -> None:
    outside.append(entry_point("chooser", "tests.toys:Chooser", "other"))
    monkeypatch.setenv("MITIGATE_PLUGINS", limit)
    assert registry().names() == names


def test_a_plugin_that_cannot_be_imported_is_listed_and_refused(outside: list[Any]) -> None:
    outside.append(entry_point("ghost", "no_such_module:Ghost", "other"))
    found = registry()
    broken = {entry.name: entry.broken for entry in found.entries()}
    assert broken["toy"] is None
    assert "No module named 'no_such_module'" in str(broken["ghost"])
    with pytest.raises(PluginError, match="'ghost' of other cannot be imported"):
        found.get("ghost")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [(object, "is not a subclass of"), (Toy, "calls itself 'toy'"), (None, "is not a subclass of")],
)
def test_a_plugin_must_keep_the_contract(
    monkeypatch: pytest.MonkeyPatch, outside: list[Any], attribute: Any, message: str
) -> None:
    plugin = ModuleType("strange_plugin")
    plugin.Strange = attribute  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strange_plugin", plugin)
    outside.append(entry_point("strange", "strange_plugin:Strange", "other"))
    with pytest.raises(PluginError, match=message):
        registry().get("strange")


def test_registering_at_run_time() -> None:
    try:
        assert register_method("toy")(Toy) is Toy
        assert methods().get("toy") is Toy
        register_method("toy")(Toy)  # a notebook cell run again
        other = dataclass(frozen=True, kw_only=True)(type("Other", (Toy,), {"__module__": "elsewhere"}))
        with pytest.raises(DuplicateName, match="already comes from"):
            register_method("toy")(other)
        with pytest.raises(PluginError, match="calls itself 'toy'"):
            register_method("tyo")(Toy)
    finally:
        methods().unregister("toy")
    assert "toy" not in methods().names()


def test_built_in_tables_are_sound() -> None:
    kinds = (module.methods, module.benchmarks, module.metrics, module.trackers, module.diagnostics, module.adapters)
    for found in (kind() for kind in kinds):
        assert found.names()
        assert [entry.broken for entry in found.entries() if entry.broken] == []
