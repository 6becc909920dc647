"""Which source a plugin's hash covers."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from mitigate.runner.fingerprint import code_hash

FILES = {
    "__init__.py": "",
    "plugin.py": "from fingerprinted import helper\nfrom fingerprinted.numbers import TWO\n\n\nclass Plugin: ...\n",
    "helper.py": "import math\nimport fingerprinted.deeper\n",
    "deeper.py": "ONE = 1\n",
    "numbers.py": "TWO = 2\n",
    "unrelated.py": "THREE = 3\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "fingerprinted"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("fingerprinted")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("changed", "differs"),
    [("plugin.py", True), ("helper.py", True), ("deeper.py", True), ("numbers.py", True), ("unrelated.py", False)],
)
def test_the_hash_covers_what_the_plugins_file_imports(package, changed, differs):
    plugin = importlib.import_module("fingerprinted.plugin").Plugin
    before = code_hash(plugin)
    (package / changed).write_text(FILES[changed] + "# changed\n")
    assert (code_hash(plugin) != before) is differs


CELL = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Cell:
    gain: float = 1.0
    names: list = field(default_factory=list)

    def act(self):
        return [name for name in self.names if name in {"a", "b"}] * NUMBER
"""


def cell_hash(number: str) -> str:
    program = f"cell = {CELL.replace('NUMBER', number)!r}; exec(cell); print(code_hash(Cell))"
    command = f"from mitigate.runner.fingerprint import code_hash; {program}"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout


def test_a_class_of_a_notebook_is_known_by_its_functions():
    """The same in another process; another one once the cell is changed, so that old answers are not taken for new."""
    first = cell_hash("2")
    assert len(first.strip()) == 12
    assert cell_hash("2") == first
    assert cell_hash("3") != first
