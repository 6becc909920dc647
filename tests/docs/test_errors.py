"""One page per exception: its example raises it, its messages are the code's, and no exception lacks a page."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from mitigate.errors import MitigateError
from tests.docs.pages import DOCS, ROOT, Session, blocks, source

FOLDER = DOCS / "errors"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
#: Exceptions without a page: signals that no user sees.
WITHOUT_PAGE = {
    "Skip": "a check's word for 'does not apply', shown as a skipped check",
    "Strayed": "told as the CheckFailure of check_device",
}
#: Pages of exceptions whose messages are other pages' matter, or those of single checks.
WITHOUT_MESSAGES = {"MitigateError", "CheckFailure"}
#: Fewer letters than this do not identify a message.
TELLING = 8


@functools.cache
def classes() -> dict[str, ast.ClassDef]:
    """Return the public exceptions that the package defines."""
    found: dict[str, ast.ClassDef] = {}
    nodes = [
        node
        for path in sorted((ROOT / "mitigate").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    while True:
        new = {
            node.name: node
            for node in nodes
            if node.name not in found
            and {ast.unparse(base) for base in node.bases} & {"Exception", "ValueError", "RuntimeError", *found}
        }
        if not new:
            return found
        found |= new


@functools.cache
def patterns(name: str) -> list[re.Pattern[str]]:
    """Return the messages the code gives this exception; what is filled in matches anything."""
    found = []
    for path in sorted((ROOT / "mitigate").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name and node.args:
                first = node.args[0]
                parts = [first] if isinstance(first, ast.Constant) else getattr(first, "values", [])
                text = [part.value.replace("\n", " ") if isinstance(part, ast.Constant) else None for part in parts]
                if sum(len(part) for part in text if part) >= TELLING:
                    regex = "".join(".*" if part is None else re.escape(part) for part in text)
                    found.append(re.compile(regex))
    return found


def messages(path: Path) -> list[str]:
    table = source(path).partition("## Messages")[2].partition("\n## ")[0]
    return [text for _, text in re.findall(r"^\| (`+) ?(.+?) ?\1 \|", table, re.MULTILINE)]


def test_every_exception_has_a_page() -> None:
    assert {path.stem for path in PAGES} == set(classes()) - set(WITHOUT_PAGE)


def test_the_index_lists_every_page_with_its_parent() -> None:
    listed = dict(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| `?(\w+)`? \|", source(FOLDER / "index.md"), re.MULTILINE))
    assert listed == {path.stem: ast.unparse(classes()[path.stem].bases[0]) for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_example_raises(path: Path) -> None:
    example, *others = blocks(path)
    assert not others
    assert source(path).startswith(f"# {path.stem}\n")
    session = Session(f"docs_errors_{path.stem}")
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is what the page says
            session.run(example)
    finally:
        session.close()
    error = caught.value
    named = MitigateError if path.stem == "MitigateError" else type(error)
    assert isinstance(error, named)
    assert named.__name__ == path.stem
    message = str(error).replace(f"({session.module.__name__}:", "(mine.py:")  # as if the example were in a file
    assert example.output == f"{type(error).__name__}: {message}\n"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_messages_are_the_codes(path: Path) -> None:
    invented = [
        message for message in messages(path) if not any(pattern.fullmatch(message) for pattern in patterns(path.stem))
    ]
    assert invented == []
    assert messages(path) or path.stem in WITHOUT_MESSAGES
