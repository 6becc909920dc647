"""A method and presets of another package: found by its metadata, with no edit here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from mitigate.core import Access, Fidelity, Method, Point, Subscription, Tags


@dataclass(frozen=True, kw_only=True)
class Foo(Method):
    """Does nothing.

    Parameters
    ----------
    gain
        Strength.
    """

    name: ClassVar[str] = "foo"
    summary: ClassVar[str] = "from outside"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.HIDDEN_STATES}))

    gain: float = 1.0

    def subscriptions(self, model):
        return [Subscription(point=Point.HIDDEN_STATES, access=Access.WRITE, layers=(model.layers - 1,))]

    def on_hidden_states(self, event, state):
        return None
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package ``mitigate-foo``."""
    package, info = tmp_path / "mitigate_foo", tmp_path / "mitigate_foo-0.1.dist-info"
    (package / "conf" / "stack").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "conf" / "__init__.py").touch()
    (package / "foo.py").write_text(METHOD)
    (package / "conf" / "stack" / "mitigate_foo_strong.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /methods: [foo]\nmethods:\n  foo:\n    gain: 2.0\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mitigate-foo\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[mitigate.methods]\nfoo = mitigate_foo.foo:Foo\n\n[mitigate.configs]\nmitigate_foo = mitigate_foo.conf\n"
    )
    return tmp_path


def mitigate(site: Path, *arguments: str, plugins: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("MITIGATE_PLUGINS", None)
    if plugins is not None:
        environment["MITIGATE_PLUGINS"] = plugins
    command = [sys.executable, "-m", "mitigate", *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


def test_it_is_listed_planned_and_checked(site: Path) -> None:
    listed = {row["name"]: row for row in json.loads(mitigate(site, "list", "methods", "--json").stdout)}
    assert listed["foo"]["distribution"] == "mitigate-foo"
    assert listed["foo"]["parameters"][0]["doc"] == "Strength."
    planned = json.loads(mitigate(site, "plan", "--json", "stack=mitigate_foo_strong", "model=llava-1.5-7b").stdout)
    assert planned["config"]["methods"] == {"foo": {"name": "foo", "preset": "paper", "gain": 2.0}}
    assert planned["provenance"]["methods.foo.gain"] == "stack mitigate_foo_strong"
    assert planned["points"][0]["layers"] == "31"
    wrong = mitigate(site, "plan", "methods=[foo]", "methods.foo.gian=1")
    assert wrong.returncode == 2
    assert "did you mean 'gain'?" in wrong.stderr


def test_plugins_can_be_switched_off(site: Path) -> None:
    off = mitigate(site, "plan", "methods=[foo]", plugins="none")
    assert off.returncode == 2
    assert "unknown method 'foo'" in off.stderr


def test_a_name_that_exists_already_is_refused_with_both_packages(site: Path) -> None:
    points = site / "mitigate_foo-0.1.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("foo = mitigate_foo.foo", "sgrs = mitigate_foo.foo"))
    clash = mitigate(site, "list")
    assert clash.returncode == 2
    assert "'sgrs' comes from both mitigate and mitigate-foo" in clash.stderr


def test_a_broken_package_stops_only_runs_that_select_it(site: Path) -> None:
    (site / "mitigate_foo" / "foo.py").write_text("import no_such_module\n")
    assert "broken: method 'foo' of mitigate-foo" in mitigate(site, "list", "methods").stdout
    assert mitigate(site, "plan", "stack=none").returncode == 0
    selected = mitigate(site, "plan", "methods=[foo]")
    assert selected.returncode == 2
    assert "No module named 'no_such_module'" in selected.stderr
