"""The end of a step: who watches the choice, what gradients mean, and rows that are run again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from mitigate.core import Access, Fidelity, Method, Phase, Point, Rows, Subscription, Tags
from mitigate.core.facts import ModelFacts
from mitigate.core.plan import bind
from mitigate.core.points import MAIN_PHASES
from mitigate.core.stack import Stack
from mitigate.errors import HookError, PluginError, StackConflict, UnsupportedModel
from tests.references.runs import generate
from tests.references.tiny import PAD, full_forward, make_inputs, split_rows

PROMPTS = [(3, 1, 5), (2, 2, 3)]


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Calls a function at the points it is given."""

    name: ClassVar[str] = "watch"
    summary: ClassVar[str] = "calls a function"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point), gradient=True, selects_token=True)

    wishes: tuple[Subscription, ...]
    function: Callable[..., Any] = lambda event, state: None

    def subscriptions(self, model):
        return list(self.wishes)

    def __getattr__(self, name):
        if name.startswith("on_"):
            return self.function
        raise AttributeError(name)


def attention(access, *layers, phases=MAIN_PHASES):
    return Subscription(point=Point.ATTENTION_PROBS, access=access, layers=layers, rows=Rows.LAST, phases=phases)


CHOSEN = Subscription(point=Point.TOKEN_CHOSEN)


def gain(factor):
    wish = Subscription(point=Point.ATTENTION_PROBS, access=Access.WRITE, layers=(1, 2), rows=Rows.LAST)
    return Watch(wishes=(wish,), function=lambda event, state: event.probs * factor)


def test_watching_the_choice_changes_nothing_and_sees_every_token(model):
    """The tokens told are the ones generated, padding after the end of a sample, which is no longer active."""
    inputs = make_inputs(model, PROMPTS, seed=3)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    end = int(plain[0, inputs["input_ids"].shape[1] + 2])
    told, active = [], []

    def note(event, state):
        told.append(event.tokens.tolist())
        active.append(event.active.tolist())

    want = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=end)
    out, _ = generate(model, [Watch(wishes=(CHOSEN,), function=note)], inputs, 6, eos_token_id=end)
    assert torch.equal(out.sequences, want)
    assert torch.equal(torch.tensor(told).T, want[:, inputs["input_ids"].shape[1] :])
    stopped = [row.index(end) if end in row else len(row) for row in torch.tensor(told).T.tolist()]
    assert min(stopped) < 5
    assert [[step <= last for last in stopped] for step in range(len(active))] == active


