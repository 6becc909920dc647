"""Markdown pages of the project, read as what the tests need: code blocks, links, headings, words.

A fenced ``python`` block runs, after those before it on its page. A fenced ``text`` block that follows one directly
is what it prints. ``<!-- fragment: why -->`` before a block says why it does not run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

from mitigate.registry import methods

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: Every page people read; fragments of the changelog are no pages.
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
    if DOCS / "news" not in path.parents or path.stem == "README"
)

_FENCE = re.compile(
    r"^(?:<!-- (?P<kind>\w+): (?P<why>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_OUTPUT = re.compile(r"\A\n*```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_id(path: Path) -> str:
    """Name a page in test ids."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``output`` is what it prints, if the page says so, ``fragment`` why it does not run."""

    language: str
    text: str
    output: str | None
    fragment: str | None


def blocks(path: Path, language: str = "python") -> list[Block]:
    """Return the fenced blocks of a language, in order."""
    text = source(path)
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] == language:
            printed = _OUTPUT.match(text[match.end() :])
            fragment = match["why"] if match["kind"] == "fragment" else None
            found.append(Block(language, match["text"], printed[1] if printed else None, fragment))
    return found


def without_code(path: Path) -> str:
    """Return a page's prose: fenced and indented blocks left out."""
    prose = _FENCE.sub("", source(path))
    return "\n".join(line for line in prose.splitlines() if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the usual renderers make them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", without_code(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        anchor = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))
        number = found.get(anchor, 0)
        found[anchor] = number + 1
        names.add(f"{anchor}-{number}" if number else anchor)
    return names


def links(path: Path) -> list[str]:
    """Return the targets of a page's links and pictures inside the project."""
    prose = re.sub(r"`[^`\n]*`", "", without_code(path))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"[a-z]+:", target)]


class Session:
    """Runs the blocks of a page one after the other, in one namespace that looks like a module."""

    def __init__(self, name: str) -> None:
        self.module = types.ModuleType(name)
        sys.modules[name] = self.module  # dataclasses look their annotations up there

    def run(self, block: Block) -> str:
        """Run a block and return what it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.text, self.module.__name__, "exec"), vars(self.module))
        return out.getvalue()

    def close(self) -> None:
        """Forget the module, and every method it registered."""
        for entry in methods().entries():
            if entry.value.startswith(f"{self.module.__name__}:"):
                methods().unregister(entry.name)
        sys.modules.pop(self.module.__name__, None)
