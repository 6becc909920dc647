"""Plugins of other packages: found by metadata, refused with both names, broken with a reason, limited by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from mitigate import discovery
from mitigate.compose.checks import check_family
from mitigate.discovery import config_packages, installed, unreadable
from mitigate.errors import ConfigError, DuplicateName, PluginError, UnknownName
from mitigate.registry import Entry, adapters, benchmarks, diagnostics, methods, metrics, trackers
from tests.outside import forget, install, method, visible

See = Callable[..., None]
FOO = {"foo.py": method()}
POINT = {"methods": {"foo": "{}.foo:Foo"}}


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Iterator[See]:
    """Make folders of packages visible until the test ends."""
    with ExitStack() as undo:
        yield lambda *sites: undo.enter_context(visible(monkeypatch, *sites))


def test_every_group_is_discovered_and_nothing_is_imported(tmp_path: Path, see: See) -> None:
    points = {group: {f"my_{group}": "{}.missing:Thing"} for group in GROUPS}
    install(tmp_path, "mitigate-foo", {}, points)
    see(tmp_path)
    for group, found in GROUPS.items():
        entry = found().origin(f"my_{group}")
        assert (entry.value, entry.distribution) == ("mitigate_foo.missing:Thing", "mitigate-foo")
    assert "mitigate_foo" not in sys.modules


GROUPS = {
    "methods": methods,
    "models": adapters,
    "benchmarks": benchmarks,
    "metrics": metrics,
    "trackers": trackers,
    "diagnostics": diagnostics,
}


def test_two_outside_packages_with_one_name(tmp_path: Path, see: See) -> None:
    """Both are named; what nobody disputes goes on."""
    for name in ("mitigate-foo", "mitigate-bar"):
        other = {"own": "{}.own:Foo"} if name == "mitigate-foo" else {}
        files = {**FOO, "own.py": method("own")}
        install(tmp_path, name, files, {"methods": {"foo": "{}.foo:Foo", **other}})
    see(tmp_path)
    with pytest.raises(DuplicateName, match=r"'foo' comes from both mitigate-(foo|bar) and mitigate-(foo|bar); uninst"):
        methods().get("foo")
    assert methods().get("own").summary == "from outside"
    listed = {entry.name: entry for entry in methods().entries()}
    assert sorted(listed["foo"].distribution.split(", ")) == ["mitigate-bar", "mitigate-foo"]
    assert "comes from both" in str(listed["foo"].broken)
    assert listed["own"].broken is None


@pytest.mark.parametrize("second", ["mitigate-foo", "Mitigate_Foo", "mitigate.foo"])
def test_one_package_found_twice_is_no_clash(tmp_path: Path, see: See, second: str) -> None:
    """An editable install beside a wheel, or an older version left behind: the first on the path counts."""
    first, later = tmp_path / "first", tmp_path / "later"
    install(first, "mitigate-foo", FOO, POINT)
    install(later, second, {}, {"methods": {"foo": "{}.elsewhere:Foo"}}, version="0.2")
    see(first, later)
    assert [entry.value for entry in installed("mitigate.methods")] == ["mitigate_foo.foo:Foo"]
    assert methods().get("foo").summary == "from outside"


def test_the_same_metadata_twice_in_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [
        SimpleNamespace(name="foo", value=value, dist=SimpleNamespace(name=name))
        for name, value in (("Mitigate.Foo", "a:B"), ("mitigate-foo", "c:D"))
    ]
    monkeypatch.setattr(discovery, "entry_points", lambda group: twice)
    monkeypatch.delenv("MITIGATE_PLUGINS")
    assert installed("mitigate.methods") == [Entry("foo", "a:B", "Mitigate.Foo")]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def broken(:\n", r"SyntaxError: .*foo.py, line 1"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("raise RuntimeError\n", "RuntimeError: no message"),
        ("", "AttributeError: module 'mitigate_foo.foo' has no attribute 'Foo'"),
        ("Foo = 3\n", "is not a subclass of mitigate.core.method.Method"),
        ("class Foo: ...\n", "is not a subclass of mitigate.core.method.Method"),
        (method("bar"), "calls itself 'bar'; give the class `name = 'foo'`"),
        (
            method().replace("@dataclass(frozen=True, kw_only=True)", ""),
            r"is no dataclass: decorate the class with @dataclass\(frozen=True, kw_only=True\)",
        ),
        (method().replace("    summary:", "    summery:"), "has no 'summary': give the class `summary: ClassVar"),
        (
            method().replace("    gain:", "    api: ClassVar[int] = 2\n    gain:"),
            "written for version 2 of the method interface, this mitigate has version 1; "
            "update mitigate, or install an older mitigate-foo",
        ),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason(tmp_path: Path, see: See, source: str, reason: str) -> None:
    install(tmp_path, "mitigate-foo", {"foo.py": source}, POINT)
    see(tmp_path)
    with pytest.raises(PluginError, match=reason) as refused:
        methods().get("foo")
    assert "'foo' of mitigate-foo" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2
    broken = [entry for entry in methods().entries() if entry.broken]
    assert [entry.name for entry in broken] == ["foo"]
    assert broken[0].broken == str(refused.value)


def test_what_a_plugin_prints_while_it_is_imported_stays_off_stdout(
    tmp_path: Path, see: See, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "mitigate-foo", {"foo.py": "print('hello')\n" + method()}, POINT)
    see(tmp_path)
    methods().get("foo")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


def test_nested_attributes_and_extras_of_an_entry_point(tmp_path: Path, see: See) -> None:
    source = method() + "\n\nclass Box:\n    inner = Foo\n"
    install(tmp_path, "mitigate-foo", {"foo.py": source}, {"methods": {"foo": "{}.foo:Box.inner [extra]"}})
    see(tmp_path)
    assert methods().get("foo").__name__ == "Foo"


@pytest.mark.parametrize(
    ("limit", "seen"),
    [
        ("none", []),
        ("", []),
        ("mitigate-foo", ["foo"]),
        ("mitigate_foo", ["foo"]),
        ("Mitigate.Foo", ["foo"]),
        ("mitigate-bar, mitigate-foo", ["bar", "foo"]),
        (None, ["bar", "foo"]),
    ],
)
def test_the_variable_limits_packages(
    tmp_path: Path, see: See, monkeypatch: pytest.MonkeyPatch, limit: str | None, seen: list[str]
) -> None:
    install(tmp_path, "mitigate-foo", FOO, {**POINT, "configs": {"conf": "{}"}})
    install(tmp_path, "mitigate-bar", FOO, {"methods": {"bar": "{}.foo:Foo"}, "configs": {"conf": "{}"}})
    see(tmp_path)
    monkeypatch.setenv("MITIGATE_PLUGINS", limit) if limit is not None else monkeypatch.delenv("MITIGATE_PLUGINS")
    forget()
    assert [name for name in methods().names() if name in ("foo", "bar")] == seen
    mine = {entry.distribution for entry in config_packages()} & {"mitigate-foo", "mitigate-bar"}
    assert mine == {f"mitigate-{name}" for name in seen}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("mitigate-fo", "names 'mitigate-fo', but no installed package .* did you mean 'mitigate-foo'"),
        ("pytest", "names 'pytest', but no installed package of that name brings plugins"),
        ("none,mitigate-foo", "none stands alone"),
    ],
)
def test_a_wrong_limit_is_an_error(
    tmp_path: Path, see: See, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    install(tmp_path, "mitigate-foo", FOO, POINT)
    see(tmp_path)
    monkeypatch.setenv("MITIGATE_PLUGINS", limit)
    with pytest.raises(ConfigError, match=message):
        methods().names()


def test_an_unknown_name_that_a_left_out_package_brings(
    tmp_path: Path, see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "mitigate-foo", FOO, POINT)
    see(tmp_path)
    monkeypatch.setenv("MITIGATE_PLUGINS", "none")
    with pytest.raises(UnknownName, match=r"'foo' \(mitigate-foo brings it, but MITIGATE_PLUGINS leaves that package"):
        methods().get("foo")


def test_configuration_packages_may_share_a_name_and_tell_what_is_wrong(tmp_path: Path, see: See) -> None:
    for name in ("mitigate-foo", "mitigate-bar"):
        install(tmp_path, name, {"conf/__init__.py": ""}, {"configs": {"conf": "{}.conf"}})
    install(tmp_path, "mitigate-no", {}, {"configs": {"conf": "{}.conf"}})
    install(tmp_path, "mitigate-one", {"conf.py": ""}, {"configs": {"conf": "{}.conf"}})
    see(tmp_path)
    found = {entry.distribution: entry.broken for entry in config_packages()}
    assert found["mitigate-foo"] is found["mitigate-bar"] is None
    assert "No module named 'mitigate_no.conf'" in str(found["mitigate-no"])
    assert found["mitigate-one"] == "mitigate_one.conf is a module, not a package"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.py": ""}, None),
        ({"a.py": "import no_such_module"}, None),  # seen only when it is imported
        ({"a.py": "def ("}, "SyntaxError"),
        ({}, "No module named 'mitigate_foo.a'"),
        ({"__init__.py": "1 / 0"}, "ZeroDivisionError"),
    ],
)
def test_a_module_is_looked_at_without_running_it(
    tmp_path: Path, see: See, files: Mapping[str, str], reason: str | None
) -> None:
    install(tmp_path, "mitigate-foo", files, {})
    see(tmp_path)
    told = unreadable(Entry("a", "mitigate_foo.a:Adapter", "mitigate-foo"))
    assert (told is None) if reason is None else (reason in str(told))


def test_every_kind_accepts_its_own_and_refuses_another(tmp_path: Path, see: See) -> None:
    install(tmp_path, "mitigate-foo", FOO, {group: {"foo": "{}.foo:Foo"} for group in GROUPS if group != "methods"})
    see(tmp_path)
    for group, found in GROUPS.items():
        if group != "methods":
            with pytest.raises(PluginError, match="'foo' of mitigate-foo is not a subclass of mitigate"):
                found().get("foo")


def test_a_broken_adapter_is_refused_before_weights_are_loaded(tmp_path: Path, see: See) -> None:
    install(tmp_path, "mitigate-foo", {"a.py": "import no_such_module"}, {"models": {"newest": "{}.a:New"}})
    see(tmp_path)
    config = {"model": {"name": "any", "family": "newest"}}
    with pytest.raises(PluginError, match="model adapter 'newest' of mitigate-foo cannot be imported"):
        check_family(config, None)
    check_family({"model": {"name": "any", "family": "llava"}}, None)


NOTEBOOK = """
import sys
from dataclasses import dataclass
from typing import ClassVar

