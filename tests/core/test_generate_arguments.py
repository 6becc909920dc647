"""What a caller may hand to generate: every way of saying the same thing means the same, or is refused by name."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import transformers
from transformers import GenerationConfig

from mitigate.core import Access, Point, Rows, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, HookError, PluginError, StackConflict, UnsupportedModel
from mitigate.methods.control_random import ControlRandom
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from tests.core.test_points import Probe
from tests.references.tiny import EOS, IMAGE, PAD, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 1, 4), (5, 1, 2)]


@pytest.fixture
def ending():
    """A model whose own configuration ends and pads, with a token that occurs early as end token."""
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS, seed=1)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    model.generation_config.eos_token_id = int(tokens[0, -4])
    model.generation_config.pad_token_id = PAD
    return model, inputs


def counted(handle):
    return [
        {
            key: {name: round(value, 3) for name, value in counters.items() if name != "seconds"}
            for key, counters in row.items()
        }
        for row in handle.telemetry()
    ]


@pytest.mark.parametrize("stack", [[LocoRE(beta=0.8)], [ControlRandom(beta=1.0)], [SCR(lam=1.6, k_src=4)]])
@pytest.mark.parametrize("masked", [True, False])
def test_configuration_object_equals_keywords(ending, stack, masked):
    """What a passed configuration leaves open comes from the model's own, as in generate."""
    model, inputs = ending
    if not masked:
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with Stack(stack).attach(model) as handle:
        expected = handle.generate(**inputs, max_new_tokens=8, do_sample=False)
        reference = counted(handle)
        config = GenerationConfig(max_new_tokens=8, do_sample=False)
        for call in (handle.generate, model.generate):
            assert torch.equal(call(**inputs, generation_config=config), expected)
            assert counted(handle) == reference
    assert len({row["bus"]["forwards"] for row in reference}) > 1


def test_end_tokens_of_the_model_are_known_to_methods(ending):
    model, inputs = ending
    with Stack([SGRS(exempt="eos", layers="2-3")]).attach(model) as handle:
        handle.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=3))
        assert handle.bus.last_request.end_tokens.tolist() == [model.generation_config.eos_token_id]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        (
            {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2, max_new_tokens=2)},
            "prompt_lookup_num_tokens",
        ),
    ],
)
@pytest.mark.parametrize("stack", [[LocoRE()], [SGRS(layers="2")]])
def test_second_streams_are_refused_by_name(model, stack, arguments, named):
    inputs = make_inputs(model, PROMPTS)
    with Stack(stack).attach(model) as handle, pytest.raises(StackConflict, match=named):
        handle.generate(
            **inputs, **{"max_new_tokens": 2, **arguments} if "generation_config" not in arguments else arguments
        )


def test_beams_of_the_models_own_configuration_are_refused(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    with Stack([SGRS(layers="2")]).attach(model) as handle, pytest.raises(StackConflict, match="num_beams=1"):
        handle.generate(**make_inputs(model, PROMPTS), max_new_tokens=2)


def test_attentions_are_refused_and_hidden_states_are_the_edited_ones(model):
    inputs = make_inputs(model, PROMPTS)
    recorded_before = model(**inputs, output_hidden_states=True).hidden_states
    with Stack([LocoRE()]).attach(model), pytest.raises(StackConflict, match="output_attentions"):
        model(**inputs, output_attentions=True)
    write = Subscription(point=Point.HIDDEN_STATES, layers=(2,), access=Access.WRITE)
    with Stack([Probe(subscription=write, function=lambda event: event.hidden * 2)]).attach(model):
        recorded = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(recorded[2], recorded_before[2])
    torch.testing.assert_close(recorded[3], recorded_before[3] * 2)


def test_positional_inputs_of_a_forward(model):
    inputs = make_inputs(model, PROMPTS, seed=2)
    with Stack([SCR(lam=1.6, k_src=4), LocoRE(beta=0.8)]).attach(model):
        expected = model(**inputs).logits
        positional = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(positional[:, -1], expected[:, -1])


def test_processor_that_calls_the_model_is_refused(model):
    inputs = make_inputs(model, PROMPTS)

    class Calls(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            model(input_ids=input_ids[:, -1:])
            return scores

    with Stack([LocoRE()]).attach(model), pytest.raises(StackConflict, match="in the middle of its own generate"):
        model.generate(**inputs, max_new_tokens=3, logits_processor=transformers.LogitsProcessorList([Calls()]))


def test_generate_inside_generate_is_refused(model):
    inputs = make_inputs(model, PROMPTS)

    class Generates(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            model.generate(**inputs, max_new_tokens=1)

    criteria = transformers.StoppingCriteriaList([Generates()])
    with Stack([LocoRE()]).attach(model), pytest.raises(StackConflict, match="another generate"):
        model.generate(**inputs, max_new_tokens=3, stopping_criteria=criteria)


def test_shared_configuration_objects_are_refused(model):
    twin = transformers.LlavaForConditionalGeneration(model.config).eval()
    with (
        Stack([LocoRE()]).attach(model),
        pytest.raises(StackConflict, match="shares this configuration"),
        Stack([LocoRE()]).attach(twin),
    ):
        pass
    assert model.config.text_config._attn_implementation == "sdpa"


def test_changing_the_attention_implementation_inside_is_refused_and_kept():
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS)
    with Stack([LocoRE()]).attach(model):
        model.set_attn_implementation("eager")
        with pytest.raises(StackConflict, match="set it before attaching"):
            model(**inputs)
    assert model.config.text_config._attn_implementation == "eager"


def test_eager_models_stay_eager_where_nobody_acts():
    """Bit for bit, padding included: the model file's own eager attention serves every row no method edits."""
    model = tiny_llava(seed=0)
    model.set_attn_implementation("eager")
    inputs = make_inputs(model, PROMPTS, seed=3)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "output_logits": True}
    plain = model.generate(**inputs, **options, return_dict_in_generate=True)
    reader = Probe(subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(0, 3), rows=Rows.ALL))
    with Stack([reader]).attach(model):
        served = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert torch.equal(torch.stack(served.logits), torch.stack(plain.logits))
    assert model.config.text_config._attn_implementation == "eager"


