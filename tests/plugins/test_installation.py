"""The outside packages as their users have them: installed editable, and from wheels, with no edit in mitigate."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.environments import PACKAGES, Environment, make

STACKS = ("none", "pai", "vcd", "pai+vcd+locore")
SMALL = ("benchmark.limit=2", "decoding.max_new_tokens=8", "tracker=none", "name=mine")
NAMES = {"pai": "mitigate-pai", "vcd": "mitigate-vcd"}


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make(tmp_path_factory.mktemp("editable"), editable=True)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make(tmp_path_factory.mktemp("wheels"), editable=False)


@pytest.fixture(params=["editable", "wheels"])
def installed(request: pytest.FixtureRequest) -> Environment:
    environment: Environment = request.getfixturevalue(request.param)
    return environment


def planned(environment: Environment, *arguments: str) -> dict[str, Any]:
    done = environment.mitigate("plan", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def test_the_code_comes_from_where_it_was_installed(editable: Environment, wheels: Environment) -> None:
    """Also mitigate itself: otherwise these tests would look at the repository and not at the packages."""
    show = "import mitigate, mitigate_pai.pai, mitigate_vcd.vcd as v; print(mitigate.__file__, v.__file__)"
    for environment, home in ((editable, editable.sources), (wheels, wheels.folder)):
        done = environment.run("-c", show)
        paths = [Path(path) for path in done.stdout.split()]
        assert [home in path.parents for path in paths] == [True, True], done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_a_wheel_holds_code_configuration_and_a_type_mark_and_no_tests(wheels: Environment, package: str) -> None:
    (path,) = wheels.origins[package]
    module, source = package.replace("-", "_"), wheels.sources / package / "src"
    packed = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    written = {
        str(file.relative_to(source)) for file in source.rglob("*.*") if file.suffix in (".py", ".yaml", ".typed")
    }
    assert packed == written
    assert {f"{module}/py.typed", f"{module}/conf/__init__.py"} < packed


def test_they_are_listed_with_their_package(installed: Environment) -> None:
    listed = {row["name"]: row for row in json.loads(installed.mitigate("list", "methods", "--json").stdout)}
    for name, package in NAMES.items():
        assert listed[name]["distribution"] == package
        assert listed[name]["paper"]["arxiv"]
        assert listed[name]["tags"]["forwards_per_token"] == 1
        assert all(parameter["doc"] for parameter in listed[name]["parameters"])
    assert listed["locore"]["distribution"] == "mitigate"


def test_a_plan_says_where_every_value_comes_from(installed: Environment) -> None:
    plan = planned(installed, "methods=[pai,vcd,locore]", "model=llava-1.5-7b", "methods.vcd.preset=pope_script")
    values, sources = plan["config"]["methods"], plan["provenance"]
    assert list(values) == ["pai", "vcd", "locore"]
    assert (values["pai"]["alpha"], sources["methods.pai.alpha"]) == (0.5, "model llava-1.5-7b (mitigate-pai)")
    assert (values["pai"]["gamma"], sources["methods.pai.gamma"]) == (1.1, "default")
    assert (values["vcd"]["beta"], sources["methods.vcd.beta"]) == (0.2, "preset pope_script")
    scores = next(line for line in plan["points"] if line["point"] == "attention_scores")
    assert (scores["method"], scores["layers"]) == ("pai", "2-31")
    given = planned(installed, "methods=[pai]", "model=llava-1.5-7b", "methods.pai.alpha=0.3")
    assert given["provenance"]["methods.pai.alpha"] == "command line"
    assert planned(installed, "methods=[pai]")["config"]["methods"]["pai"]["alpha"] == 0.2


@pytest.mark.parametrize(
    ("stack", "methods", "value"),
    [
        ("mitigate_pai_attention", ["pai"], ("pai", "gamma", 1.0)),
        ("mitigate_pai_locore", ["pai", "locore"], ("pai", "gamma", 1.1)),
        ("mitigate_vcd_cut_off", ["vcd"], ("vcd", "alpha", 0.0)),
        ("mitigate_vcd_locore", ["vcd", "locore"], ("vcd", "alpha", 1.0)),
    ],
)
def test_their_presets_are_stacks(
    wheels: Environment, stack: str, methods: list[str], value: tuple[str, str, float]
) -> None:
    config = planned(wheels, f"stack={stack}", "model=llava-1.5-7b")["config"]
    assert list(config["methods"]) == methods
    method, parameter, expected = value
    assert config["methods"][method][parameter] == expected


def test_a_preset_of_an_editable_package_is_a_stack(editable: Environment) -> None:
    assert list(planned(editable, "stack=mitigate_pai_locore")["config"]["methods"]) == ["pai", "locore"]


def test_the_search_path_shows_their_configuration(installed: Environment) -> None:
    shown = installed.mitigate("run", "--info", "searchpath")
    assert shown.returncode == 0, shown.stderr
    for package in NAMES.values():
        assert f"pkg://{package.replace('-', '_')}.conf" in shown.stdout


@pytest.mark.parametrize(
    ("wrong", "culprit"),
    [
        ("methods.pai.gama=2", "did you mean 'gamma'?"),
        ("methods.pai.gamma=0.5", "methods.pai.gamma=0.5"),
        ("methods.pai.layers=40-", "layer 40"),
        ("methods.pai.alpha=much", "methods.pai.alpha=much"),
    ],
)
def test_wrong_values_are_refused_as_for_a_built_in_method(wheels: Environment, wrong: str, culprit: str) -> None:
    refused = wheels.mitigate("plan", "methods=[pai]", "model=llava-1.5-7b", wrong)
    assert refused.returncode == 2
    assert culprit in refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 2


def test_the_suite_checks_an_installed_method(wheels: Environment) -> None:
    """A check of each kind: names, configuration, a model. The packages' own tests run all of them."""
    kinds = ("check_name", "check_config_round_trip", "check_identity")
    done = wheels.mitigate("check", *NAMES, *(word for kind in kinds for word in ("--check", kind)))
    assert done.returncode == 0, done.stdout
    for name in NAMES:
        assert f"{name} conforms: {len(kinds)} checks" in done.stdout


