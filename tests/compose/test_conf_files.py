"""The files of conf/: each composes, and holds nothing but differences from the dataclasses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mitigate.compose import compose_comparison, compose_run
from mitigate.compose.schema import RunConfig
from mitigate.compose.schemas import defaults_of
from mitigate.compose.session import GROUPS, flatten, session
from mitigate.registry import benchmarks, methods

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(
    path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent.name != "sweep"
)  # W&B's, not Hydra's


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load((CONF / file).read_text(encoding="utf-8")) or {}


def names(group: str) -> list[str]:
    return [file.stem for file in FILES if file.parts[0] == group]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_is_known_to_hydra(file: Path) -> None:
    if len(file.parts) == 1:
        assert file.name == "config.yaml"
        return
    with session() as hydra:
        assert file.stem in hydra.options(file.parts[0])
    assert file.parts[0] in GROUPS


def test_methods_and_benchmarks_have_no_files() -> None:
    assert not (CONF / "methods").exists()
    assert not (CONF / "benchmark").exists()


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("decoding", "trainer", "tracker") for name in names(group)]
)
def test_options_compose(group: str, name: str) -> None:
    assert compose_run([f"{group}={name}"]).config["model"]["name"] == "testbed"


#: Rows of single published tables: composed here on one large model, and on their own ones in tests/reproduction.
ROWS = {
    "beam", "scr-four-connected", "scr-gaussian-noise", "scr-radius2", "scr-uniform-smooth",
    "sgrs+locore-alpha-0.9", "sgrs+locore-beta-1",
}  # fmt: skip


#: Every stack is composed on these, and some of them on each of the other models.
THOROUGH = ("testbed", "llava-1.5-7b")


@pytest.mark.parametrize("model", names("model"))
def test_stacks_compose_on_models(model: str) -> None:
    stacks = [stack for stack in names("stack") if model == "testbed" or not stack.startswith("control")]
    stacks = [stack for stack in stacks if model == "llava-1.5-7b" or stack not in ROWS]
    if model not in THOROUGH:
        step = (
            3 if "tuned" in read(Path("model") / f"{model}.yaml") else 12
        )  # without values of its own one is as another
        stacks = ["none", *[stack for stack in stacks if stack != "none"][names("model").index(model) % step :: step]]
    path = ["model.path=x"] if model == "hf" else []
    runs = compose_comparison([f"model={model}", *path, f"stacks=[{','.join(stacks)}]"])
    assert sorted(run.stack_name for run in runs) == sorted(stacks)
    for run in runs:
        assert [method.name for method in run.methods.values()] == in_file(run.stack_name)


def in_file(stack: str) -> list[str]:
    """The methods a stack's file selects, read without Hydra."""
    defaults = read(Path("stack") / f"{stack}.yaml").get("defaults", [])
    return [name for default in defaults for name in default["override /methods"]]


def test_stacks_that_are_named_after_their_methods() -> None:
    for stack in names("stack"):
        parts = stack.split("+")
        if stack != "none" and all(part in methods().names() for part in parts):
            assert in_file(stack) == parts
    assert in_file("none") == []
    assert in_file("mission") == ["scr", "clva", "dleaf", "locore", "sgrs"]


def test_a_pin_is_a_whole_commit_and_the_same_wherever_its_repository_is_named() -> None:
    pins: dict[str, set[str | None]] = {}
    for name in names("model"):
        model = read(Path("model") / f"{name}.yaml")
        pins.setdefault(model.get("path", name), set()).add(model.get("revision"))
    assert all(len(found) == 1 for found in pins.values())
    assert all(pin is None or re.fullmatch("[0-9a-f]{40}", pin) for found in pins.values() for pin in found)
    assert len({pin for found in pins.values() for pin in found if pin}) > 20


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiments_compose_and_say_what_to_expect(experiment: str) -> None:
    assert "Expected: " in (CONF / "experiment" / f"{experiment}.yaml").read_text()
    if "reproduction" not in read(Path("experiment") / f"{experiment}.yaml"):  # those: tests/reproduction
        assert compose_comparison([f"experiment={experiment}"])[0].stack_name == "none"


def test_the_default_comparison() -> None:
    runs = compose_comparison()
    singles = ["locore", "scr", "dleaf", "clva", "sgrs"]
    assert [run.stack_name for run in runs] == ["none", *singles, "sgrs+locore", "mission"]


@pytest.mark.parametrize("model", names("model"))
def test_tuned_values_belong_to_methods_and_differ_from_their_defaults(model: str) -> None:
    for name, values in read(Path("model") / f"{model}.yaml").get("tuned", {}).items():
        defaults = defaults_of(methods().get(name))
        for parameter, value in values.items():
            assert parameter in defaults
            assert value != defaults[parameter], f"tuned.{name}.{parameter} repeats the default"


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "config.yaml"], ids=str)
def test_no_value_repeats_a_default(file: Path) -> None:
    defaults = flatten(dataclasses.asdict(RunConfig()))
    for name in benchmarks().names():
        defaults |= {f"benchmark.{key}": value for key, value in defaults_of(benchmarks().get(name)).items()}
    for name in methods().names():
        defaults |= {f"methods.{name}.{key}": value for key, value in defaults_of(methods().get(name)).items()}
    content = {key: value for key, value in read(file).items() if key not in ("defaults", "tuned", "reproduction")}
    prefix = "" if file.parts[0] in ("stack", "experiment") else file.parts[0]
    for key, value in flatten(content, prefix).items() if content else ():
        if key.endswith(".preset"):
            assert value in methods().get(key.split(".")[1]).presets
            continue
        assert key in defaults, f"{key} is no key"
        assert value != defaults[key], f"{key}: {value} repeats the default"