def test_a_stack_that_watches_needs_the_handle(model):
    inputs = make_inputs(model, PROMPTS)
    with Stack([Watch(wishes=(CHOSEN,))]).attach(model), pytest.raises(StackConflict, match=r"handle\.generate"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("place", [0, 1])
def test_observers_see_final_weights_wherever_they_stand(model, place):
    """A reader sees what the methods before it left; an observer what all of them left."""
    inputs = make_inputs(model, PROMPTS)
    seen: dict[Access, list[float]] = {Access.READ: [], Access.OBSERVE: []}

    def watch(access):
        return Watch(
            wishes=(attention(access, 1),),
            function=lambda event, state: seen[access].append(float(event.probs.sum(-1).mean())),
        )

    methods = [watch(Access.READ), watch(Access.OBSERVE)]
    methods.insert(0 if place == 0 else 2, gain(2.0))
    generate(model, methods, inputs, 2)
    assert seen[Access.OBSERVE] == pytest.approx([2.0, 2.0], abs=1e-5)
    assert seen[Access.READ] == pytest.approx([2.0, 2.0] if place == 0 else [1.0, 1.0], abs=1e-5)


def test_every_method_gets_the_gradients_of_its_own_layers(model):
    """Two methods that differentiate different layers, and one that does both ways."""
    inputs = make_inputs(model, PROMPTS)
    found: dict[str, set[int]] = {}

    def note(name):
        def function(event, state):
            if hasattr(event, "tokens"):
                found[name] = set(event.attention_gradients(torch.ones_like(event.logits)))

        return function

    stack = {
        "low": Watch(wishes=(attention(Access.GRADIENT, 1, 2), CHOSEN), function=note("low")),
        "high": Watch(wishes=(attention(Access.GRADIENT, 4), CHOSEN), function=note("high")),
        "near": Watch(wishes=(attention(Access.DIRECT, 0, 5), CHOSEN), function=note("near")),
    }
    generate(model, stack, inputs, 2)
    assert found == {"low": {1, 2}, "high": {4}, "near": {0, 5}}


@pytest.mark.parametrize(
    ("access", "layers", "kept", "match"),
    [
        (Access.READ, (1, 2), (1, 3), "layer 2 of hybrid has none that can be served; choose among layers 1, 3"),
        (Access.GRADIENT, (1,), (1, 3), "layer 2 of hybrid is none .*; choose layers 3, or a setting"),
        (Access.GRADIENT, (1,), (1,), "layer 3 of hybrid is none that is known to let them through; choose a setting"),
    ],
)
def test_layers_without_attention(access, layers, kept, match):
    """Of a hybrid decoder: they overwrite their state at every step, so that no gradient comes through."""
    facts = ModelFacts(family="hybrid", layers=4, heads=4, kv_heads=2, attention_layers=kept)
    wish = Subscription(point=Point.ATTENTION_PROBS, access=access, layers=layers, rows=Rows.LAST)
    with pytest.raises(UnsupportedModel, match=match):
        bind({"watch": Watch(wishes=(wish, CHOSEN))}, facts)


def test_gradients_above_the_last_layer_without_attention_are_served():
    facts = ModelFacts(family="hybrid", layers=4, heads=4, kv_heads=2, attention_layers=(1, 3))
    assert bind({"watch": Watch(wishes=(attention(Access.GRADIENT, 3), CHOSEN))}, facts)


def test_gradients_must_be_asked_for(model):
    def ask(event, state):
        event.attention_gradients(torch.ones_like(event.logits))

    with pytest.raises(HookError, match="access='gradient'"):
        generate(model, [Watch(wishes=(CHOSEN,), function=ask)], make_inputs(model, PROMPTS), 1)


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        (Subscription(point=Point.TOKEN_CHOSEN, access=Access.WRITE), "select_token"),
        (Subscription(point=Point.HIDDEN_STATES, access=Access.OBSERVE, layers=(0,)), "observe"),
        (Subscription(point=Point.ATTENTION_PROBS, access=Access.DIRECT, layers=(0,), rows=Rows.ALL), "direct"),
    ],
)
def test_senseless_wishes_are_refused(model, wish, match):
    with pytest.raises(PluginError, match=match), Stack([Watch(wishes=(wish,))]).attach(model):
        pass


def test_direct_gradient_follows_the_direct_path_only(model):
    """g[h, j] = (U^T c * w / rms) . W_O[h] v_j, against the decoder written out by hand in float64."""
    inputs = make_inputs(model, PROMPTS, seed=4)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(2, 100, generator=generator)
    found: list[Any] = []

    def note(event, state):
        if hasattr(event, "tokens"):
            assert not event.logits.requires_grad
            found.append(event.attention_gradients(cotangent))

    watch = Watch(wishes=(attention(Access.DIRECT, 1, 3), CHOSEN), function=note)
    with torch.inference_mode():
        out, _ = generate(model, [watch], inputs, 2)
    first_new = out.sequences[:, inputs["input_ids"].shape[1]]
    decoder, text = model.model.language_model, model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    for row, sample in enumerate(split_rows(inputs, 6)):
        ids = torch.cat([sample["input_ids"], first_new[row].view(1, 1)], 1).clone()
        full = full_forward(model, ids, sample["pixel_values"], collect=True, dtype=torch.float64)
        last = full.hidden[-1][-1]
        rms = (last.pow(2).mean() + decoder.norm.variance_epsilon).sqrt()
        direction = (cotangent[row].double() @ model.lm_head.weight.double()) * decoder.norm.weight.double() / rms
        for layer in (1, 3):
            block = decoder.layers[layer]
            x = full.hidden[layer - 1]
            normed = x * (x.pow(2).mean(-1, keepdim=True) + block.input_layernorm.variance_epsilon).rsqrt()
            normed = normed * block.input_layernorm.weight.double()
            value = normed @ block.self_attn.v_proj.weight.double().T
            weight = block.self_attn.o_proj.weight.double()
            for number in range(text.num_attention_heads):
                group = number // (text.num_attention_heads // text.num_key_value_heads)
                v = value[:, group * head : (group + 1) * head]
                want = v @ weight[:, number * head : (number + 1) * head].T @ direction
                got = found[1][layer][1][row, number, -len(want) :]
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert set(found[1]) == {1, 3}


