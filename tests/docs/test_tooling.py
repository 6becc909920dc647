"""What contributors run is what CI runs, and the forms they fill in are short."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, ROOT, source

CHECK = ROOT / "scripts" / "check"
BOXES = 8


def lines(path: Path) -> list[str]:
    return [line for line in source(path).splitlines() if line and not line.startswith("#")]


def test_everybody_runs_the_same_checks() -> None:
    assert lines(ROOT / "scripts" / "test.sh")[-1] == 'exec "$root/scripts/check" "$@"'
    assert lines(ROOT / ".ci" / "run")[-1] == "bash scripts/test.sh"
    workflow = yaml.safe_load(source(ROOT / ".github" / "workflows" / "test.yml"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert steps == ["bash scripts/test.sh"]
    assert os.access(CHECK, os.X_OK)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Put stand-ins for the tools on PATH; they write down how they were called."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "check").write_text(source(CHECK))
    (tmp_path / "bin").mkdir()
    for tool in ("ruff", "mypy", "python"):
        stand_in = tmp_path / "bin" / tool
        stand_in.write_text(f'#!/bin/sh\necho {tool} "$@" >>"{tmp_path}/calls"\n[ "$1" != "$FAILS" ]\n')
        stand_in.chmod(0o755)
    return tmp_path


def called(tools: Path, *arguments: str, fails: str = "-") -> tuple[int, list[str]]:
    environment = {**os.environ, "PATH": f"{tools / 'bin'}:{os.environ['PATH']}", "FAILS": fails}
    environment.pop("CHECK_PROCESSES", None)
    done = subprocess.run(
        ["bash", str(tools / "scripts" / "check"), *arguments], env=environment, check=False, timeout=30
    )
    return done.returncode, (tools / "calls").read_text().splitlines()


def test_check_runs_lint_types_docs_and_tests(tools: Path) -> None:
    code, calls = called(tools)
    assert code == 0
    assert calls == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "python scripts/make_docs.py --check",
        "python scripts/support_matrix.py --check",
        "python -m pytest -n 2 --dist worksteal",
    ]


def test_check_hands_arguments_to_pytest(tools: Path) -> None:
    assert called(tools, "--fast", "tests/docs")[1][-1].endswith("worksteal -m not slow tests/docs")
    assert called(tools, "-k", "news")[1][-1].endswith("worksteal -k news")


@pytest.mark.parametrize(("fails", "calls"), [("format", 2), ("scripts/make_docs.py", 4)])
def test_check_stops_at_the_first_failure(tools: Path, fails: str, calls: int) -> None:
    code, made = called(tools, fails=fails)
    assert code == 1
    assert len(made) == calls


def test_pre_commit_downloads_nothing() -> None:
    config = yaml.safe_load(source(ROOT / ".pre-commit-config.yaml"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    assert {"ruff-check", "ruff-format", "mypy", "check-yaml", "check-toml", "check-large-files", "docs"} <= set(hooks)
    watched = re.compile(hooks["docs"]["files"])
    assert all(watched.search(path) for path in ("mitigate/methods/locore.py", "README.md", "docs/methods/index.md"))
    assert not watched.search("docs/index.md")


def test_the_pull_request_template_is_short() -> None:
    template = source(ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md")
    assert 4 <= template.count("- [ ] ") <= BOXES
    for target in re.findall(r"\]\(\.\./([^)]+)\)", template):
        assert (ROOT / target).exists()


def test_issue_forms_can_be_read() -> None:
    forms = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
    assert {path.stem for path in forms} == {"bug", "new-method"}
    for path in forms:
        form = yaml.safe_load(source(path))
        assert form["name"]
        assert form["description"]
        assert all(field["attributes"]["label"] for field in form["body"])
    assert "docs/concepts/points.md" in source(ROOT / ".github" / "ISSUE_TEMPLATE" / "new-method.yml")
    assert (DOCS / "concepts").is_dir()


def test_the_support_matrix_notices_changes_of_extended_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MITIGATE_PLUGINS", "none")
    script = runpy.run_path(str(ROOT / "scripts" / "support_matrix.py"))
    stamp = script["stamp"]
    shutil.copytree(ROOT / "mitigate" / "adapters", tmp_path / "mitigate" / "adapters")
    monkeypatch.setitem(stamp.__globals__, "ROOT", tmp_path)

    def changed(name: str) -> bool:
        before, file = stamp("llava_onevision", "locore"), tmp_path / "mitigate" / "adapters" / f"{name}.py"
        file.write_text(file.read_text() + "# changed")
        return bool(stamp("llava_onevision", "locore") != before)

    assert [changed(name) for name in ("llava_onevision", "llava_next", "chameleon")] == [True, True, False]
