"""Tests of the checks on tiny models: each catches the methods broken for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaMLP

from mitigate.testing.base import CHECKS, CheckFailure, Subject
from mitigate.testing.suite import catalogue
from mitigate.testing.tiny import tiny_model
from tests.testing import broken_lifecycle, broken_results
from tests.testing.catching import BROKEN, Broken

MODULES = (broken_lifecycle, broken_results)


@pytest.fixture(autouse=True)
def _unharmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what broken methods do to the process."""
    monkeypatch.setattr(torch.nn.functional, "softmax", torch.nn.functional.softmax)
    monkeypatch.setattr(LlamaMLP, "forward", LlamaMLP.forward)
    broken_lifecycle._SEEN.clear()
    yield
    torch.set_grad_enabled(True)
    AttentionInterface._global_mapping.pop("mine", None)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_broken_method_is_caught(broken: Broken) -> None:
    subject = Subject(broken.plugin(**broken.params), tiny_model("llava"))
    with pytest.raises(CheckFailure, match=broken.message):
        CHECKS[broken.check].run(subject)


def test_every_check_on_a_model_has_a_method_it_catches() -> None:
    on_models = {known.name for known in catalogue() if known.needs_model}
    assert {broken.check for broken in BROKEN} == on_models