def test_a_linear_map_without_a_plain_matrix_is_applied_to_the_identity(model):
    """As for quantised checkpoints: same gradients, and the map is unfolded once."""
    from mitigate.adapters import adapter_for
    from mitigate.core.direct import DirectPath

    class Packed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.in_features, self.calls = inner, inner.in_features, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) + 1.0

    generator = torch.Generator().manual_seed(2)
    rows = {2: (torch.rand(1, 4, 7, generator=generator), torch.randn(1, 2, 7, 16, generator=generator))}
    cotangent = torch.randn(1, 100, generator=generator)
    path = DirectPath(model, adapter_for(model))
    path._normed = {-1: (torch.ones(1, 64), torch.full((1, 64), 0.5))}
    want = path.gradients(rows, cotangent)[2]
    packed = Packed(path._projections[2])
    path._projections[2] = packed
    torch.testing.assert_close(path.gradients(rows, cotangent)[2], want, rtol=1e-5, atol=1e-5)
    calls = packed.calls
    path.gradients(rows, cotangent)
    assert packed.calls == calls == 2


def test_replayed_rows_are_those_of_the_whole_prompt(model):
    """Logits, targets and each row's own gradient, against autograd over the hand-written full sequence."""
    inputs = make_inputs(model, PROMPTS, seed=6)
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(4, 2, 100, generator=generator)
    layers = (1, 4)
    kept: list[Any] = []

    def note(event, state):
        if isinstance(event.phase, Phase) and hasattr(event, "scores") and event.step == 0:
            replay = event.request.replay(state, rows=4)
            kept.append((replay, [replay.gradients(index, cotangent[index]) for index in range(4)]))

    wish = attention(Access.GRADIENT, *layers, phases=MAIN_PHASES | {Phase.DIAGNOSTIC})
    choose = Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE)
    stack = {"watch": Watch(wishes=(wish, choose), function=note), "gain": gain(1.5)}
    out, telemetry = generate(model, stack, inputs, 3)
    plain, _ = generate(model, {"gain": gain(1.5)}, inputs, 3)
    assert torch.equal(out.sequences, plain.sequences)
    assert [sample["watch"]["extra_forwards"] for sample in telemetry] == [1.0, 1.0]
    replay, gradients = kept[0]
    prompt = inputs["input_ids"].shape[1]
    assert replay.columns.tolist() == list(range(prompt - 5, prompt - 1))
    assert torch.equal(replay.targets, inputs["input_ids"][:, -4:])
    assert replay.valid.tolist() == [[True] * 4, [False, False, True, True]]  # the second question has three words
    for row, sample in enumerate(split_rows(inputs, 6)):
        for index in range(4):
            if replay.valid[row, index]:
                ids = sample["input_ids"][:, : index - 4]
                full = full_forward(model, ids, sample["pixel_values"], collect=True, leaves=True)
                torch.testing.assert_close(replay.logits[row, index], full.logits[-1], rtol=0, atol=1e-4)
                wanted = torch.autograd.grad((full.logits[-1] * cotangent[index, row]).sum(), full.probs)
                for layer in layers:
                    want = wanted[layer][:, -1]
                    got = gradients[index][layer][1][row, :, : replay.columns[index] + 1]
                    got = got[:, -want.shape[1] :]
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))


def test_what_methods_report(model):
    """Traces carry method, place and plain values; nothing is kept unless asked for."""
    inputs = make_inputs(model, PROMPTS)

    def report(event, state):
        state.trace(event, mass=event.probs.sum(-1).mean((1, 2)), note="x")

    watch = Watch(wishes=(attention(Access.OBSERVE, 2),), function=report)
    with Stack({"w": watch}).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=PAD, trace=True)
        traces = handle.trace()
        handle.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=PAD)
        assert handle.trace() == []
    assert [(t.method, t.phase, t.step, t.layer) for t in traces] == [("w", "prefill", 0, 2), ("w", "decode", 1, 2)]
    assert traces[0].values["mass"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert traces[0].values["note"] == "x"
