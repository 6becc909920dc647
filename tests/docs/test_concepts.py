"""The tables of the concepts pages are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from mitigate.core import Access, Phase, Point, Rows, Subscription, Tags
from mitigate.core.layout import Role, TokenLayout
from mitigate.core.plan import READ_ONLY, SERVED
from mitigate.core.points import BRANCH_POINTS, LAYER_POINTS, MAIN
from mitigate.effects import EFFECT_COUNTERS
from tests.docs.pages import DOCS, ROOT, blocks, source

CONCEPTS = DOCS / "concepts"
POINTS, STACKS, LAYOUTS, RECORDS = (CONCEPTS / f"{name}.md" for name in ("points", "stacks", "layouts", "records"))
LIFECYCLE = {Point.SAMPLE_BEGIN, Point.STEP_BEGIN, Point.PREFILL_END, Point.STEP_END, Point.SAMPLE_END}


def rows(path: Path, first: str) -> dict[str, list[str]]:
    """Return the rows of the table whose heading begins with a word, by their first cell."""
    table = source(path).partition(f"\n| {first} |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def events() -> dict[str, set[str]]:
    """Return event class -> its own annotated attributes, from the source."""
    tree = ast.parse((ROOT / "mitigate" / "core" / "events.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> set[str]:
        own = {item.target.id for item in classes[name].body if isinstance(item, ast.AnnAssign)}
        return own.union(*(fields(ast.unparse(base)) for base in classes[name].bases if ast.unparse(base) in classes))

    return {name: fields(name) for name in classes}


def own_tensors(name: str) -> set[str]:
    """Return the tensors an event class adds, without those that only say which rows and keys they are about."""
    tree = ast.parse((ROOT / "mitigate" / "core" / "events.py").read_text(encoding="utf-8"))
    event = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    own = [item for item in event.body if isinstance(item, ast.AnnAssign)]
    return {item.target.id for item in own if "Tensor" in ast.unparse(item.annotation)} - {"rows", "row_mask", "unseen"}


@pytest.mark.parametrize("path", sorted(CONCEPTS.glob("*.md")), ids=lambda path: path.stem)
def test_pages_begin_with_an_example(path: Path) -> None:
    assert re.match(r"# .+\n\n```python\n", source(path))
    assert blocks(path)[0].fragment is None
    assert blocks(path)[0].output


def test_the_points_are_those_of_the_code() -> None:
    table = {name.strip("`"): cells for name, cells in rows(POINTS, "point").items()}
    assert list(table) == [point.value for point in Point], "every point, in the order of a forward"
    known = events()
    for point in Point:
        event, sees, returns, _, branches = table[point.value]
        if point not in SERVED:
            assert event == "not served"
            continue
        name = event.strip("`")
        if point in LIFECYCLE:
            assert name == "Event"
        else:
            assert name.lower() == point.value.replace("_", "")
            named = set(re.findall(r"`([a-z]+)`", sees))
            assert own_tensors(name) <= named <= known[name]
        assert (returns == "–") == (point in LIFECYCLE or point in READ_ONLY)
        wanted = "only there" if point is Point.TEXT_INPUT else "yes" if point in BRANCH_POINTS else "no"
        assert branches == wanted
    assert {name for name, fields in known.items() if "layer" in fields} == {
        table[point.value][0].strip("`") for point in LAYER_POINTS
    }


def test_subscriptions_are_described_field_by_field() -> None:
    section = source(POINTS).partition("\n## Subscriptions\n")[2].partition("\n## ")[0]
    fields = [field.name for field in dataclasses.fields(Subscription)]
    described = re.findall(r"^\* \*\*(\w+)\.\*\*", section, re.MULTILINE)
    assert sorted(described) == sorted({*fields} - {"point"})
    values = {value.value for kind in (Access, Phase, Rows) for value in kind} | {MAIN}
    assert values - {"all"} <= set(re.findall(r"`(\w+)`", section))


def test_what_the_request_offers_exists() -> None:
    tree = ast.parse((ROOT / "mitigate" / "core" / "request.py").read_text(encoding="utf-8"))
    request = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Request")
    known = {node.name for node in request.body if isinstance(node, ast.FunctionDef)}
    known |= {
        node.attr for node in ast.walk(request) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    named = re.findall(r"`(\w+)", " ".join(rows(POINTS, "of the request")))
    assert len(named) > 5
    assert set(named) <= known


def test_the_tags_are_those_of_the_code() -> None:
    named = re.findall(r"`(\w+)`", " ".join(rows(STACKS, "tag")))
    assert named == [field.name for field in dataclasses.fields(Tags)]


def test_the_layout_is_described_completely() -> None:
    assert [name.strip("`") for name in rows(LAYOUTS, "role")] == [role.name for role in Role]
    named = {re.match(r"`(\w+)", name)[1] for name in rows(LAYOUTS, "attribute")}
    offered = {name for name in dir(TokenLayout) if not name.startswith("_")}
    offered |= {field.name for field in dataclasses.fields(TokenLayout)}
    assert named <= offered
    assert offered - named == {"rows", "prompt_roles", "grown", "repeated"}, "what the bus alone needs"


def test_the_design_names_every_part() -> None:
    parts = {path.parent.name for path in (ROOT / "mitigate").glob("*/__init__.py")}
    table = source(DOCS / "design.md").partition("## The parts")[2].partition("\n## ")[0]
    assert parts <= set(re.findall(r"`(?:mitigate/)?(\w+)/`", table))


def test_every_counter_of_an_edit_is_described() -> None:
    named = set(re.findall(r"`(\w+)`", source(RECORDS).partition("\n## Counters\n")[2]))
    assert set(EFFECT_COUNTERS) - {"fallbacks"} <= named


def test_the_files_of_a_run_are_those_that_are_written() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mitigate").rglob("*.py"))
    for file in re.findall(r"`([a-z0-9.]+\.(?:json|jsonl|html))`", " ".join(rows(RECORDS, "file"))):
        assert f'"{file}"' in code or file == "samples.rank0.jsonl"
