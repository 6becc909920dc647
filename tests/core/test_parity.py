"""With nothing to do, the model behaves as if nobody were there; with something to do, every way in gives the same."""

from __future__ import annotations

import pytest
import torch
import transformers

from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.core.state import MethodState
from mitigate.methods.control_random import ControlRandom
from mitigate.methods.locore import LocoRE
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from tests.references.tiny import PAD, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 0), (2, 1, 9), (5, 1, 2), (1, 2, 3), (6, 1, 7), (2, 1, 1)]
DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "uncached": {"do_sample": False, "use_cache": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
}
#: Stacks whose parameters change nothing: hooks are in place, values are not touched.
IDLE = {
    "empty": [],
    "locore": [LocoRE.identity()],
    "scr": [SCR.identity()],
    "bias": [LocoRE(beta=0.0, mode="logit_bias"), SCR(lam=1.0)],
}
STACKS = {
    "locore": [LocoRE(beta=0.8)],
    "locore-bias": [LocoRE(beta=0.8, mode="logit_bias", layers="1-4")],
    "scr": [SCR(lam=1.6, k_src=4)],
    "scr-random": [SCR(lam=1.6, k_src=4, source_selection="random")],
    "sgrs": [SGRS(alpha=0.95, layers="2-3")],
    "sgrs+locore": [SGRS(alpha=0.95, layers="2-3"), LocoRE(beta=0.8)],
    "all": [SCR(lam=1.6, k_src=4), LocoRE(beta=0.8), SGRS(alpha=0.95, layers="2-3", proposal="greedy_order")],
    "random": [ControlRandom(beta=1.0)],
}


def run(call, inputs, **kwargs):
    torch.manual_seed(5)
    return call(**inputs, max_new_tokens=7, pad_token_id=PAD, **kwargs)


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("stack", IDLE)
def test_idle_stack_gives_the_same_tokens_both_ways(model, stack, decoding):
    inputs = make_inputs(model, PROMPTS[:4], seed=1)
    expected = run(model.generate, inputs, **DECODING[decoding])
    with Stack(IDLE[stack]).attach(model) as handle:
        assert torch.equal(run(model.generate, inputs, **DECODING[decoding]), expected)
        assert torch.equal(run(handle.generate, inputs, **DECODING[decoding]), expected)


@pytest.mark.parametrize("stack", IDLE)
def test_idle_stack_gives_the_same_logits_bit_for_bit(model, stack):
    inputs = make_inputs(model, PROMPTS[:4], seed=2)
    expected = model(**inputs).logits
    with Stack(IDLE[stack]).attach(model):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("decoding", [name for name in DECODING if name != "several"])
@pytest.mark.parametrize("stack", ["locore", "scr", "random"])
def test_plain_generate_and_handle_generate_agree(model, stack, decoding):
    inputs = make_inputs(model, PROMPTS[:4], seed=3)
    with Stack(STACKS[stack]).attach(model) as handle:
        plain = run(model.generate, inputs, **DECODING[decoding])
        first = handle.telemetry()
        ours = run(handle.generate, inputs, **DECODING[decoding])
        assert torch.equal(plain, ours)
        assert [without_time(sample) for sample in first] == [without_time(sample) for sample in handle.telemetry()]
        assert any(
            sum(without_time(sample)[stack if stack != "random" else "control_random"].values()) for sample in first
        )


def without_time(sample):
    return {
        key: {name: round(value, 3) for name, value in counters.items() if name != "seconds"}
        for key, counters in sample.items()
    }


def close(one, other):
    assert one.keys() == other.keys()
    for key in one:
        for name in (one[key].keys() | other[key].keys()) - {"seconds"}:  # a counter nobody touched may be absent
            assert one[key].get(name, 0.0) == pytest.approx(other[key].get(name, 0.0), rel=1e-3, abs=1e-3), (key, name)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("seed", [1, 2])
def test_batch_with_left_padding_equals_one_by_one(stack, seed):
    model = tiny_llava(seed=seed)
    inputs = make_inputs(model, PROMPTS, seed=seed)
    names = [f"sample {index}" for index in range(8)]
    with Stack(STACKS[stack]).attach(model) as handle:
        batch = run(handle.generate, inputs, seed=4, sample_ids=names, do_sample=False)
        telemetry = handle.telemetry()
        fresh = batch[:, inputs["input_ids"].shape[1] :]
        for row, sample in enumerate(split_rows(inputs, 6)):
            single = run(handle.generate, sample, seed=4, sample_ids=[names[row]], do_sample=False)
            tokens = single[0, sample["input_ids"].shape[1] :]
            assert fresh[row, : len(tokens)].tolist() == tokens.tolist()
            assert (fresh[row, len(tokens) :] == PAD).all()
            close(telemetry[row], handle.telemetry()[0])