def test_discovery_can_be_limited(editable: Environment) -> None:
    listed = json.loads(editable.mitigate("list", "methods", "--json", plugins="mitigate-vcd").stdout)
    names = {row["name"] for row in listed}
    assert "vcd" in names
    assert "pai" not in names


def compared(environment: Environment, stacks: tuple[str, ...]) -> dict[str, Any]:
    """Run a small comparison on the testbed, ``runs/mine``."""
    done = environment.mitigate("compare", f"stacks=[{','.join(stacks)}]", *SMALL)
    assert done.returncode == 0, done.stderr
    comparison: dict[str, Any] = json.loads((environment.work / "runs" / "mine" / "comparison.json").read_text())
    assert tuple(comparison["stacks"]) == stacks
    return comparison


def test_they_run_in_a_stack_from_an_editable_installation(editable: Environment) -> None:
    effects = compared(editable, ("none", "pai+vcd+locore"))["stacks"]["pai+vcd+locore"]["effects"]
    assert effects["extra_forwards_per_token"] == 2.0


def test_they_run_in_a_stack_from_wheels_and_their_records_outlive_them(wheels: Environment) -> None:
    """A comparison on the testbed; then PAI is uninstalled: its name is gone, its records are not."""
    comparison = compared(wheels, STACKS)
    per_token = {stack: comparison["stacks"][stack]["effects"]["extra_forwards_per_token"] for stack in STACKS}
    assert per_token == {"none": 0.0, "pai": 1.0, "vcd": 1.0, "pai+vcd+locore": 2.0}
    wheels.pip("uninstall", "--yes", "--quiet", "mitigate-pai")
    try:
        gone = wheels.mitigate("compare", f"stacks=[{','.join(STACKS)}]", *SMALL)  # the command that made the records
        assert gone.returncode == 2
        assert "unknown stack 'pai'" in gone.stderr
        assert len(gone.stderr.strip().splitlines()) <= 2
        assert wheels.mitigate("plan", "methods=[vcd]").returncode == 0
        script = (
            "from pathlib import Path; from mitigate.records import RunRecord, read_samples\n"
            "folder = Path('runs/mine/pai')\n"
            "record = RunRecord.read(folder)\n"
            "assert record.versions['mitigate-pai'] == '0.1.0', record.versions\n"
            "print(record.telemetry['pai']['extra_forwards'], len(read_samples(folder)))"
        )
        read = wheels.run("-c", script)
        assert read.returncode == 0, read.stderr
        forwards, samples = map(float, read.stdout.split())
        assert forwards > 0
        assert samples == comparison["n_samples"]
    finally:
        wheels.install("mitigate-pai")
    assert "pai" in planned(wheels, "methods=[pai]")["config"]["methods"]