def test_other_rows_in_one_layer_do_not_disturb_a_method(model):
    """The rows of a layer are a union; what a method caches must follow them."""
    inputs = make_inputs(model, PROMPTS, seed=3)
    reader = Probe(subscription=Subscription(point=Point.ATTENTION_PROBS, layers=(0, 3), rows=Rows.ALL))
    with Stack([LocoRE(beta=0.8)]).attach(model):
        expected = model(**inputs).logits
    with Stack([reader, LocoRE(beta=0.8)]).attach(model):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)


def test_autocast_keeps_the_exact_rows_exact(model):
    inputs = make_inputs(model, PROMPTS, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs).logits
        with Stack([LocoRE(beta=0.8)]).attach(model):
            assert model(**inputs).logits.isfinite().all()
        with Stack([LocoRE.identity()]).attach(model):
            assert torch.equal(model(**inputs).logits, plain)


def test_reading_gradients_changes_no_value(model):
    """The fused value keeps its bits; only the graph is the exact rows'."""
    inputs = make_inputs(model, [(3, 1, 0)], seed=3)  # image last: the prompt is not split
    read = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "pad_token_id": PAD}
    plain = model.generate(**inputs, max_new_tokens=5, **read)
    with Stack([SGRS(alpha=0.0, proposal="greedy_order")]).attach(model) as handle:
        ours = handle.generate(**inputs, max_new_tokens=5, **read)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))


