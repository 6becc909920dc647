"""The generated tables are current: what README says about methods is what their classes and the checks say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import make_docs  # noqa: E402  # a script


def test_generated_docs_are_current() -> None:
    command = [sys.executable, "scripts/make_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def results() -> dict[str, dict[str, object]]:
    return json.loads(make_docs.RESULTS.read_text(encoding="utf-8"))


def test_results_of_other_code_are_stale(results) -> None:
    results["locore"]["code"] = "0" * 12
    assert [line for line in make_docs.stale(results) if line.startswith("the code of locore has changed")]


def test_results_of_other_checks_are_stale(results) -> None:
    results["locore"]["checks"]["check_gone"] = "passed"
    assert any("locore" in line and "check_gone" in line for line in make_docs.stale(results))


def test_methods_without_a_result_and_results_without_a_method_are_told(results) -> None:
    results["gone"] = results.pop("scr")
    told = make_docs.stale(results)
    assert any(line.startswith("scr has no conformance result") for line in told)
    assert any("results of gone" in line for line in told)
    assert make_docs.conformance(results.get("scr")) == "not run"


def test_a_result_counts_what_ran() -> None:
    said = {"a": "passed", "b": "passed", "c": "skipped", "d": "failed", "e": "expected failure"}
    assert make_docs.conformance({"checks": said}) == "2 of 4 checks, 1 expected failure"


def test_a_check_is_as_good_as_its_worst_case() -> None:
    class Result:
        def __init__(self, check: str, status: str) -> None:
            self.check, self.status = check, status

    found = [Result("a", "passed"), Result("a", "failed"), Result("b", "skipped"), Result("b", "passed")]
    found += [Result("c", "passed"), Result("c", "expected failure"), Result("d", "skipped")]
    assert make_docs.worst(found) == {"a": "failed", "b": "passed", "c": "expected failure", "d": "skipped"}


def test_tables_survive_a_pipe_in_a_cell() -> None:
    assert make_docs.table([["a|b"]], ["h"]) == "| h |\n| --- |\n| a\\|b |\n"


def test_readme_needs_its_markers(monkeypatch, tmp_path) -> None:
    (tmp_path / "README.md").write_text("no table\n")
    monkeypatch.setattr(make_docs, "README", tmp_path / "README.md")
    with pytest.raises(SystemExit, match=r"README\.md needs the lines"):
        make_docs.pages({})
