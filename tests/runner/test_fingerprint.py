"""Which source a plugin's hash covers."""

from __future__ import annotations

import importlib
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


def test_a_class_of_a_notebook_is_unknown():
    assert code_hash(type("Cell", (), {"__module__": "a_notebook_cell"})) == "unknown"
