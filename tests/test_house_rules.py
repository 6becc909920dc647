"""Rules about the source itself that no linter knows."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mitigate.compose.schemas import parameters_of
from mitigate.registry import methods

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mitigate"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORK = [path for path in SOURCES if PACKAGE / "methods" not in path.parents]

MODULE_LINES = 400
FUNCTION_LINES = 60

#: Library -> folders of the package that may import it.
ALLOWED = {
    "hydra": ("compose", "cli"),
    "pytorch_lightning": ("runner", "testbed"),
    "lightning": (),
    "wandb": ("trackers",),
    "rich": ("cli", "runner", "report", "testbed"),
    "matplotlib": ("diagnostics",),
    "pooch": ("data",),
    "nltk": ("metrics",),
    "openai": ("judges",),
    "pytest": ("testing",),
    "scipy": ("statistics",),
}
#: Parts of the project a folder must not import.
FORBIDDEN = {
    "core": (
        "benchmarks",
        "cli",
        "compose",
        "methods",
        "metrics",
        "report",
        "runner",
        "testbed",
        "trackers",
    ),
    "methods": ("adapters", "benchmarks", "cli", "compose", "metrics", "report", "runner", "trackers"),
    "ops": ("adapters", "cli", "compose", "methods", "runner", "testbed"),
    "decoding": ("benchmarks", "cli", "compose", "methods", "runner", "testbed"),
    "adapters": ("benchmarks", "cli", "compose", "methods", "runner"),
    "benchmarks": ("adapters", "cli", "compose", "core", "methods", "runner"),
    "metrics": ("adapters", "cli", "compose", "core", "methods", "runner"),
    "judges": ("adapters", "benchmarks", "cli", "compose", "core", "methods", "report", "runner", "trackers"),
    "compose": ("adapters", "cli", "report", "runner", "trackers"),
    "testbed": ("cli", "compose", "methods", "runner"),
    "trackers": ("cli", "compose", "methods", "runner"),
    "data": ("adapters", "cli", "compose", "core", "methods", "runner"),
    "report": ("adapters", "cli", "compose", "methods"),
    "runner": ("cli", "diagnostics", "methods"),
    "diagnostics": ("cli", "methods"),
    "reproduction": ("adapters", "cli", "core", "methods", "testbed", "trackers"),
    "scaffold": ("cli", "compose", "core", "methods", "runner"),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names a file imports, also inside functions; not what only the type checker sees."""
    hidden = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every identifier and string of a file."""
    for node in ast.walk(tree(path)):
        for field in ("id", "attr", "arg", "name", "module", "value", "asname"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MODULE_LINES, f"{path} has {lines} lines: split it by purpose"
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_the_framework_names_no_method() -> None:
    names = {name for known in methods().names() for name in (known, methods().get(known).__name__)}
    pattern = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, sorted(names)))})(?![A-Za-z0-9])")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()[:60]}"
        for path in FRAMEWORK
        for line, text in words(path)
        if pattern.search(text)
    ]
    assert found == [], "only mitigate/methods may know methods by name"


@pytest.mark.parametrize("name", methods().names())
def test_one_name_per_method(name: str) -> None:
    plugin = methods().get(name)
    if not plugin.__module__.startswith("mitigate."):
        pytest.skip("comes from another package")
    assert plugin.__module__ == f"mitigate.methods.{name}"
    assert plugin.name == name
    assert "paper" in plugin.presets
    assert plugin.summary
    assert "\n" not in plugin.summary
    undocumented = [parameter.name for parameter in parameters_of(plugin) if not parameter.doc]
    assert undocumented == [], f"{name}: describe every parameter in the class docstring"


@pytest.mark.parametrize("library", ALLOWED)
def test_libraries_stay_in_their_place(library: str) -> None:
    strangers = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imports(path)
        if name.split(".")[0] == library and folder(path) not in ALLOWED[library]
    ]
    assert strangers == []


@pytest.mark.parametrize("part", FORBIDDEN)
def test_dependencies_point_one_way(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if folder(path) == part
        for name in imports(path)
        for target in FORBIDDEN[part]
        if name == f"mitigate.{target}" or name.startswith(f"mitigate.{target}.")
    ]
    assert wrong == []


def test_no_asserts_and_no_prints_in_the_package() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if isinstance(node, ast.Assert) or called:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == [], "raise a MitigateError; print through the console of the CLI"


@pytest.fixture(scope="module")
def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_shipped(project: dict[str, dict[str, dict[str, object]]]) -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {*folders, "mitigate.conf"}  # type: ignore[call-overload]


def test_every_dependency_has_one_exact_version(project: dict[str, dict[str, object]]) -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins), "one name==version a line, no local suffix"
    assert "torch==2.13.0" in pins
    wanted = [*project["project"]["dependencies"]]  # type: ignore[misc]
    wanted += project["project"]["optional-dependencies"]["dev"]  # type: ignore[index]
    names = {re.split(r"[\[<>=~! ]", str(requirement))[0] for requirement in wanted}
    assert names <= {pin.split("==")[0] for pin in pins}


def test_set_up_names_no_package_index() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.suffix in ("", ".sh", ".txt") and path.is_file()]
    files = [*scripts, ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    assert ROOT / "scripts" / "check" in files
    for path in files:
        assert not re.search(r"index-url|find-links|https?://", path.read_text(encoding="utf-8")), path


def test_ci_runs_the_same_script_as_people() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert "bash scripts/test.sh" in lines
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