def test_dropping_samples_from_a_batch_changes_nothing_for_the_others(model):
    inputs = make_inputs(model, PROMPTS[:1] * 3, seed=9)
    with Stack([SGRS(layers="2-3")]).attach(model) as handle:
        all_three = run(handle.generate, inputs, sample_ids=["a", "b", "c"])
        rows = {name: value[1:] for name, value in inputs.items()}
        two = run(handle.generate, rows, sample_ids=["b", "c"])
    assert torch.equal(all_three[1:, : two.shape[1]], two)


def test_missing_attention_mask_is_inferred_from_padding(model):
    """As generate itself does it: the pad token marks padding."""
    inputs = make_inputs(model, PROMPTS[:4], seed=4)
    with Stack([LocoRE(beta=0.8), SCR(lam=1.6, k_src=4)]).attach(model) as handle:
        expected = run(handle.generate, inputs, do_sample=False)
        masked = handle.telemetry()
        del inputs["attention_mask"]
        assert torch.equal(run(handle.generate, inputs, do_sample=False), expected)
        assert [without_time(sample) for sample in handle.telemetry()] == [without_time(sample) for sample in masked]
        assert handle.bus.last_request.layout.roles[3, 0] == Role.PAD


def test_counters_are_shared_out_when_rows_are_repeated():
    state = MethodState("x", 2)
    state.count("seen", torch.tensor([6.0, 3.0]))
    state.repeat(3)
    assert state.summed(range(3))["seen"] == pytest.approx(6.0)
    assert state.summed(range(3, 6))["seen"] == pytest.approx(3.0)


def test_positional_arguments_of_generate(model):
    inputs = make_inputs(model, PROMPTS[:2], seed=4)
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with Stack(STACKS["locore"]).attach(model):
        by_keyword = model.generate(**inputs, generation_config=config)
        assert torch.equal(model.generate(inputs["input_ids"], config, **rest), by_keyword)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", STACKS)
def test_half_precision_runs_and_stays_finite(stack, dtype):
    model = tiny_llava(seed=1).to(dtype)
    inputs = make_inputs(model, PROMPTS[:2], seed=1)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with Stack(STACKS[stack]).attach(model) as handle:
        out = run(handle.generate, inputs, return_dict_in_generate=True, output_logits=True, do_sample=False)
        assert torch.stack(out.logits).isfinite().all()
        assert all(value == value for value in handle.telemetry()[0]["bus"].values())


def test_chunked_prefill_equals_whole_prefill(model):
    inputs = make_inputs(model, PROMPTS[:2], seed=4)
    with Stack(STACKS["locore"]).attach(model) as handle:
        whole = run(handle.generate, inputs, do_sample=False)
        chunked = run(handle.generate, inputs, do_sample=False, prefill_chunk_size=11)
    assert torch.equal(whole, chunked)


def test_custom_loop_returns_and_streams_what_generate_does(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=4)

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    plain, ours = Streamer(), Streamer()
    kwargs = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = run(model.generate, inputs, streamer=plain, **kwargs)
    with Stack([SGRS.identity()]).attach(model) as handle:
        out = run(handle.generate, inputs, streamer=ours, **kwargs)
    assert torch.equal(out.sequences, expected.sequences)
    assert (ours.tokens, ours.ended) == (plain.tokens, True)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(out[name]), torch.stack(expected[name]), rtol=0, atol=1e-4)


def test_selecting_stack_leaves_plain_sampling_to_the_caller(model):
    """Where the method does not choose (no earlier text), the caller's sampling with its own seed decides."""
    inputs = make_inputs(model, PROMPTS[:2], seed=4)
    expected = run(model.generate, inputs, do_sample=True)
    with Stack([SGRS(history_start="generated")]).attach(model) as handle:
        ours = run(handle.generate, inputs, do_sample=True)
    first = inputs["input_ids"].shape[1]
    assert torch.equal(ours[:, first], expected[:, first])
