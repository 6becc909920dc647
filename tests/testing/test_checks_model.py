"""Tests of the checks on tiny models: each catches the methods broken for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaMLP

from mitigate.testing.base import CHECKS, CheckFailure, Subject
from mitigate.testing.running import Outcome, apart
from mitigate.testing.suite import catalogue, check_method
from mitigate.testing.tiny import tiny_model
from tests.testing import broken_declarations, broken_lifecycle
from tests.testing import broken_results as _broken_results  # noqa: F401 - importing it fills the list
from tests.testing.catching import BROKEN, Broken
from tests.testing.gentle import Gentle

ON_MODELS = [known.name for known in catalogue() if known.needs_model]


@pytest.fixture(autouse=True)
def _unharmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what broken methods do to the process."""
    monkeypatch.setattr(torch.nn.functional, "softmax", torch.nn.functional.softmax)
    monkeypatch.setattr(LlamaMLP, "forward", LlamaMLP.forward)
    broken_lifecycle._SEEN.clear()
    yield
    torch.set_grad_enabled(True)
    AttentionInterface._global_mapping.pop("mine", None)
    os.environ.pop("MINE", None)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_broken_method_is_caught(broken: Broken) -> None:
    subject = Subject(broken.plugin(**broken.params), tiny_model("llava"))
    with pytest.raises(CheckFailure, match=broken.message):
        CHECKS[broken.check].run(subject)


def test_a_method_that_keeps_the_rules_passes() -> None:
    rows = check_method(Gentle, only=ON_MODELS, on_fail=None)
    assert [(row.check, row.message) for row in rows if row.bad] == []
    assert {row.check for row in rows if row.status == "skipped"} == {
        "check_probabilities",  # it writes no attention
        "check_positions",  # it may touch every token
        "check_cost_is_paid",  # it costs nothing
        "check_draws",  # it draws nothing
    }


def test_every_check_on_a_model_has_a_method_it_catches() -> None:
    assert {broken.check for broken in BROKEN} == set(ON_MODELS)


def test_tokens_may_be_excluded() -> None:
    only = ["check_dtypes", "check_composes", "check_batch", "check_is_observed"]
    rows = check_method(broken_declarations.Excluding(), only=only, on_fail=None)
    assert [(row.check, row.message) for row in rows if row.status != "passed"] == []


def test_logits_that_exclude_the_same_tokens_differ_by_numbers() -> None:
    one, other = (torch.tensor([[[value, -torch.inf, -torch.inf]]]) for value in (1.0, 3.0))
    outcomes = [Outcome(torch.zeros(1, 1), logits, [], []) for logits in (one, other)]
    assert apart(outcomes[0], outcomes[0]) == ""
    assert apart(*outcomes) == "sample 0, token 0 (logits differ by up to 2)"