def test_gradient_reader_sees_the_final_weights_in_any_order(model):
    """Saliency is measured on what the other methods left, wherever they stand in the stack."""
    inputs = make_inputs(model, PROMPTS[:1], seed=4)
    gain, reader = LocoRE(beta=2.0, mode="post_renorm"), SGRS(alpha=0.9, layers="2-3", proposal="greedy_order")
    results = []
    for stack in ([gain, reader], [reader, gain]):
        with Stack(stack).attach(model) as handle:
            results.append((handle.generate(**inputs, max_new_tokens=6, pad_token_id=PAD), counted(handle)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


class Watch(transformers.StoppingCriteria):
    """Ends the first row after a number of new tokens, and notes how many scores it is given."""

    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(None if scores is None else len(scores))
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ended[0] = input_ids.shape[1] >= self.length
        return ended


def test_stopping_criteria_of_the_own_loop_see_the_scores(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=1)
    watch = Watch(inputs["input_ids"].shape[1] + 4)
    with Stack([SGRS.identity()]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=9, do_sample=False, pad_token_id=PAD, stopping_criteria=[watch],
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    assert watch.seen == [1, 2, 3, 4]


def test_stop_strings_reach_the_own_loop(model, monkeypatch):
    """transformers keeps the tokenizer from a custom loop, so the criterion is made before."""
    made = []

    def criterion(stop_strings, tokenizer):
        made.append((stop_strings, tokenizer))
        return Watch(width + 2)

    monkeypatch.setattr("mitigate.decoding.loop.StopStringCriteria", criterion)
    inputs = make_inputs(model, PROMPTS[:1], seed=1)
    width = inputs["input_ids"].shape[1]
    with Stack([SGRS.identity()]).attach(model) as handle:
        kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "stop_strings": ["dog"]}
        assert handle.generate(**inputs, **kwargs, tokenizer="tokenizer").shape[1] == width + 2
        assert made == [(["dog"], "tokenizer")]
        with pytest.raises(ConfigError, match="stop_strings need a tokenizer"):
            handle.generate(**inputs, **kwargs)


def test_rows_ended_by_a_stopping_criterion_are_no_longer_counted(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    width = inputs["input_ids"].shape[1]

    with Stack([LocoRE(beta=0.8)]).attach(model) as handle:
        model.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=PAD,
            stopping_criteria=transformers.StoppingCriteriaList([Watch(width + 2)]),
        )  # fmt: skip
        assert handle.telemetry()[0]["bus"]["forwards"] == 2


def test_rows_ended_by_a_stop_string_are_no_longer_counted(model, monkeypatch):
    """generate makes that criterion itself, so the padding must tell; it is fed one step after the end."""
    inputs = make_inputs(model, PROMPTS, seed=1)
    width = inputs["input_ids"].shape[1]
    monkeypatch.setattr("transformers.generation.utils.StopStringCriteria", lambda **_: Watch(width + 2))
    with Stack([LocoRE(beta=0.8)]).attach(model) as handle:
        model.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=PAD,
            stop_strings=["dog"], tokenizer="tokenizer",
        )  # fmt: skip
        assert [row["bus"]["forwards"] for row in handle.telemetry()] == [3, 6, 6]


@pytest.mark.parametrize("stack", [[LocoRE(beta=0.8)], [SGRS(layers="2-3"), LocoRE(beta=0.8)]])
def test_a_padding_token_that_the_model_writes_ends_nothing(model, stack):
    """Only a row that has ended is padded: the same token as part of a reply is one more token."""
    inputs = make_inputs(model, PROMPTS, seed=1)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with Stack(stack).attach(model) as handle:
        expected = handle.generate(**inputs, **kwargs, pad_token_id=PAD)
        reference = counted(handle)
        written = int(expected[0, -5])
        assert torch.equal(handle.generate(**inputs, **kwargs, pad_token_id=written), expected)
        assert counted(handle) == reference


def test_uncached_batches_count_like_single_samples():
    """Hidden-state edits of finished samples are neither made nor counted."""
    model = tiny_llava(seed=2)
    inputs = make_inputs(model, PROMPTS, seed=2)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "use_cache": False}
    with Stack([SCR(lam=1.3, k_src=3)]).attach(model) as handle:
        kwargs["eos_token_id"] = int(handle.generate(**inputs, **kwargs)[1, -5])
        handle.generate(**inputs, **kwargs)
        together = counted(handle)
        assert len({row["scr"]["tokens_edited"] for row in together}) > 1
        for row, sample in enumerate(split_rows(inputs, 6)):
            handle.generate(**sample, **kwargs)
            assert counted(handle)[0] == together[row]


@pytest.mark.parametrize("rows", [Rows.ALL, lambda layout: layout.valid])
def test_finished_samples_are_no_longer_edited_in_any_row(rows):
    model = tiny_llava(seed=2)
    inputs = make_inputs(model, PROMPTS, seed=2)
    write = Subscription(point=Point.ATTENTION_PROBS, layers=(1,), rows=rows, access=Access.WRITE)
    probe = Probe(subscription=write, function=lambda event: event.probs * 0.9)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    with Stack([probe]).attach(model) as handle:
        end = int(handle.generate(**inputs, **kwargs)[1, -5])
        handle.generate(**inputs, **kwargs, eos_token_id=end)
        for row, sample in zip(handle.telemetry(), split_rows(inputs, 6), strict=True):
            forwards = row["bus"]["forwards"]
            assert row["probe"]["rows_edited"] == sample["input_ids"].shape[1] + forwards - 1
        assert len({row["bus"]["forwards"] for row in handle.telemetry()}) > 1


