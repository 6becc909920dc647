"""The pages for contributors: followed literally, and their lists held against the code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from mitigate import Stack
from mitigate.core import Point
from mitigate.core.plan import SERVED
from mitigate.discovery import ENTRY_POINT_GROUPS
from mitigate.scaffold import FILES, NewPackage
from mitigate.testing.suite import catalogue
from tests.docs.pages import DOCS, ROOT, Block, Session, blocks, source
from tests.forking import FORKED, Forks
from tests.references.tiny import make_inputs, tiny_llava
from tests.test_readme import small

FOLDER = DOCS / "contribute"
ADD, OUTSIDE, TESTING = (FOLDER / name for name in ("add-a-method.md", "outside-package.md", "testing.md"))
#: What stands around the excerpt about a second stream.
SECOND_STREAM = """
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mitigate.core import *


def distort(image, generator):
    return image + torch.randn(image.shape, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Contrast(Method):
    name: ClassVar[str] = "contrast"
    alpha: float = 4.0
"""


class Reader:
    """Somebody who follows a page from top to bottom.

    Installing is done by pip into a folder of its own, without the network; code comes from the package's ``src``, as
    it does in an editable install.
    """

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.site, self.runs, self.forks = folder, folder / "site", folder / "runs", forks
        self.edited, self.said = False, ""

    def module(self, *words: str, folder: Path | None = None) -> None:
        self.said += self.forks.run(*words, folder=folder or self.folder, path=(self.folder / "src", self.site))

    def command(self, line: str) -> None:
        words = shlex.split(line)
        if words[0] == "mitigate":
            as_written = words[1] == "check" and not self.edited  # tests/cli/test_new.py runs all checks on that
            self.module("mitigate", *small(line, self.runs)[1:], *(["--check", "check_handlers"] if as_written else []))
        elif words[0] == "cd":
            self.folder /= words[1]
        elif words[:3] == ["pip", "install", "-e"]:
            options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(self.site))
            self.module("pip", "install", *options, ".")
            for package in self.site.glob("mitigate_*/"):
                if not package.name.endswith("-info"):
                    shutil.rmtree(package)
        elif words[0] == "pytest":  # `mitigate check`, just before, has run the conformance checks
            self.module("pytest", "-q", "-p", "no:cacheprovider", "-k", "not conforms")
        elif words[0] == "ruff":
            self.module(*words, "--no-cache")
        elif words[0] == "mypy":  # with the project's settings and cache, as strict as the package's
            packages = [str(path.parent) for path in self.folder.glob("src/*/__init__.py")]
            self.module("mypy", "--strict", *packages, folder=ROOT)
        else:
            raise AssertionError(f"the page says {line!r}, which this test cannot follow")

    def follow(self, page: Path) -> None:
        fence = r"^(?:<!-- fragment: (\S+\.py) -->\n)?```(bash|python)\n(.*?)^```$"
        for target, language, text in re.findall(fence, source(page), re.MULTILINE | re.DOTALL):
            if language == "bash":
                for line in text.splitlines():
                    for command in line.split(" && "):
                        self.command(command)
            elif target:
                assert (self.folder / target).exists(), f"{target}: not a file of the package"
                (self.folder / target).write_text(text)
                self.edited = True


@pytest.mark.slow
@FORKED
def test_add_a_method_is_followed_literally(tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, forks)
    reader.follow(ADD)
    assert reader.said.count("vaf conforms") == 2, "the example as written, and the method"
    assert "reconstructed" in reader.said, "the plan tells the method's fidelity"
    assert "vaf+locore: 20/20 samples" in reader.said


def test_the_example_is_short() -> None:
    method = next(block.text for block in blocks(ADD) if block.fragment == "src/mitigate_vaf/vaf.py")
    lines = [line for line in method.splitlines() if line.strip()]
    assert len(lines) <= 90
    assert max(map(len, method.splitlines())) <= 120


def test_every_point_has_a_line_or_is_said_not_to_be_served() -> None:
    table = source(ADD).partition("| what the paper changes |")[2].partition("\n\n")[0]
    column = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in table.splitlines() if line.count("|") == 4]
    listed = [point for points in column for point in points]
    assert sorted(listed) == sorted(point.value for point in SERVED)
    missing = re.search(r"^\* Not served: (.*?),", source(ADD), re.MULTILINE)
    assert missing
    assert set(re.findall(r"`(\w+)`", missing[1])) == {point.value for point in set(Point) - SERVED}


def test_every_check_has_its_line() -> None:
    rows = re.findall(r"^\| `(check_\w+)` \| (.*?) \| (.*?) \|$", source(TESTING), re.MULTILINE)
    assert [(name, rule) for name, rule, _ in rows] == [(check.name, check.summary) for check in catalogue()]
    assert all(remedy for _, _, remedy in rows)


@pytest.fixture(scope="module")
def package() -> dict[str, str]:
    return NewPackage("my_method", "locore").render()


def test_outside_package_shows_what_the_scaffold_writes(package: dict[str, str]) -> None:
    tree = next(text for text in re.findall(r"```text\n(.*?)```", source(OUTSIDE), re.DOTALL))
    assert [line.strip() for line in tree.splitlines()[1:]] == list(package)
    toml = re.search(r"```toml\n(.*?)```", source(OUTSIDE), re.DOTALL)
    assert toml
    written = re.sub(r"^#.*\n", "", package["pyproject.toml"], flags=re.MULTILINE)
    for part in toml[1].strip().split("\n\n"):
        assert part in written
    assert len(FILES) == len(package)


def test_outside_package_lists_the_groups_that_are_read() -> None:
    listed = re.findall(r"^\| `(mitigate\.\w+)` \|", source(OUTSIDE), re.MULTILINE)
    assert listed == list(ENTRY_POINT_GROUPS)


@FORKED
def test_preset_and_tuned_values_are_read(tmp_path: Path, forks: Forks) -> None:
    """The YAML files of the page, in the package they are for."""
    NewPackage("my_method", "locore").write(tmp_path)
    conf = tmp_path / "src" / "mitigate_my_method" / "conf"
    preset, tuned = re.findall(r"```yaml\n(.*?)```", source(OUTSIDE), re.DOTALL)
    (conf / "tuned").mkdir()
    (conf / "tuned" / "llava-1.5-7b.yaml").write_text(tuned)
    (conf / "stack" / "mitigate_my_method_strong.yaml").write_text(preset)
    info = tmp_path / "site" / "mitigate_my_method-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mitigate-my-method\nVersion: 0.1.0\n")
    groups = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {value}\n" for group, names in groups.items() for name, value in names.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    places, chosen = (tmp_path / "src", tmp_path / "site"), ("methods=[my_method]", "stack=mitigate_my_method_strong")
    alone, strong = (
        json.loads(forks.run("mitigate", "plan", "--json", choice, "model=llava-1.5-7b", folder=tmp_path, path=places))
        for choice in chosen
    )
    assert alone["config"]["methods"]["my_method"]["gain"] == 1.2
    assert alone["provenance"]["methods.my_method.gain"] == "model llava-1.5-7b (mitigate-my-method)"
    assert strong["config"]["methods"]["my_method"]["gain"] == 2.0
    assert strong["provenance"]["methods.my_method.gain"] == "stack mitigate_my_method_strong"


def test_the_second_stream_runs() -> None:
    """The excerpt, in a class: the answer changes, and the tags own up to the forwards."""
    body = next(block.text for block in blocks(ADD) if "def branches" in block.text)
    page = Session("second_stream")
    try:
        page.run(Block("python", f"{SECOND_STREAM}\n{body}", None, None))
        model = tiny_llava(seed=0)
        inputs = make_inputs(model, [(3, 1, 4)])
        plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with Stack([page.module.Contrast()]).attach(model) as handle:
            contrasted = handle.generate(**inputs, max_new_tokens=4, do_sample=False)
            forwards = handle.telemetry()[0]["contrast"]["extra_forwards"]
        assert not torch.equal(plain, contrasted)
        assert 0 < forwards <= 4
    finally:
        page.close()