import mitigate
from mitigate.core import Fidelity, Method, Subscription, Tags
from mitigate.cli import main
from mitigate.compose import compose_run

CELL = '''
@mitigate.register_method("mine")
@dataclass(frozen=True, kw_only=True)
class CLASS(Method):
    summary: ClassVar[str] = "a cell"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags()
    GAIN: float = 1.0

    def subscriptions(self, model):
        return []
'''
exec(CELL.replace("GAIN", "gain").replace("CLASS", "Mine"))
print(compose_run(["methods=[mine]", "methods.mine.gain=2"]).methods["mine"].gain, Mine.name)
exec(CELL.replace("GAIN: float = 1.0", "gain: str = 'soft'").replace("CLASS", "Mine"))  # another type of one name
print(compose_run(["methods=[mine]", "methods.mine.gain=loud"]).methods["mine"].gain)
exec(CELL.replace("GAIN", "strength").replace("CLASS", "Renamed"))  # the cell, changed and run again
print(compose_run(["methods=[mine]", "methods.mine.strength=3"]).methods["mine"].strength)
print(main(["plan", "methods=[mine]", "methods.mine.strength=abc"]))
print(main(["plan", "methods=[mine]"]), list(mitigate.Stack([Renamed()]).methods))
sys.stdout.flush()
try:
    exec(CELL.replace("mine", "clva").replace("GAIN", "gain").replace("CLASS", "Clva"))
