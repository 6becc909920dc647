"""Every page: its Python runs and prints what it says, its links lead somewhere, nothing public goes unmentioned."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import mitigate
import mitigate.core
import mitigate.testing
from mitigate.cli import COMMANDS
from mitigate.compose.session import GROUPS
from mitigate.core import Tags
from mitigate.registry import benchmarks, methods, trackers
from tests.docs.pages import DOCS, PAGES, ROOT, Session, anchors, blocks, links, page_id, source

README, MAP = ROOT / "README.md", DOCS / "index.md"
#: Pages whose Python is run by tests of their own.
TESTED_ELSEWHERE = {
    README: "tests/test_readme.py",
    **dict.fromkeys((DOCS / "errors").glob("*.md"), "tests/docs/test_errors.py"),
}
#: Public names that no page mentions, with the reason.
UNMENTIONED = {"__version__": "is what --version prints"}


@pytest.mark.parametrize("path", [path for path in PAGES if path not in TESTED_ELSEWHERE and blocks(path)], ids=page_id)
def test_python_runs_and_prints_what_the_page_says(path: Path) -> None:
    session = Session(f"docs_{re.sub(r'[^a-z0-9]+', '_', page_id(path))}")
    try:
        for block in blocks(path):
            if block.fragment is None:
                printed = session.run(block)
                assert block.output is None or printed == block.output
    finally:
        session.close()


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_fragments_say_what_they_are(path: Path) -> None:
    assert [block.text for block in blocks(path) if block.fragment is not None and len(block.fragment) < 3] == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_map_leads_to_every_page() -> None:
    """Each page is on the map, or a page on the map that lies beside it leads to it."""
    linked = {
        path: {(path.parent / link.partition("#")[0]).resolve() for link in links(path)}
        for path in PAGES
        if path != README
    }
    found = {MAP, README} | linked[MAP]
    found |= {target for path in found & set(linked) for target in linked[path] if target.parent == path.parent != DOCS}
    assert [page_id(path) for path in PAGES if path not in found] == []


def public_names() -> dict[str, set[str]]:
    return {
        "mitigate": set(mitigate.__all__),
        "mitigate.core": set(mitigate.core.__all__),
        "mitigate.testing": set(mitigate.testing.__all__),
        "tags": {field.name for field in dataclasses.fields(Tags)},
        "configuration groups": set(GROUPS),
        "methods": set(methods().names()),
        "benchmarks": set(benchmarks().names()),
        "trackers": set(trackers().names()),
    }


@pytest.mark.parametrize("kind", public_names())
def test_every_public_name_is_mentioned(kind: str) -> None:
    words = {
        word
        for path in PAGES
        for code in re.findall(r"```.*?```|`[^`\n]+`", source(path), re.DOTALL)
        for word in re.findall(r"\w+", code)
    }
    assert sorted(public_names()[kind] - words - set(UNMENTIONED)) == []


def test_every_command_is_mentioned() -> None:
    text = "\n".join(source(path) for path in PAGES)
    assert [command for command in COMMANDS if f"mitigate {command}" not in text] == []


def test_exceptions_to_the_rule_exist() -> None:
    assert set(UNMENTIONED) <= set().union(*public_names().values())
