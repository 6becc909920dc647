"""``mitigate new method``: what it writes is installed, checked and run as it stands; wrong wishes are refused."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from mitigate.cli import main
from mitigate.errors import ConfigError
from mitigate.scaffold import FILES, NewPackage
from tests.forking import FORKED, Forks

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "mitigate" / "scaffold"
#: The shortest and the longest name: lines must fit for both.
NAMES = ("a", "a_name_of_just_30_characters_x")


def run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("MITIGATE_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as written by the command."""
    where = tmp_path_factory.mktemp("new")
    said = run("mitigate", "new", "method", "my_idea", folder=where)
    assert "mitigate check my_idea" in said
    return where / "mitigate-my-idea"


@pytest.fixture(scope="module")
def site(folder: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package installed by pip."""
    target = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    forks.run("pip", "install", *options, str(folder), folder=folder)
    return target


@FORKED
def test_it_runs_in_a_stack_with_a_built_in_method(site: Path, forks: Forks, tmp_path: Path) -> None:
    small = ("benchmark.limit=2", "decoding.max_new_tokens=8", "tracker=none", f"runs_dir={tmp_path}")
    said = forks.run("mitigate", "run", "methods=[my_idea,locore]", *small, folder=tmp_path, path=[site])
    assert "my_idea+locore" in said


@FORKED
@pytest.mark.parametrize(("preset", "expected"), [("", "stack mitigate_my_idea"), ("_locore", "my_idea → locore")])
def test_its_presets_are_found(site: Path, forks: Forks, preset: str, expected: str) -> None:
    assert expected in forks.run("mitigate", "plan", f"stack=mitigate_my_idea{preset}", folder=site, path=[site])


@FORKED
@pytest.mark.slow
def test_it_conforms(site: Path, forks: Forks) -> None:
    forks.run("mitigate", "check", "my_idea", folder=site, path=[site])


@FORKED
def test_its_own_tests_pass(folder: Path, site: Path, forks: Forks) -> None:
    """All but the conformance checks, which the test before this one runs."""
    forks.run("pytest", "-q", "-p", "no:cacheprovider", "-k", "not conforms", folder=folder, path=[site])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_linted_and_formatted(name: str, tmp_path: Path) -> None:
    NewPackage(name, "locore").write(tmp_path)
    run("ruff", "check", "--no-cache", ".", folder=tmp_path)
    run("ruff", "format", "--no-cache", "--check", ".", folder=tmp_path)


def test_it_is_typed(folder: Path) -> None:
    """With the project's own settings, as strict as the package's, so that libraries are read from mypy's cache."""
    run("mypy", "--strict", str(folder / "src" / "mitigate_my_idea"), folder=ROOT)


def test_four_places_are_marked(folder: Path) -> None:
    code = (folder / "src" / "mitigate_my_idea" / "my_idea.py").read_text()
    assert [code.count(f"TODO {place}/4") for place in range(1, 6)] == [1, 1, 1, 1, 0]


@FORKED
def test_listing_it_imports_no_torch(site: Path) -> None:
    code = "import sys, mitigate_my_idea.my_idea; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_every_template_is_used_and_shipped() -> None:
    templates = {path.name for path in TEMPLATES.glob("*.j2")}
    assert templates == set(FILES)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mitigate.scaffold"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in templates)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Foo", "lower-case"),
        ("my-idea", "lower-case"),
        ("my__idea", "lower-case"),
        ("_idea", "lower-case"),
        ("2nd", "lower-case"),
        ("", "lower-case"),
        ("lambda", "word of the Python language"),
        ("null", "read it as a value"),
        ("on", "read it as a value"),
        ("conf", "the package needs that name itself"),
        ("method", "the package needs that name itself"),
        ("a" * 31, "at most 30"),
        ("locore", "'locore' exists already, in mitigate;"),
        ("none", "stack preset"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "method", name, "--package", str(tmp_path / "new")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_every_class_the_method_file_imports_is_kept_free() -> None:
    code = NewPackage("x", "locore").render()["src/mitigate_x/x.py"]
    froms = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    classes = {alias.name for node in froms for alias in node.names if not alias.name.islower()} - {"TYPE_CHECKING"}
    assert {"Method", "Tensor", "ClassVar"} <= classes
    for name in classes:
        with pytest.raises(ConfigError, match="needs that name itself"):
            NewPackage(re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), "locore")


def test_a_package_is_written_over_only_when_told(folder: Path) -> None:
    method, foreign = folder / "src" / "mitigate_my_idea" / "my_idea.py", folder / "notes.txt"
    written = method.read_text()
    method.write_text("mine")
    foreign.write_text("mine too")
    package = NewPackage("my_idea", "locore")
    with pytest.raises(ConfigError, match="exists already"):
        package.write(folder)
    assert method.read_text() == "mine"
    package.write(folder, force=True)
    assert method.read_text() == written
    assert foreign.read_text() == "mine too"
    foreign.unlink()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    NewPackage("my_idea", "locore").write(tmp_path)
    assert (tmp_path / "pyproject.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["metric", "x"], "makes methods only"),
        (["method"], "takes one name"),
        (["method", "x", "y"], "takes one name"),
        (["method", "x", "--package"], "needs a folder"),
        (["method", "x", "--forced"], "did you mean '--force'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("--package DIR", "\n  --force ", "src/mitigate_NAME/NAME.py", "mitigate check")
    )
    assert main(["new"]) == 2
