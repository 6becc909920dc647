"""Points at towers, blocks, heads, values and masks: against plain torch hooks and the decoder written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from mitigate.core import Access, Branch, Fidelity, Method, Phase, Point, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.errors import HookError, PluginError, UnsupportedModel
from tests.references import runs
from tests.references.tiny import PAD, full_forward, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 3)]
LAYER = 2


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Runs a function at one point, in the main stream or in a branch."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "runs a function"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point), forwards_per_token=1)
    point: Point
    function: Callable[[Any], Any] = lambda event: None
    layers: tuple[int, ...] = (LAYER,)
    phases: frozenset[Phase] = frozenset(Phase)
    access: Access = Access.WRITE
    branch: str = "main"
    seen: list[Any] = field(default_factory=list, compare=False)

    def branches(self):
        return [] if self.branch == "main" else [Branch(name=self.branch)]

    def subscriptions(self, model):
        wish = Subscription(
            point=self.point,
            access=self.access,
            layers=self.layers,
            phases=self.phases,
            branches=frozenset({self.branch}),
        )
        if self.branch == "main":
            return [wish]
        return [wish, Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]

    def on_next_token_logits(self, event, state):
        return event.branch_logits(self.branch)

    def _handle(self, event, state):
        self.seen.append(event)
        return self.function(event)

    on_mlp_output = on_head_output = on_value_scale = on_attention_mask = on_vision = _handle
    on_logit_lens = on_image_input = on_hidden_states = _handle


def generate(model, methods, inputs, steps=3, **kwargs):
    return runs.generate(model, methods, inputs, steps, eos_token_id=3, **kwargs)


def logits_of(out):
    return torch.stack(out.logits, 1)


def plainly(model, inputs, module, hook, *, before=False, steps=3):
    """What transformers does with a plain torch hook on a module."""
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        return logits_of(generate(model, [], inputs, steps)[0])
    finally:
        handle.remove()


def block(model):
    return model.model.language_model.layers[LAYER]


def heads_flipped(value):
    return value.unflatten(-1, (4, -1)).flip(-2).flatten(-2)


#: point -> (handler, the same with a torch hook).
HOOKED = {
    Point.MLP_OUTPUT: (
        lambda event: event.mlp * 1.5,
        lambda model, inputs: plainly(model, inputs, block(model).mlp, lambda _, __, output: output * 1.5),
    ),
    Point.HIDDEN_STATES: (
        lambda event: event.hidden * 0.5,
        lambda model, inputs: plainly(model, inputs, block(model), lambda _, __, output: output * 0.5),
    ),
    Point.HEAD_OUTPUT: (
        lambda event: event.heads.flip(1),
        lambda model, inputs: plainly(
            model, inputs, block(model).self_attn.o_proj, lambda _, args: (heads_flipped(args[0]),), before=True
        ),
    ),
    Point.IMAGE_INPUT: (
        lambda event: [-image for image in event.images],
        lambda model, inputs: logits_of(generate(model, [], {**inputs, "pixel_values": -inputs["pixel_values"]}, 3)[0]),
    ),
}


def layers_of(point):
    return () if point in (Point.IMAGE_INPUT, Point.VISION) else (LAYER,)


@pytest.mark.parametrize("branch", ["main", "other"])
@pytest.mark.parametrize("point", list(HOOKED))
def test_edits_are_those_of_a_plain_hook(model, point, branch):
    handler, plain = HOOKED[point]
    inputs = make_inputs(model, PROMPTS, seed=1)
    out, telemetry = generate(
        model, [Probe(point=point, function=handler, layers=layers_of(point), branch=branch)], inputs
    )
    torch.testing.assert_close(logits_of(out), plain(model, inputs), rtol=0, atol=2e-5)
    if point is Point.IMAGE_INPUT:
        assert [row["probe"]["images_edited"] for row in telemetry] == [1, 2]
    else:  # every token of the prompt, padding aside, and two generated ones
        expected = inputs["attention_mask"].sum(1) + 2
        assert [row["probe"]["tokens_edited"] for row in telemetry] == expected.tolist()


@pytest.mark.parametrize("branch", ["main", "other"])
@pytest.mark.parametrize("chosen", [(), (0,)])
def test_vision_blocks(model, chosen, branch):
    inputs = make_inputs(model, PROMPTS, seed=2)
    probe = Probe(point=Point.VISION, function=lambda event: event.hidden * 1.5, layers=chosen, branch=branch)
    out, telemetry = generate(model, [probe], inputs)
    blocks = model.model.vision_tower.encoder.layers
    fresh = tiny_llava(seed=0)  # before its own capture hooks are there, which plain hooks would come after
    fresh.load_state_dict(model.state_dict())
    for index, layer in enumerate(fresh.model.vision_tower.encoder.layers):
        if index in chosen or not chosen:
            layer.register_forward_hook(lambda _, __, output: output * 1.5)
    expected = logits_of(generate(fresh, [], inputs, 3)[0])
    torch.testing.assert_close(logits_of(out), expected, rtol=0, atol=2e-5)
    assert (logits_of(out) - logits_of(generate(model, [], inputs, 3)[0])).abs().max() > 0.01
    assert [event.layer for event in probe.seen] == list(chosen or range(len(blocks)))
    assert probe.seen[0].hidden.shape[:2] == (3, 37)  # three images, 6 x 6 patches and the class token
    assert telemetry[1]["probe"]["images_edited"] == 2 * len(chosen or blocks)


@pytest.mark.parametrize("branch", ["main", "other"])
@pytest.mark.parametrize("point", [Point.VISION, Point.IMAGE_INPUT])
def test_pictures_that_come_encoded_pass_no_method_unseen(model, point, branch):
    inputs = make_inputs(model, PROMPTS, seed=3)
    features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    encoded = {**inputs, "mm_encoder_outputs": {"image": features}}
    with pytest.raises(UnsupportedModel, match="the images came encoded; give pixel_values"):
        generate(model, [Probe(point=point, layers=(), branch=branch)], encoded)
    expected = generate(model, [], make_inputs(model, PROMPTS, seed=3))[0]
    reader = Probe(point=Point.HIDDEN_STATES)  # acts after that, so that it does not matter
    assert torch.equal(logits_of(generate(model, [reader], encoded)[0]), logits_of(expected))


def test_a_block_the_tower_does_not_have(model):
    with pytest.raises(UnsupportedModel, match="the vision tower has layers 0-1"):
        generate(model, [Probe(point=Point.VISION, layers=(7,))], make_inputs(model, PROMPTS[:1]))


def by_hand(model, inputs, layer=LAYER, **edits):
    """Last logits of every sample, from the decoder written out by hand; edits act in one layer."""
    only = {name: (lambda index, value, f=f: f(value) if index == layer else value) for name, f in edits.items()}
    return torch.stack(
        [
            full_forward(model, sample["input_ids"], sample["pixel_values"], **only).logits[-1]
            for sample in split_rows(inputs, 6)
        ]
    )


@pytest.mark.parametrize("branch", ["main", "other"])
@pytest.mark.parametrize("groups", [1, 2])
def test_value_scale_is_a_gain_after_the_softmax(model, groups, branch):
    """The third key from the left of each sample counts twice, in all heads or in those of one group."""
    inputs = make_inputs(model, PROMPTS, seed=3)

    def handler(event):
        batch, _, keys, _ = event.values.shape
        gain = torch.ones(batch, groups, keys)
        third = event.layout.valid.int().argmax(1) + 2
        gain[torch.arange(batch), 0, third] = 2.0
        return gain

    def gained(probs):
        gain = torch.ones_like(probs)
        gain[: 4 // groups, :, 2] = 2.0
        return probs * gain

    out, telemetry = generate(model, [Probe(point=Point.VALUE_SCALE, function=handler, branch=branch)], inputs, 1)
    torch.testing.assert_close(logits_of(out)[:, 0], by_hand(model, inputs, probs_edit=gained), rtol=0, atol=2e-5)
    assert telemetry[0]["probe"]["keys_scaled"] == 1


def test_a_gain_does_not_stay_in_the_cache(model):
    inputs = make_inputs(model, PROMPTS, seed=3)
    double = Probe(point=Point.VALUE_SCALE, function=lambda event: torch.full(event.values.shape[:3], 2.0))
    cached, uncached = (generate(model, [double], inputs, 4, use_cache=use)[0] for use in (True, False))
    torch.testing.assert_close(logits_of(cached), logits_of(uncached), rtol=0, atol=2e-5)
    assert (logits_of(cached) - logits_of(generate(model, [], inputs, 4)[0])).abs().max() > 0.01


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("branch", ["main", "other"])
def test_attention_mask(model, prompts, branch):
    """Images hidden from one layer; the causal part stays, whether transformers made a mask or not."""
    inputs = make_inputs(model, prompts, seed=4)

    def hide(event):
        images = event.layout.image_mask[:, None, None, : event.mask.shape[-1]]
        return event.mask.masked_fill(images, torch.finfo(event.mask.dtype).min)

    def expected():
        rows = []
        for sample in split_rows(inputs, 6):
            hidden = sample["input_ids"][0] == model.config.image_token_id
            edit = lambda layer, z, hidden=hidden: z.masked_fill(hidden, -1e30) if layer == LAYER else z  # noqa: E731
            rows.append(full_forward(model, sample["input_ids"], sample["pixel_values"], scores_edit=edit).logits[-1])
        return torch.stack(rows)

    out, telemetry = generate(model, [Probe(point=Point.ATTENTION_MASK, function=hide, branch=branch)], inputs, 1)
    torch.testing.assert_close(logits_of(out)[:, 0], expected(), rtol=0, atol=2e-5)
    assert telemetry[0]["probe"]["keys_masked"] == 36


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("point", [Point.ATTENTION_MASK, Point.VALUE_SCALE, Point.MLP_OUTPUT, Point.HEAD_OUTPUT])
def test_looking_changes_nothing(model, prompts, point):
    inputs = make_inputs(model, prompts, seed=5)
    plain = logits_of(generate(model, [], inputs)[0])
    looked, telemetry = generate(model, [Probe(point=point, access=Access.READ)], inputs)
    assert torch.equal(logits_of(looked), plain)
    assert set(telemetry[0]["probe"]) == {"seconds"}
    same = {
        Point.ATTENTION_MASK: lambda event: event.mask,
        Point.VALUE_SCALE: lambda event: torch.ones(event.values.shape[0], 1, event.values.shape[2]),
        Point.MLP_OUTPUT: lambda event: event.mlp,
        Point.HEAD_OUTPUT: lambda event: event.heads,
    }[point]
    kept, _ = generate(model, [Probe(point=point, function=same)], inputs)
    assert torch.equal(logits_of(kept), plain)


def test_the_mlps_input_is_shown(model):
    inputs = make_inputs(model, PROMPTS, seed=6)
    probe = Probe(point=Point.MLP_OUTPUT, access=Access.READ)
    generate(model, [probe], inputs, 1)
    torch.testing.assert_close(block(model).mlp(probe.seen[0].inputs), probe.seen[0].mlp, rtol=0, atol=1e-6)


def test_logit_lens(model):
    inputs = make_inputs(model, PROMPTS, seed=6)
    lens = Probe(point=Point.LOGIT_LENS, layers=(1, 5), access=Access.READ)
    out, _ = generate(model, [lens], inputs, 3, output_hidden_states=True)
    head, norm = model.lm_head, model.model.language_model.norm
    for event in lens.seen:
        hidden = out.hidden_states[event.step]
        # of the last block transformers shows the output through the norm, which the model's own logits are of
        expected = out.logits[event.step] if event.layer == 5 else head(norm(hidden[event.layer + 1][:, -1]))
        torch.testing.assert_close(event.logits, expected, rtol=0, atol=1e-5)
    assert [(event.step, event.layer) for event in lens.seen] == [(s, layer) for s in range(3) for layer in (1, 5)]


def test_the_lens_sees_edits_of_its_layer(model):
    inputs = make_inputs(model, PROMPTS, seed=6)
    lens = Probe(point=Point.LOGIT_LENS, layers=(5,), access=Access.READ)
    edit = Probe(point=Point.HIDDEN_STATES, layers=(5,), function=lambda event: event.hidden.flip(-1))
    out, _ = generate(model, [lens, edit], inputs, 1)
    torch.testing.assert_close(lens.seen[0].logits, out.logits[0], rtol=0, atol=1e-5)


def test_images_by_hand_and_their_key(model):
    """A forward made by hand gets the edited images too, and `image_key` is that of what the model sees."""
    inputs = make_inputs(model, PROMPTS, seed=7)
    expected = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    keys = []

    class Keyed(Probe):
        def subscriptions(self, model):
            return [*super().subscriptions(model), Subscription(point=Point.SAMPLE_BEGIN)]

        def on_sample_begin(self, event, state):
            keys.append(event.request.image_key(0))

    for function in (lambda event: None, lambda event: [-image for image in event.images]):
        with Stack([Keyed(point=Point.IMAGE_INPUT, layers=(), function=function)]).attach(model):
            logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert keys[0] != keys[1]


def test_rows_of_images(model):
    probe = Probe(point=Point.IMAGE_INPUT, layers=())
    generate(model, [probe], make_inputs(model, PROMPTS, seed=7), 1)
    (event,) = probe.seen
    assert event.rows == [0, 1, 1]
    assert len(event.images) == 3


@pytest.mark.parametrize("point", [*HOOKED, Point.VALUE_SCALE, Point.ATTENTION_MASK])
def test_finished_samples_are_left_alone(model, point):
    """What is done to a sample that still runs does not depend on one that has ended."""
    inputs = make_inputs(model, PROMPTS, seed=8)
    handlers = {
        **{known: handler for known, (handler, _) in HOOKED.items()},
        Point.VALUE_SCALE: lambda event: torch.full(event.values.shape[:3], 1.5),
        Point.ATTENTION_MASK: lambda event: event.mask - event.layout.image_mask[:, None, None].float(),
    }
    probe = Probe(point=point, function=handlers[point], layers=layers_of(point))
    out, _ = generate(model, [probe], inputs, 6)
    first = out.sequences[0, -6].item()
    with Stack([probe]).attach(model) as handle:
        ended = handle.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=first)
        counted = handle.telemetry()[0]["probe"]
    assert ended[0, -5:].eq(PAD).all()
    fresh, undisturbed = ended[1, -6:].tolist(), out.sequences[1, -6:].tolist()
    stop = fresh.index(first) if first in fresh else 6
    assert fresh[:stop] == undisturbed[:stop]
    _, once = generate(model, [probe], inputs, 1)
    assert {name: amount for name, amount in counted.items() if name != "seconds"} == {
        name: amount for name, amount in once[0]["probe"].items() if name != "seconds"
    }


@pytest.mark.parametrize(
    ("point", "answer", "match"),
    [
        (Point.MLP_OUTPUT, lambda event: event.mlp[:, :1], r"on_mlp_output returned \(2, 1, 64\) for .* at layer 2"),
        (Point.HEAD_OUTPUT, lambda event: 3, "on_head_output returned int"),
        (Point.VALUE_SCALE, lambda event: event.values, "returned a gain of shape"),
        (Point.ATTENTION_MASK, lambda event: event.mask[..., :1], "on_attention_mask returned"),
    ],
)
def test_wrong_answers_are_named(model, point, answer, match):
    with pytest.raises(HookError, match=match):
        generate(model, [Probe(point=point, function=answer)], make_inputs(model, PROMPTS, seed=8), 1)


def test_the_lens_is_read_only(model):
    with pytest.raises(PluginError, match="use hidden_states"):
        generate(model, [Probe(point=Point.LOGIT_LENS)], make_inputs(model, PROMPTS))