def test_models_loaded_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny_llava(seed=0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with Stack([SGRS(layers="2")]).attach(model) as handle, pytest.raises(UnsupportedModel, match="load it outside"):
        handle.generate(**make_inputs(model, PROMPTS), max_new_tokens=1)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_empty_stack_takes_whatever_generate_takes(model):
    inputs = make_inputs(model, [(4, 0, 3)])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with Stack().attach(model) as handle:
        expected = model.generate(inputs_embeds=embeddings, max_new_tokens=3, pad_token_id=PAD, do_sample=False)
        ours = handle.generate(inputs_embeds=embeddings, max_new_tokens=3, pad_token_id=PAD, do_sample=False)
        assert torch.equal(ours, expected)
        by_place = handle.generate(inputs["input_ids"], max_new_tokens=3, pad_token_id=PAD, do_sample=False)
        assert by_place.shape == (1, inputs["input_ids"].shape[1] + 3)


def test_text_without_a_picture(model):
    inputs = make_inputs(model, [(5, 0, 4), (3, 0, 2)])
    for stack in ([LocoRE(beta=0.8)], [SCR()], [SGRS(layers="2-3")]):
        with Stack(stack).attach(model) as handle:
            assert handle.generate(**inputs, max_new_tokens=3, pad_token_id=PAD).shape[0] == 2
    assert not (inputs["input_ids"] == IMAGE).any()


# ---------------------------------------------------------------------------------------------- subscriptions kept


def test_phases_hold_at_every_point(model):
    from mitigate.core import Phase

    inputs = make_inputs(model, PROMPTS)
    for name in ("next_token_logits", "step_begin", "step_end", "hidden_states"):
        layers = (1,) if name == "hidden_states" else ()
        only = Subscription(point=Point(name), layers=layers, phases=frozenset({Phase.DECODE}))
        probe = Probe(subscription=only)
        with Stack([probe]).attach(model):
            model.generate(**inputs, max_new_tokens=3, pad_token_id=PAD, eos_token_id=3)
        assert [event.phase for event in probe.seen] == [Phase.DECODE] * 2, name


@pytest.mark.parametrize("point", ["next_token_logits", "hidden_states"])
def test_readers_cannot_write(model, point):
    layers = (1,) if point == "hidden_states" else ()
    reader = Probe(
        subscription=Subscription(point=Point(point), layers=layers),
        function=lambda event: getattr(event, "hidden", getattr(event, "logits", None)) * 2,
    )
    with Stack([reader]).attach(model), pytest.raises(HookError, match="subscribed to read only"):
        model(**make_inputs(model, PROMPTS))


def test_wrong_shapes_name_the_method(model):
    write = Subscription(point=Point.ATTENTION_PROBS, layers=(1,), access=Access.WRITE)
    cut = Probe(subscription=write, function=lambda event: event.probs[..., 1:])
    with Stack([cut]).attach(model), pytest.raises(HookError, match="probe returned shape"):
        model(**make_inputs(model, PROMPTS))


def test_token_selection_must_be_declared(model):
    class Undeclared(Probe):
        tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point))

        def on_select_token(self, event, state):
            return None

    method = Undeclared(subscription=Subscription(point=Point.SELECT_TOKEN, access=Access.WRITE))
    with pytest.raises(PluginError, match="selects tokens but its tags"), Stack([method]).attach(model):
        pass


def test_single_sample_methods_refuse_batches(model):
    class Single(Probe):
        tags: ClassVar[Tags] = Tags(reads=frozenset(Point), batch=False)

    method = Single(subscription=Subscription(point=Point.STEP_END))
    with Stack([method]).attach(model), pytest.raises(StackConflict, match="one sample at a time"):
        model.generate(**make_inputs(model, PROMPTS), max_new_tokens=1)


def test_keys_of_a_stack_never_collide():
    class Odd(Probe):
        name: ClassVar[str] = "locore_2"

    odd = Odd(subscription=Subscription(point=Point.STEP_END))
    assert list(Stack([odd, LocoRE(), LocoRE()]).methods) == ["locore_2", "locore", "locore_3"]
    with pytest.raises(ConfigError, match="takes methods"):
        Stack({"x": 3})


def test_sample_ids_must_fit(model):
    with Stack([LocoRE()]).attach(model) as handle, pytest.raises(ConfigError, match="2 entries for 3 samples"):
        handle.generate(**make_inputs(model, PROMPTS), max_new_tokens=1, sample_ids=["a", "b"])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_parameters_are_finite(value):
    for build in (
        lambda: LocoRE(beta=value),
        lambda: SCR(lam=value),
        lambda: SGRS(alpha=value),
        lambda: ControlRandom(beta=value),
    ):
        with pytest.raises(ConfigError, match="finite"):
            build()


def test_methods_can_be_copied():
    for method in (LocoRE(beta=0.3), SCR(k_src=3), SGRS(alpha=0.2)):
        assert copy.deepcopy(method) == method
