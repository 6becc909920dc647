"""Which source a plugin's hash covers."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from mitigate.runner.fingerprint import code_hash

FILES = {
    "__init__.py": "",
    "plugin.py": "from fingerprinted import helper\nfrom .numbers import TWO\nfrom fingerprinted_base import Base\n"
    "class Plugin(Base): ...\n",
    "../fingerprinted_base.py": "from fingerprinted_interface import Interface\n\n\nclass Base(Interface): ...\n",
    "../fingerprinted_interface.py": "class Interface:\n    api = 1\n",
    "helper.py": "import math\nimport fingerprinted.deeper\n",
    "deeper.py": "ONE = 1\n",
    "numbers.py": "from . import more\n\nTWO = 2\n",
    "more.py": "FOUR = 4\n",
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


@pytest.mark.parametrize("changed", sorted(FILES.keys() - {"__init__.py"}))
def test_the_hash_covers_what_the_plugins_file_imports(package, changed):
    plugin = importlib.import_module("fingerprinted.plugin").Plugin
    before = code_hash(plugin)
    (package / changed).write_text(FILES[changed] + "# changed\n")
    assert (code_hash(plugin) != before) is (changed not in ("unrelated.py", "../fingerprinted_interface.py"))


CELL = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Cell:
    gain: float = 1.0
    names: list = field(default_factory=list)

    @property
    def twice(self):
        return 2

    def act(self):
        return [name for name in self.names if name in {"a", "b"}] * 4 * helper()

def helper():
    return deeper() + 3

def deeper():
    return 1
"""


def cell_hash(old: str = "", new: str = "") -> str:
    program = f"cell = {CELL.replace(old, new)!r}; exec(cell); print(code_hash(Cell))"
    command = f"from mitigate.runner.fingerprint import code_hash; {program}"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout


def test_a_class_of_a_notebook_is_known_by_its_functions():
    """The same in another process; another one once the cell is changed, so that old answers are not taken for new."""
    first = cell_hash()
    assert len(first.strip()) == 12
    assert cell_hash() == first
    places = ("* 4", "return 2", "+ 3", "return 1")  # a method, a property, what it calls, and what that calls
    assert len({first, *(cell_hash(place, f"{place} + 5") for place in places)}) == 5
