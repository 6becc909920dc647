"""What handlers see at each point, and what their edits do, against transformers' eager attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from mitigate.core import Access, Fidelity, Method, Phase, Point, Rows, Subscription, Tags
from mitigate.core.attention import refuse_unserved
from mitigate.core.stack import Stack
from mitigate.errors import UnsupportedModel
from tests.references import runs
from tests.references.tiny import PAD, full_forward, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 1, 3)]


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Runs a function at one point and keeps what it saw."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "runs a function"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point))
    subscription: Subscription
    function: Callable[[Any], Any] = lambda event: None
    seen: list[Any] = field(default_factory=list, compare=False)

    def subscriptions(self, model):
        return [self.subscription]

    def _handle(self, event, state):
        self.seen.append(event)
        return self.function(event)

    on_attention_probs = on_attention_scores = on_hidden_states = on_next_token_logits = _handle
    on_visual_embeddings = on_sample_begin = on_step_begin = on_step_end = on_prefill_end = on_sample_end = _handle


def generate(model, methods, inputs, steps=3, **kwargs):
    return runs.generate(model, methods, inputs, steps, eos_token_id=3, **kwargs)


def test_all_rows_equal_the_eager_matrix(model):
    """Every row of every layer, padded batch: the weights the bus shows are those of the hand-written decoder."""
    inputs = make_inputs(model, PROMPTS, seed=1)
    probe = Probe(
        subscription=Subscription(
            point=Point.ATTENTION_PROBS, layers=tuple(range(6)), rows=Rows.ALL, access=Access.READ
        )
    )
    with Stack([probe]).attach(model):
        model(**inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        length = sample["input_ids"].shape[1]
        expected = full_forward(model, sample["input_ids"], sample["pixel_values"], collect=True).probs
        for event in probe.seen:
            assert event.row_mask[row].sum() == length
            torch.testing.assert_close(
                event.probs[row, :, -length:, -length:], expected[event.layer], rtol=0, atol=1e-5
            )


def test_position_set_sees_the_union_and_its_own_mask(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    width = inputs["input_ids"].shape[1]

    def wanted(layout):
        mask = torch.zeros_like(layout.valid)
        mask[0, width - 2] = mask[1, width - 1] = True
        return mask

    probe = Probe(subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(2,), rows=wanted))
    with Stack([probe]).attach(model):
        model(**inputs)
    (event,) = probe.seen
    assert event.rows.tolist() == [width - 2, width - 1]
    assert event.row_mask.tolist() == [[True, False], [False, True]]


def test_edit_of_chosen_rows_equals_the_edit_in_the_full_matrix():
    model = tiny_llava(seed=3)
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    length = inputs["input_ids"].shape[1]
    columns = slice(length - 4, length - 1)

    def edit(event):
        return event.probs.flip(1)

    def naive(layer, probs):
        if layer != 2:
            return probs
        edited = probs.clone()
        edited[:, columns] = probs[:, columns].flip(0)
        return edited

    def rows(layout):
        mask = torch.zeros_like(layout.valid)
        mask[:, columns] = True
        return mask

    subscription = Subscription(point=Point.ATTENTION_PROBS, layers=(2,), rows=rows, access=Access.WRITE)
    with Stack([Probe(subscription=subscription, function=edit)]).attach(model) as handle:
        ours = model(**inputs).logits[0]
        counted = handle.telemetry()[0]["probe"]
    expected = full_forward(model, inputs["input_ids"], inputs["pixel_values"], probs_edit=naive).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert counted["rows_edited"] == 3
    plain = model(**inputs).logits[0]
    assert torch.equal(ours[: length - 4], plain[: length - 4])
    assert not torch.equal(ours[length - 4 :], plain[length - 4 :])


def test_scores_come_before_probs_and_stack_order_rules_within():
    model = tiny_llava(seed=3)
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    order = []

    def note(name, factor):
        def function(event):
            order.append(name)
            return getattr(event, "probs", getattr(event, "scores", None)) * factor

        return function

    def stack(first, second):
        return {
            "late": Probe(
                subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(1,), access=Access.WRITE),
                function=note("probs", 0.5),
            ),
            "a": Probe(
                subscription=Subscription(point=Point.ATTENTION_SCORES, layers=(1,), access=Access.WRITE),
                function=note(first, 1.5),
            ),
            "b": Probe(
                subscription=Subscription(point=Point.ATTENTION_SCORES, layers=(1,), access=Access.WRITE),
                function=note(second, 0.5),
            ),
        }

    generate(model, stack("first", "second"), inputs, steps=1)
    assert order == ["first", "second", "probs"]


@pytest.mark.parametrize("cache", [True, False])
def test_predictor_rows_with_and_without_a_cache(model, cache):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    length = inputs["input_ids"].shape[1]
    probe = Probe(subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(0,), rows=Rows.PREDICTORS))
    _, telemetry = generate(model, [probe], inputs, use_cache=cache)
    rows = [event.rows.tolist() for event in probe.seen]
    if cache:
        assert rows == [[length - 1], [length], [length + 1]]
    else:
        assert rows == [[length - 1], [length - 1, length], [length - 1, length, length + 1]]
    assert [(event.phase, event.step) for event in probe.seen] == [
        (Phase.PREFILL, 0),
        (Phase.DECODE, 1),
        (Phase.DECODE, 2),
    ]
    assert telemetry[0]["bus"]["attention_rows"] == sum(map(len, rows)) * 6


def test_hidden_states_replace_the_block_output(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)

    def edit(layer, hidden):
        return hidden * 1.5 if layer == 3 else hidden

    subscription = Subscription(point=Point.HIDDEN_STATES, layers=(3,), access=Access.WRITE)
    probe = Probe(subscription=subscription, function=lambda event: event.hidden * 1.5)
    with Stack([probe]).attach(model) as handle:
        ours = model(**inputs).logits[0]
        assert handle.telemetry()[0]["probe"]["tokens_edited"] == inputs["input_ids"].shape[1]
    expected = full_forward(model, inputs["input_ids"], inputs["pixel_values"], hidden_edit=edit).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert probe.seen[0].start == 0


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_next_token_logits_decide_the_tokens(model, decoding):
    inputs = make_inputs(model, PROMPTS, seed=1)

    def only(event):
        return torch.full_like(event.logits, -1e4).index_fill(1, torch.tensor([40 + event.step]), 0.0)

    subscription = Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)
    out, telemetry = generate(model, [Probe(subscription=subscription, function=only)], inputs, **decoding)
    assert out.sequences[:, -3:].tolist() == [[40, 41, 42]] * 2
    assert telemetry[0]["probe"]["steps_edited"] == 3 * decoding.get("num_beams", 1)


def test_visual_embeddings_are_per_image_and_replaceable(model):
    inputs = make_inputs(model, [(3, 2, 6), (2, 1, 3)], seed=1)
    read = Probe(subscription=Subscription(point=Point.VISUAL_EMBEDDINGS))
    out, _ = generate(model, [read], inputs)
    (event,) = read.seen
    assert [feature.shape for feature in event.features] == [(36, 64)] * 3
    swap = Probe(
        subscription=Subscription(point=Point.VISUAL_EMBEDDINGS, access=Access.WRITE),
        function=lambda event: event.features[::-1],
    )
    swapped, _ = generate(model, [swap], inputs)
    inputs["pixel_values"] = inputs["pixel_values"].flip(0)
    expected, _ = generate(model, [read], inputs)
    assert torch.equal(swapped.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(swapped.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    assert not torch.equal(torch.stack(swapped.logits), torch.stack(out.logits))


def test_lifecycle_order(model):
    names = ("sample_begin", "step_begin", "prefill_end", "step_end", "sample_end")
    order = []

    def note(name):
        return lambda event: order.append(name)

    stack = {name: Probe(subscription=Subscription(point=Point(name)), function=note(name)) for name in reversed(names)}
    generate(model, stack, make_inputs(model, PROMPTS), steps=2)
    step = ["step_begin", "step_end"]
    assert order == ["sample_begin", "step_begin", "prefill_end", "step_end", *step, "sample_end"]


def test_finished_samples_are_no_longer_served():
    """A sample that ended early is neither edited nor counted while the others go on."""
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS, seed=1)

    def stop_first_row(event):
        forced = torch.full_like(event.logits, -1e4)
        forced[0, 2 if event.step == 1 else 50] = 0.0
        forced[1, 60] = 0.0
        return forced

    force = Probe(
        subscription=Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE), function=stop_first_row
    )
    gain = Probe(
        subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(0, 1), access=Access.WRITE),
        function=lambda event: event.probs * 0.9,
    )
    with Stack({"force": force, "gain": gain}).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=2)
        first, second = handle.telemetry()
    assert out[0, -5:].tolist() == [50, 2, PAD, PAD, PAD]
    assert first["gain"]["rows_edited"] == 2 * 2
    assert second["gain"]["rows_edited"] == 2 * 5
    assert (first["bus"]["forwards"], second["bus"]["forwards"]) == (2, 5)


def test_gradient_of_the_one_token_graph_equals_the_full_sequence():
    """d(cotangent . logits)/dA through the bus against autograd over the hand-written full sequence, every layer."""
    model = tiny_llava(seed=5)
    inputs = make_inputs(model, PROMPTS, seed=2)
    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(3, 2, 100, generator=generator)
    collected = []

    @dataclass(frozen=True, kw_only=True)
    class Differentiate(Probe):
        tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point), gradient=True, selects_token=True)

        def subscriptions(self, model):
            return [
                Subscription(
                    point=Point.ATTENTION_PROBS, access=Access.GRADIENT, layers=tuple(range(6)), rows=Rows.LAST
                ),
                Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE),
            ]

        def on_select_token(self, event, state):
            collected.append(event.attention_gradients(cotangents[event.step]))

    unused = Subscription(point=Point.STEP_END)
    out, _ = generate(model, [Differentiate(subscription=unused)], inputs)
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row, sample in enumerate(split_rows(inputs, 6)):
        ids = sample["input_ids"]
        for step in range(3):
            full = full_forward(model, ids, sample["pixel_values"], collect=True, leaves=True)
            gradients = torch.autograd.grad((full.logits[-1] * cotangents[step, row]).sum(), full.probs)
            for layer, (attention, gradient) in collected[step].items():
                length = ids.shape[1]
                expected = gradients[layer][:, -1]
                torch.testing.assert_close(attention[row, :, -length:], full.probs[layer][:, -1], rtol=0, atol=1e-5)
                torch.testing.assert_close(
                    gradient[row, :, -length:], expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max()))
                )
            ids = torch.cat([ids, fresh[row : row + 1, step : step + 1]], 1)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "cache"])
def test_terms_that_exact_rows_would_miss_are_refused(name):
    refuse_unserved(3, {"scaling": 1.0, name: None})
    with pytest.raises(UnsupportedModel, match=f"layer 3 uses attention argument '{name}'"):
        refuse_unserved(3, {name: torch.ones(1)})


def test_weight_on_unseen_keys_is_counted_for_rows_that_are_somebody_s(model):
    """A flat weight on every column, for all rows of the prompt; rows of padding are nobody's."""
    inputs = make_inputs(model, PROMPTS)
    flat = Probe(
        subscription=Subscription(
            point=Point.ATTENTION_PROBS, access=Access.WRITE, layers=(1,), rows=Rows.ALL, normalised=False
        ),
        function=lambda event: torch.full_like(event.probs, 1 / event.probs.shape[-1]),
    )
    with Stack([flat]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=PAD)
        counted = [row["bus"]["weight_on_unseen_keys"] for row in handle.telemetry()]
    columns = inputs["input_ids"].shape[1]
    lengths = inputs["attention_mask"].sum(1).tolist()
    expected = [sum(1 - seen / columns for seen in range(1, length + 1)) for length in lengths]
    assert len(set(lengths)) > 1
    assert counted == pytest.approx(expected, rel=1e-5)