except mitigate.MitigateError as error:
    print(error)
BARE = "@dataclass(frozen=True, kw_only=True)"
for before, after in ((BARE, ""), ('("mine")', ""), ("mine", "my own"), ('"mine"', "3")):
    try:
        exec(CELL.replace(before, after).replace("GAIN", "gain").replace("CLASS", "Bare"))
    except mitigate.MitigateError as error:
        print(error)
try:
    mitigate.register_method("mine")("no class")
except mitigate.MitigateError as error:
    print(error)
print("torch" in sys.modules)
print("checked", main(["check", "mine", "--json", "--check", "check_name", "--check", "check_class_attributes"]))
"""


def test_a_notebook_registers_changes_and_uses_a_method() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, env={**os.environ, "MITIGATE_PLUGINS": "none"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["2.0 mine", "loud", "3.0", "2"]
    assert "strength is float" in done.stderr
    start = lines.index("0 ['mine']")
    assert lines[start + 1 : start + 8] == [
        "method 'clva' already comes from mitigate (mitigate.methods.clva:CLVA); choose another name",
        "method 'mine' is no dataclass: decorate the class with @dataclass(frozen=True, kw_only=True)",
        "<class '__main__.Bare'> cannot name a method: write @register_method('my_method') above @dataclass",
        "'my own' cannot name a method: use letters, digits and _ only",
        "3 cannot name a method: write @register_method('my_method') above @dataclass",
        "method 'mine' is not a subclass of mitigate.core.method.Method",
        "False",
    ]
    assert lines[-1] == "checked 0", done.stdout
