"""Fragments of the changelog: their names are the tool's, each is one line a user understands, and they build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, source

NEWS = DOCS / "news"
SETTINGS = tomllib.loads(source(ROOT / "pyproject.toml"))["tool"]["towncrier"]
KINDS = [kind["directory"] for kind in SETTINGS["type"]]
FRAGMENTS = sorted(path for path in NEWS.iterdir() if path.name not in SETTINGS["ignore"])
LONGEST = 200


def towncrier(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "towncrier", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def problem(name: str, text: str) -> str | None:
    """Say what is wrong with a fragment."""
    if not re.fullmatch(rf"[a-z0-9]+(-[a-z0-9]+)*\.({'|'.join(KINDS)})\.md", name):
        return f"{name}: call it <slug>.<{'|'.join(KINDS)}>.md"
    lines = text.splitlines()
    if len(lines) != 1 or not text.endswith("\n"):
        return f"{name}: one line, please; several changes are several files"
    if not (text[0].isupper() or text[0] == "`") or text.strip()[-1] != "." or len(text) > LONGEST:
        return f"{name}: a sentence of at most {LONGEST} letters"
    return None


def test_fragments_are_well_formed() -> None:
    assert [wrong for path in FRAGMENTS if (wrong := problem(path.name, source(path)))] == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("Beam.fix.md", "Beams work.\n", "call it"),
        ("beam.bugfix.md", "Beams work.\n", "call it"),
        ("beam.fix.md", "Beams work.\nSo do others.\n", "one line"),
        ("beam.fix.md", "beams work\n", "a sentence"),
        ("beam.fix.md", f"Beams {'really ' * 30}work.\n", "a sentence"),
    ],
)
def test_malformed_fragments_are_told(name: str, text: str, told: str) -> None:
    assert told in (problem(name, text) or "")


def test_the_readme_names_every_kind() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", source(NEWS / "README.md"), re.MULTILINE)) == set(KINDS)


def test_fragments_become_a_release(tmp_path: Path) -> None:
    shutil.copytree(NEWS, tmp_path / "docs" / "news")
    for file in ("pyproject.toml", "docs/changelog.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "docs" / "news" / "beams.fix.md").write_text("Beams work.\n")
    done = towncrier("build", "--yes", "--version", "9.8", "--date", "2030-01-02", folder=tmp_path)
    changelog = (tmp_path / "docs" / "changelog.md").read_text()
    assert "## 9.8 (2030-01-02)\n\n### " in changelog, done.stderr
    assert "- Beams work.\n" in changelog.split("\n### Fixed\n\n")[1]
    assert changelog.index("towncrier: releases") < changelog.index("## 9.8")
    assert all(text.strip() in changelog for text in map(source, FRAGMENTS))
    assert sorted(path.name for path in (tmp_path / "docs" / "news").iterdir()) == sorted(SETTINGS["ignore"])


def test_an_unknown_kind_stops_the_build(tmp_path: Path) -> None:
    shutil.copytree(NEWS, tmp_path / "docs" / "news")
    for file in ("pyproject.toml", "docs/changelog.md"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "docs" / "news" / "beams.bugfix.md").write_text("Beams work.\n")
    assert towncrier("build", "--draft", "--version", "9.8", folder=tmp_path).returncode != 0
