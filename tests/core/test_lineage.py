"""What a method keeps per request row follows the rows when beam search repeats and permutes them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mitigate.core import Access, Fidelity, Method, MethodState, Point, Rows, Subscription, Tags
from mitigate.core.lineage import Lineage
from mitigate.core.stack import Stack
from mitigate.errors import HookError
from tests.references.tiny import IMAGE, PAD, make_inputs

PROMPTS = [(3, 1, 6), (2, 1, 3)]


@dataclass(frozen=True, kw_only=True)
class Gaze(Method):
    """Divides the logits by a temperature made of all attention to the picture so far."""

    name: ClassVar[str] = "gaze"
    summary: ClassVar[str] = "temperature from an average over time"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS}), writes=frozenset({Point.NEXT_TOKEN_LOGITS}))

    def subscriptions(self, model):
        return [
            Subscription(point=Point.ATTENTION_PROBS, access=Access.READ, layers=(1,), rows=Rows.LAST),
            Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE),
        ]

    def on_attention_probs(self, event, state):
        image = event.layout.image_mask[:, : event.probs.shape[-1]]
        now = (event.probs[:, :, -1].mean(1) * image).sum(-1)
        old = state.per_row.get("mean")
        state.per_row.mean = now if old is None else 0.5 * old + 0.5 * now

    def on_next_token_logits(self, event, state):
        return event.logits / (0.2 + 3.0 * state.per_row.mean[:, None])


def expected(model, ids, pixels, prompt):
    """Log probabilities of the next token from one forward over all tokens, without a stack."""
    image = ids == IMAGE
    out = model(input_ids=ids[None], pixel_values=pixels, output_attentions=True, use_cache=False)
    weights = out.attentions[1][0].mean(0)
    mean = None
    for row in range(prompt - 1, len(ids)):
        now = weights[row, image].sum()
        mean = now if mean is None else 0.5 * mean + 0.5 * now
    return (out.logits[0, -1] / (0.2 + 3.0 * mean)).log_softmax(-1)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_an_average_over_time_follows_its_beam(model, cached):
    """The scores of every beam at every step are those of its own tokens, from plain forwards."""
    inputs = make_inputs(model, PROMPTS, seed=8)
    width, seen = inputs["input_ids"].shape[1], []

    def watch(ids, scores):
        seen.append((ids.clone(), scores.clone()))
        return scores

    with Stack([Gaze()]).attach(model) as handle:
        options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": 3}
        handle.generate(**inputs, **options, use_cache=cached, logits_processor=[watch])
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    assert len(seen) == 6
    for ids, scores in seen:
        for row, words in enumerate(ids):
            valid = inputs["attention_mask"][row // 4].bool()
            text = torch.cat([words[:width][valid], words[width:]])
            pixels = inputs["pixel_values"][row // 4 : row // 4 + 1]
            torch.testing.assert_close(scores[row], expected(plain, text, pixels, int(valid.sum())), rtol=0, atol=2e-5)


def test_prefixes_tell_the_rows_apart_within_a_sample():
    told = []
    lineage = Lineage(2, lambda rows: told.append(rows.tolist()))
    first = torch.tensor([[7, 1], [7, 2], [7, 1], [7, 2]])
    lineage.follow(first, 0, None)
    lineage.follow(torch.cat([first, first[:, :1]], 1), 0, None)
    assert told == []  # nothing moved
    lineage.follow(torch.tensor([[7, 2, 7, 5], [7, 2, 7, 6], [7, 2, 7, 5], [7, 1, 7, 6]]), 0, None)
    assert told == [[1, 1, 3, 2]]
    lineage.follow(torch.tensor([[9, 9, 9, 9, 9]] * 4), 0, None)  # another prompt
    assert len(told) == 1


def test_rows_are_repeated_and_taken():
    state = MethodState("m", rows=2)
    state.per_row.mean = torch.tensor([1.0, 2.0])
    state.repeat(2)
    assert state.per_row.mean.tolist() == [1.0, 1.0, 2.0, 2.0]
    state.per_row.take(torch.tensor([1, 0, 3, 3]))
    state.per_row.more = torch.zeros(4, 3)
    assert state.per_row.mean.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert state.per_row.get("other", 5) == 5


@pytest.mark.parametrize("value", [[1.0, 2.0], torch.zeros(3), torch.tensor(1.0)], ids=["list", "rows", "scalar"])
def test_what_has_no_rows_is_refused(value):
    state = MethodState("m", rows=2)
    with pytest.raises(TypeError, match=r"state\.per_row\.mean must be a tensor with 2 request rows first, not"):
        state.per_row.mean = value


def test_the_message_reaches_the_author(model):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Gaze):
        def on_attention_probs(self, event, state):
            state.per_row.mean = 1.0

    with Stack([Wrong()]).attach(model), pytest.raises(HookError, match="2 request rows first, not float"):
        model.generate(**make_inputs(model, PROMPTS, seed=8), max_new_tokens=2, pad_token_id=PAD)
