"""A method and presets of another package: found by its metadata, with no edit here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.outside import install, method

PRESET = "# @package _global_\ndefaults:\n  - override /methods: [foo]\nmethods:\n  foo:\n    gain: 2.0\n"
POINTS = {"methods": {"foo": "{}.foo:Foo"}, "configs": {"mitigate_foo": "{}.conf"}}
#: Runs the console script and then says which heavy libraries that took.
WATCHED = """
import sys
from mitigate.cli import main
code = main(sys.argv[1:])
print(",".join(name for name in ("torch", "transformers") if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed package ``mitigate-foo``."""
    files = {"foo.py": method(), "conf/stack/mitigate_foo_strong.yaml": PRESET}
    install(tmp_path, "mitigate-foo", files, POINTS)
    return tmp_path


def mitigate(
    site: Path, *arguments: str, plugins: str | None = None, watched: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(site)])}
    environment.pop("MITIGATE_PLUGINS", None)
    if plugins is not None:
        environment["MITIGATE_PLUGINS"] = plugins
    command = [sys.executable, *(["-c", WATCHED] if watched else ["-m", "mitigate"]), *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


def test_it_is_listed_planned_and_checked(site: Path) -> None:
    listed = {row["name"]: row for row in json.loads(mitigate(site, "list", "methods", "--json").stdout)}
    assert listed["foo"]["distribution"] == "mitigate-foo"
    assert listed["foo"]["parameters"][0]["doc"] == "Strength."
    planned = json.loads(mitigate(site, "plan", "--json", "stack=mitigate_foo_strong", "model=llava-1.5-7b").stdout)
    assert planned["config"]["methods"] == {"foo": {"name": "foo", "preset": "paper", "gain": 2.0, "layers": "all"}}
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
    """The list shows everything and ends with the clash; runs that do not select the name go on."""
    points = site / "mitigate_foo-0.1.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("foo = mitigate_foo.foo", "sgrs = mitigate_foo.foo"))
    listed = mitigate(site, "list", "methods", "--json")
    assert listed.returncode == 2
    assert "'sgrs' comes from both mitigate and mitigate-foo" in listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["sgrs"]["distribution"] == "mitigate, mitigate-foo"
    assert "broken" not in rows["scr"]
    clash = mitigate(site, "plan", "methods=[sgrs]")
    assert clash.returncode == 2
    assert "'sgrs' comes from both mitigate and mitigate-foo" in clash.stderr
    assert mitigate(site, "plan", "methods=[scr]").returncode == 0
    assert mitigate(site, "list", "trackers").returncode == 0
    assert mitigate(site, "plan", "methods=[sgrs]", plugins="none").returncode == 0


def test_one_file_of_two_packages_is_listed_as_a_clash(site: Path) -> None:
    bar = {"conf/stack/mitigate_foo_strong.yaml": PRESET, "conf/stack/bar.yaml": "methods: [\n"}
    install(site, "mitigate-bar", bar, {"configs": {"conf": "{}.conf"}})
    listed = mitigate(site, "list", "stacks", "--json")
    assert listed.returncode == 2
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert "comes from both mitigate-" in rows["mitigate_foo_strong"]["broken"]
    assert rows["bar"]["distribution"] == "mitigate-bar"
    assert rows["bar"]["broken"]
    assert rows["scr"]["methods"] == ["scr"]


@pytest.mark.parametrize("command", ["run", "compare", "plan"])
def test_the_search_path_is_shown(site: Path, command: str) -> None:
    shown = mitigate(site, command, "--info", "searchpath")
    assert shown.returncode == 0
    row = next(line for line in shown.stdout.splitlines() if "mitigate:mitigate-foo" in line)
    assert "pkg://mitigate_foo.conf" in row
    assert str(site / "mitigate_foo" / "conf") in row


def test_cheap_commands_stay_free_of_torch(site: Path) -> None:
    """Also beside a method whose file imports torch: it is imported by runs that select it and by the list alone."""
    for arguments in (["list"], ["run", "--cfg", "job", "methods=[foo]"], ["plan", "methods=[foo]"]):
        done = mitigate(site, *arguments, watched=True)
        assert (done.returncode, done.stderr.strip()) == (0, "")
    heavy = {"heavy.py": "import torch\n" + method("heavy")}
    install(site, "mitigate-heavy", heavy, {"methods": {"heavy": "{}.heavy:Foo"}})
    done = mitigate(site, "run", "--cfg", "job", "methods=[foo]", watched=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    listed = mitigate(site, "list", "methods", watched=True)
    assert (listed.returncode, listed.stderr.strip()) == (0, "torch")
    assert "slow to list" in listed.stdout


def test_an_adapter_is_listed_without_torch(site: Path) -> None:
    files = {"a.py": "import torch\n", "b.py": "class (\n"}
    install(site, "mitigate-model", files, {"models": {"new": "{}.a:New", "wrong": "{}.b:B", "gone": "{}.c:C"}})
    listed = mitigate(site, "list", "families", "--json", watched=True)
    assert (listed.returncode, listed.stderr.strip()) == (0, "")
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows["new"] == {"name": "new", "class": "mitigate_model.a:New", "distribution": "mitigate-model"}
    assert "SyntaxError" in rows["wrong"]["broken"]
    assert "No module named 'mitigate_model.c'" in rows["gone"]["broken"]


def test_a_wrong_limit_is_an_error_of_the_command(site: Path) -> None:
    wrong = mitigate(site, "list", "stacks", plugins="mitigate-fo")
    assert wrong.returncode == 2
    assert "did you mean 'mitigate-foo'" in wrong.stderr


def test_a_broken_package_stops_only_runs_that_select_it(site: Path) -> None:
    (site / "mitigate_foo" / "foo.py").write_text("import no_such_module\n")
    assert "broken: method 'foo' of mitigate-foo" in mitigate(site, "list", "methods").stdout
    assert mitigate(site, "plan", "stack=none").returncode == 0
    selected = mitigate(site, "plan", "methods=[foo]")
    assert selected.returncode == 2
    assert "No module named 'no_such_module'" in selected.stderr


def test_plugins_whose_description_fails_do_not_stop_the_list(site: Path) -> None:
    source = method().replace("Fidelity.CONTROL", "'exact'")
    (site / "mitigate_foo" / "foo.py").write_text(source)
    listed = mitigate(site, "list", "methods", "--json")
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert "cannot be described" in rows["foo"]["broken"]
    assert rows["scr"]["paper"]
