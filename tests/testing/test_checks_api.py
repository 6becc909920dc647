"""Tests of the checks without a model: each catches the methods broken for it, and passes one that keeps the rules."""

from __future__ import annotations

import importlib
import re
import sys
import time
from pathlib import Path

import pytest

from mitigate.core import Method
from mitigate.registry import methods
from mitigate.testing.base import CheckResult
from mitigate.testing.suite import catalogue, check_method
from tests.testing.broken_api import BROKEN
from tests.testing.gentle import Gentle

WITHOUT_MODEL = [known.name for known in catalogue() if not known.needs_model]


def failures(plugin: type[Method], *only: str) -> list[CheckResult]:
    return [row for row in check_method(plugin, families=(), only=only, on_fail=None) if row.bad]


@pytest.mark.parametrize(
    ("plugin", "check", "message"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}") for case in BROKEN],
)
def test_a_broken_method_is_caught(plugin: type[Method], check: str, message: str) -> None:
    said = [row.message for row in failures(plugin, check)]
    assert any(re.search(message, text) for text in said), said


def test_every_check_without_a_model_has_a_method_it_catches() -> None:
    assert {check for _, check, _ in BROKEN} | {"check_import_clean"} == set(WITHOUT_MODEL)


@pytest.mark.parametrize("check", WITHOUT_MODEL)
def test_a_method_that_keeps_the_rules_passes(check: str) -> None:
    assert failures(Gentle, check) == []


def test_a_gentle_method_is_in_nobodys_way() -> None:
    assert "gentle" not in methods().names()


@pytest.mark.parametrize("name", methods().names())
def test_built_in_methods_conform_without_a_model(name: str) -> None:
    began = time.perf_counter()
    assert [(row.check, row.message) for row in failures(methods().get(name), *WITHOUT_MODEL)] == []
    assert time.perf_counter() - began < 30  # a few seconds alone; the machine may be busy


SNEAKY = [
    ("print('hello')", r"importing sneaky prints: hello"),
    ("import warnings; warnings.warn('careful')", r"importing sneaky prints: .*careful"),
    ("import warnings; warnings.filterwarnings('ignore')", r"importing sneaky changes warnings\.filters; nothing may"),
    ("import os; os.environ['SNEAKY'] = '1'", r"changes os\.environ"),
    ("import random; random.seed(3)", r"changes the random module's state"),
    ("import numpy; numpy.random.seed(3)", r"changes the numpy random state"),
    ("import logging; logging.basicConfig()", r"changes the root logger"),
    ("import threading; threading.Thread(target=lambda: __import__('time').sleep(2), daemon=True).start()", r"threads"),
    (
        "import socket\ntry:\n    socket.create_connection(('example.org', 80))\nexcept OSError:\n    pass",
        r"importing sneaky asks the network for example\.org",
    ),
    ("import torch", r"importing sneaky loads torch, which makes .*: write `from mitigate\.lazy import torch`"),
    (
        "from mitigate.lazy import torch\ntorch.set_default_dtype(torch.float64)\n"
        "torch.manual_seed(3)\ntorch.set_grad_enabled(False)",
        r"changes torch's default dtype, torch's grad mode, torch's random state;",
    ),
    (
        "from transformers.generation.utils import GenerationMixin\nGenerationMixin.generate = None\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\nALL_ATTENTION_FUNCTIONS['mine'] = print",
        r"the attention functions of transformers, transformers\.generation\.utils\.GenerationMixin",
    ),
    ("import no_such_module", r"cannot be imported in a fresh process: ModuleNotFoundError: .*no_such_module"),
    ("raise SystemExit(3)", r"cannot be imported in a fresh process: exit code 3"),
]


def from_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, type[Gentle]]:
    """Return a clean file and the class made from it; a fresh process imports what the file holds then."""
    file = folder / "sneaky.py"
    file.write_text("from tests.testing.gentle import Gentle\n\nclass Sneaky(Gentle):\n    name = 'sneaky'\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "sneaky", raising=False)
    plugin: type[Gentle] = importlib.import_module("sneaky").Sneaky
    monkeypatch.delitem(sys.modules, "sneaky")
    return file, plugin


def test_a_clean_file_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plugin = from_file(tmp_path, monkeypatch)
    assert failures(plugin, "check_import_clean") == []


@pytest.mark.parametrize(("line", "message"), SNEAKY, ids=[line.partition("\n")[0] for line, _ in SNEAKY])
def test_a_file_that_does_something_at_import_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    file, plugin = from_file(tmp_path, monkeypatch)
    file.write_text(file.read_text() + f"\n{line}\n")
    (caught,) = failures(plugin, "check_import_clean")
    assert re.search(message, caught.message), caught.message
