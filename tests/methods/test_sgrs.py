"""SGRS against the naive implementation of its equations: full-sequence gradients, one sample at a time."""

from __future__ import annotations

import gc
import hashlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from mitigate.core import Access, Fidelity, Method, Point, Subscription, Tags
from mitigate.core.attachment import Attachment
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, HookError, StackConflict
from mitigate.methods.sgrs import SGRS
from tests.references import naive_sgrs
from tests.references.tiny import EOS, PAD, VOCAB, make_inputs, split_rows, tiny_llava, tiny_processor

# left padding, two pictures, one token of text after the picture, and none
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 1), (4, 1, 0)]
LAYERS = {"layers": "2-3"}
#: Token classes of the tests: not what a tokenizer would say, but different from each other and often drawn.
CLASSES = {"word_start": range(0, VOCAB, 2), "content": range(0, VOCAB, 3), "special": range(1, VOCAB, 4)}
OPTIONS = {
    "window_rule": ("last_w", "w_plus_1"),
    "history_start": ("after_image", "generated"),
    "history_init": ("empty", "prompt_tail"),
    "include_diagonal": (True, False),
    "norm": ("row_l2", "row_l1", "row_max", "none"),
    "reduce": ("mean", "sum", "window_sum"),
    "proposal": ("sample", "greedy_order"),
    "fallback": ("argmax_saliency", "argmax_logp_plus_eta_log_s"),
    "history_on_fallback": ("append", "skip"),
    "on_skip": ("base", "proposal"),
    "exempt": ("none", "eos", "special"),
    "gate_on": ("all", "word_start", "content"),
    "gradient": ("exact", "direct"),
}
ORDER = {"proposal": "greedy_order"}
CASES = [
    {},
    {"temperature": 0.4, "alpha": 0.8},
    {"temperature": 3.0, "top_k": 7},
    {"history_start": "generated"},
    {"history_start": "generated", "on_skip": "proposal", "alpha": 1.2},
    {"norm": "row_l1", "reduce": "sum", **ORDER},
    {"norm": "row_max", "reduce": "window_sum", "window": 2, **ORDER},
    {"norm": "none", "history_start": "generated", **ORDER},
    {"reduce": "window_sum", "include_diagonal": False, "alpha": 0.9},
    {"window_rule": "w_plus_1", "window": 2, **ORDER},
    {"history_init": "prompt_tail", **ORDER},
    {"history_init": "prompt_tail", "window_rule": "w_plus_1", "window": 2, "include_diagonal": False, **ORDER},
    {"history_init": "prompt_tail", "norm": "none", "alpha": 0.8},
    {"history_init": "prompt_tail", "history_start": "generated", "reduce": "window_sum"},
    {"fallback": "argmax_logp_plus_eta_log_s", "alpha": 1.3, "eta": 0.5, **ORDER},
    {"fallback": "argmax_logp_plus_eta_log_s", "alpha": 1.3, "eta": 4.0, "history_on_fallback": "skip", **ORDER},
    {"skip_above": 0.15, "alpha": 1.0, **ORDER},
    {"skip_above": 0.15, "on_skip": "proposal"},
    {"exempt": "eos", "alpha": 1.3},
    {"exempt": "special", "alpha": 1.3, **ORDER},
    {"gate_on": "word_start", "alpha": 1.3, **ORDER},
    {"gate_on": "content", "exempt": "special", "alpha": 1.3},
    {"gradient": "direct", **ORDER},
    {"gradient": "direct", "reduce": "sum", "norm": "row_l1", "history_start": "generated"},
    {"max_resample": 9, "top_k": 3, "alpha": 2.0, "window": 1},
    {"max_resample": 1, "alpha": 1.1, **ORDER},
]


@pytest.fixture
def classes(monkeypatch):
    """Give tokens the classes above, whatever the processor says."""
    masks = {name: torch.isin(torch.arange(VOCAB), torch.tensor(list(tokens))) for name, tokens in CLASSES.items()}
    monkeypatch.setattr(Attachment, "vocabulary", lambda self, device: SimpleNamespace(**masks))


def generate(model, methods, inputs, steps=6, processor=None, **kwargs):
    """Return the new tokens, the telemetry and the traces."""
    with Stack(methods).attach(model, processor) as handle:
        out = handle.generate(**inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, trace=True, **kwargs)
        return out[:, inputs["input_ids"].shape[1] :], handle.telemetry(), handle.trace()


def steps_of(traces, row, method="sgrs"):
    """Return what was reported on one sample, step by step."""
    return [{name: value[row] for name, value in trace.values.items()} for trace in traces if trace.method == method]


def uniforms(seed, sample):
    """Replay the request's generator of one sample: draws come in the order in which they are asked for."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:{sample}:0".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    return lambda step, draw: float(torch.rand((), dtype=torch.float64, generator=generator))


def free_tokens(values):
    """Return the tokens the reference accepts without a score."""
    free = {"none": set(), "eos": {EOS}, "special": {EOS, *CLASSES["special"]}}[values.get("exempt", "none")]
    gate = values.get("gate_on", "all")
    return free | (set() if gate == "all" else set(range(VOCAB)) - set(CLASSES[gate]))


def compare(reported, expected, counted, window=None):
    """One sample's reports and counters against the reference's steps."""
    size = max([1.0, *(abs(value) for step in expected for value in (*step.S.values(), *step.image.values()))])
    for ours, naive in zip(reported, expected, strict=False):
        assert ours["candidates"] == naive.candidates
        assert ours["probabilities"] == pytest.approx(naive.p, abs=1e-4)
        scores = dict(zip(ours["candidates"], ours["saliency"], strict=True))
        assert {token for token, value in scores.items() if not math.isnan(value)} == set(naive.S)
        assert {token: scores[token] for token in naive.S} == pytest.approx(naive.S, abs=1e-5 * size)
        places = [naive.candidates.index(token) for token in naive.S]
        image = {naive.candidates[place]: ours["image_saliency"][place] for place in places}
        layers = {naive.candidates[place]: ours["layer_saliency"][place] for place in places}
        for token in naive.S:
            assert sum(image[token]) / len(image[token]) == pytest.approx(naive.image[token], abs=1e-5 * size)
            assert sum(layers[token]) / len(layers[token]) == pytest.approx(naive.S[token], abs=1e-5 * size)
        assert {token for token, refused in zip(naive.candidates, ours["rejected"], strict=True) if refused} == set(
            naive.rejected
        )
        assert ours["fallback"] == naive.fallback
        assert ours["columns"] == (len(naive.J) if window is None else min(len(naive.J), window))
        assert naive.skipped or ours["threshold"] == pytest.approx(naive.tau, abs=1e-5 * size)
        if ours["chosen_place"] >= 0:
            assert naive.candidates[ours["chosen_place"]] == naive.token
    own = [step for step in expected if not step.skipped and not step.exempted]
    sums = {
        "steps": len(expected),
        "gated": len(own),
        "skipped": sum(step.confident for step in expected),
        "exempted": sum(step.exempted for step in expected),
        "rejections": sum(len(step.rejected) for step in expected),
        "steps_with_rejection": sum(bool(step.rejected) for step in expected),
        "fallbacks": sum(step.fallback for step in expected),
        "saliency": sum(step.S[step.token] for step in own),
        "image_saliency": sum(step.image[step.token] for step in own),
    }
    assert {name: counted[name] for name in sums} == pytest.approx(sums, abs=1e-4 * size)
    return sums


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_naive_full_sequence(number):
    values = {"alpha": 0.95, "window": 4, "top_k": 5, "max_resample": 3, "proposal": "sample", **CASES[number]}
    grid, kv_heads = ((6, 2), (4, 2), (3, 4))[number % 3]
    model = tiny_llava(seed=number, grid=grid, kv_heads=kv_heads)
    inputs = make_inputs(model, PROMPTS, seed=number)
    tokens, telemetry, traces = generate(model, [SGRS(**values, **LAYERS)], inputs, seed=number)
    settings = {name: value for name, value in values.items() if name not in ("exempt", "gate_on")}
    for row, sample in enumerate(split_rows(inputs, grid)):
        draws = uniforms(number, str(row)) if values["proposal"] == "sample" else None
        expected, steps = naive_sgrs.generate(
            model, **sample, **settings, layers=[2, 3], draws=draws, eos=(EOS,), free=free_tokens(values),
            max_new_tokens=6,
        )  # fmt: skip
        assert tokens[row, : len(expected)].tolist() == expected
        window = values["window"] if values.get("reduce") == "window_sum" else None
        compare(steps_of(traces, row), steps, telemetry[row]["sgrs"], window)
        scored = sum(len(step.S) for step in steps)
        if values.get("history_init") != "prompt_tail":
            assert telemetry[row]["sgrs"]["extra_backwards"] == (scored if values.get("gradient") != "direct" else 0)


def test_every_option_of_every_switch_is_compared():
    fields = SGRS().params()
    for name, options in OPTIONS.items():
        assert {case.get(name, fields[name]) for case in CASES} >= set(options), name
    texts = {name for name, value in fields.items() if isinstance(value, str)} - {"layers", "query_row"}
    assert texts | {"include_diagonal"} == OPTIONS.keys()


def test_the_confident_steps_above_exist():
    for seed in (number for number, case in enumerate(CASES) if "skip_above" in case):
        model = tiny_llava(seed=seed, grid=(6, 4, 3)[seed % 3], kv_heads=(2, 2, 4)[seed % 3])
        inputs = make_inputs(model, PROMPTS, seed=seed)
        _, telemetry, _ = generate(model, [SGRS(**CASES[seed], **LAYERS)], inputs, seed=seed)
        skipped = sum(sample["sgrs"]["skipped"] for sample in telemetry)
        assert 0 < skipped < sum(sample["sgrs"]["steps"] for sample in telemetry)


def test_a_certain_token_is_scored_unless_told_otherwise():
    """A probability that rounds to 1 is not above the default of `skip_above`."""
    model = tiny_llava(seed=3)
    model.lm_head.weight.mul_(1000.0)
    inputs = make_inputs(model, PROMPTS[:2], seed=3)
    for values, counter in (({}, "gated"), ({"skip_above": 0.99}, "skipped")):
        _, telemetry, traces = generate(model, [SGRS(**LAYERS, **values)], inputs)
        assert [step["probabilities"][0] for step in steps_of(traces, 0)] == [1.0] * 6
        assert [sample["sgrs"][counter] for sample in telemetry] == [6.0, 6.0]


@pytest.mark.usefixtures("classes")
def test_every_option_makes_a_difference():
    """A switch the comparison above could not tell apart would prove nothing: each changes tokens or scores."""
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS[:2], seed=0)

    def outcome(**values):
        base = {"alpha": 1.1, "window": 3, **ORDER, **LAYERS}
        tokens, telemetry, traces = generate(model, [SGRS(**{**base, **values})], inputs, steps=10, seed=5)
        told = [(trace.values["saliency"], trace.values["threshold"]) for trace in traces]
        return tokens.tolist(), repr(told), [sample["sgrs"]["gated"] for sample in telemetry]

    plain = outcome()
    for name, options in OPTIONS.items():
        for option in options:
            if option != SGRS().params()[name] and (name, option) not in (
                ("proposal", "greedy_order"),
                ("exempt", "eos"),
            ):
                extra = {"history_start": "generated", "proposal": "sample"} if name == "on_skip" else {}
                assert outcome(**{name: option}, **extra) != (outcome(**extra) if extra else plain), (name, option)
    assert outcome(proposal="sample") != plain
    assert outcome(proposal="sample", temperature=5.0) != outcome(proposal="sample")
    assert outcome(skip_above=0.1) != plain


# ------------------------------------------------------------------------------------------------------- bookkeeping


def test_some_candidates_are_rejected_and_some_fall_back():
    """The comparison above would prove little if nothing were ever rejected."""
    model = tiny_llava(seed=0)
    _, telemetry, _ = generate(model, [SGRS(alpha=0.95, window=4, **LAYERS)], make_inputs(model, PROMPTS, seed=0))
    total = {name: sum(sample["sgrs"][name] for sample in telemetry) for name in ("rejections", "fallbacks")}
    assert total["rejections"] > 0
    assert total["fallbacks"] > 0


@pytest.mark.parametrize("history_start", ["after_image", "generated"])
def test_history_gains_exactly_one_entry_per_gated_step(history_start):
    model = tiny_llava(seed=1)
    inputs = make_inputs(model, PROMPTS, seed=1)
    lengths, steps = [], 12

    class Watched(SGRS):
        def on_select_token(self, event, state):
            choice = super().on_select_token(event, state)
            lengths.append([len(scores) for scores in state.history])
            assert all(math.isfinite(score) and score != 1.0 for scores in state.history for score in scores)
            return choice

    method = Watched(alpha=1.2, skip_above=0.15, history_start=history_start, **LAYERS)
    _, telemetry, traces = generate(model, [method], inputs, steps=steps, eos_token_id=[])
    for row in range(len(PROMPTS)):
        before = 0
        for step, report in enumerate(steps_of(traces, row)):
            # without earlier text, or in a confident step, nothing is scored and nothing enters
            gated = report["columns"] > 0 and report["probabilities"][0] <= 0.15
            assert lengths[step][row] - before == gated
            before = lengths[step][row]
        assert telemetry[row]["sgrs"]["gated"] == before > 0
        assert telemetry[row]["sgrs"]["steps"] == steps
    if history_start == "generated":
        assert lengths[0] == [0] * len(PROMPTS)


def test_fallback_may_stay_out_of_the_history():
    """Algorithm 1 to the letter: only accepted scores are remembered."""
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS[:2], seed=0)
    thresholds = {}
    for option in ("append", "skip"):
        method = SGRS(alpha=1.3, proposal="greedy_order", window=3, history_on_fallback=option, **LAYERS)
        _, telemetry, traces = generate(model, [method], inputs, steps=10)
        assert all(sample["sgrs"]["fallbacks"] > 0 for sample in telemetry)
        thresholds[option] = [report["threshold"] for report in steps_of(traces, 0)]
    assert len(set(thresholds["skip"][3:])) < len(set(thresholds["append"][3:]))


def test_accepting_everything_in_order_is_greedy(model):
    inputs = make_inputs(model, PROMPTS, seed=2)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    for method in (SGRS.identity(), SGRS(alpha=0.0, proposal="greedy_order", gradient="direct", **LAYERS)):
        ours, telemetry, _ = generate(model, [method], inputs, steps=8)
        assert torch.equal(ours, plain[:, inputs["input_ids"].shape[1] :])
        assert all(sample["sgrs"]["rejections"] == 0 for sample in telemetry)


def test_first_token_of_generated_history_is_greedy(model):
    inputs = make_inputs(model, PROMPTS, seed=6)
    tokens, telemetry, traces = generate(model, [SGRS(history_start="generated")], inputs, steps=1)
    plain = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=PAD)
    assert torch.equal(tokens, plain[:, -1:])
    assert all(sample["sgrs"]["gated"] == 0 for sample in telemetry)
    assert traces[0].values["chosen_place"] == [-1] * len(PROMPTS)


def test_prompt_tail_can_reject_the_first_token():
    """With an empty history the first token always passes; with the prompt's own scores it need not."""
    model = tiny_llava(seed=3)
    inputs = make_inputs(model, [(3, 1, 8), (2, 1, 7)], seed=3)
    for init, rejects in (("empty", False), ("prompt_tail", True)):
        method = SGRS(alpha=5.0, history_init=init, proposal="greedy_order", **LAYERS)
        _, telemetry, traces = generate(model, [method], inputs, steps=1)
        assert all(any(refused) == rejects for refused in traces[0].values["rejected"])
        passes = [sample["sgrs"]["extra_backwards"] for sample in telemetry]
        assert passes == [(5 + 5 if rejects else 1)] * 2  # five prompt rows, five candidates


@pytest.mark.parametrize("prompt", [(4, 1, 0), (4, 1, 1)])
def test_a_prompt_without_a_tail_starts_with_an_empty_history(model, prompt):
    inputs = make_inputs(model, [prompt], seed=3)
    plain, tail = (
        generate(model, [SGRS(history_init=init, alpha=1.2, **ORDER, **LAYERS)], inputs)
        for init in ("empty", "prompt_tail")
    )
    assert torch.equal(plain[0], tail[0])
    assert plain[1][0]["sgrs"]["extra_backwards"] == tail[1][0]["sgrs"]["extra_backwards"] > 0


def test_an_exempt_end_token_passes_any_threshold():
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS[:1], seed=0)
    strict = {"alpha": 50.0, "proposal": "greedy_order", **LAYERS}
    _, _, traces = generate(model, [SGRS(**strict)], inputs, eos_token_id=[])
    reports = steps_of(traces, 0)
    step = next(step for step, report in enumerate(reports) if report["chosen_place"] > 0)  # the first was rejected
    first = reports[step]["candidates"][0]
    for exempt, stops in (("none", False), ("eos", True)):
        tokens, telemetry, _ = generate(model, [SGRS(**strict, exempt=exempt)], inputs, eos_token_id=[first])
        assert (tokens[0, step] == first) == stops
        assert telemetry[0]["sgrs"]["exempted"] == stops


def test_word_classes_need_the_processor(model):
    inputs = make_inputs(model, PROMPTS, seed=2)
    for values in ({"exempt": "special"}, {"gate_on": "content"}):
        with pytest.raises(ConfigError, match=r"attach\(model, processor\)"):
            generate(model, [SGRS(**values, **LAYERS)], inputs, steps=2)
        tokens, telemetry, _ = generate(
            model, [SGRS(**values, **LAYERS)], inputs, steps=2, processor=tiny_processor(model.config)
        )
        assert tokens.shape == (4, 2)
        assert all(sample["sgrs"]["steps"] == 2 for sample in telemetry)


def test_logits_processors_of_the_caller_are_respected(model):
    """A token the caller forbids is neither proposed nor taken as fallback."""
    inputs = make_inputs(model, PROMPTS, seed=2)
    method = SGRS(alpha=5.0, top_k=3, **LAYERS)
    free, _, _ = generate(model, [method], inputs, seed=1)
    banned = sorted(set(free.flatten().tolist()) - {PAD})
    tokens, telemetry, _ = generate(model, [method], inputs, seed=1, suppress_tokens=banned)
    assert not set(tokens.flatten().tolist()) & set(banned)
    assert sum(sample["sgrs"]["fallbacks"] for sample in telemetry) > 0
    only = [token for token in range(VOCAB) if token != 42]
    for values in ({"proposal": "sample"}, {"proposal": "greedy_order"}, {"fallback": "argmax_logp_plus_eta_log_s"}):
        method = SGRS(alpha=5.0, top_k=3, **values, **LAYERS)
        tokens, telemetry, _ = generate(model, [method], inputs, steps=3, suppress_tokens=only)
        assert set(tokens.flatten().tolist()) == {42}
        assert all(sample["sgrs"]["tokens_changed"] == 0 for sample in telemetry)  # greedy is under the same ban
        assert all(sample["sgrs"]["rejections"] <= 2 for sample in telemetry)  # one candidate: nothing else to reject


def test_draws_depend_on_the_seed_only(model):
    inputs = make_inputs(model, PROMPTS, seed=4)
    method = SGRS(temperature=4.0, **LAYERS)
    first, second, other = (generate(model, [method], inputs, steps=8, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------------ the machinery


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("gradient", ["exact", "direct"])
def test_scores_in_every_mode_of_the_caller(model, outer, gradient):
    inputs = make_inputs(model, PROMPTS, seed=7)
    method = SGRS(alpha=0.95, gradient=gradient, **LAYERS)
    expected, _, _ = generate(model, [method], inputs, seed=3)
    with outer():
        fresh = {name: value.clone() for name, value in inputs.items()}
        tokens, telemetry, _ = generate(model, [method], fresh, seed=3)
    assert torch.equal(tokens, expected)
    assert all(sample["sgrs"]["gated"] > 0 for sample in telemetry)


def test_only_exact_scores_need_gradients(model):
    needs = {values: Stack([SGRS(**dict([values]))]).needs_gradient for values in (
        ("gradient", "exact"), ("gradient", "direct"), ("query_row", "candidate_legacy")
    )}  # fmt: skip
    assert list(needs.values()) == [True, False, False]
    inputs = make_inputs(model, PROMPTS, seed=8)
    with Stack([SGRS(gradient="direct", **LAYERS)]).attach(model) as handle:
        handle.model.register_forward_hook(lambda module, args, output: flags.append(output.logits.requires_grad))
        flags: list[bool] = []
        handle.generate(**inputs, max_new_tokens=3, pad_token_id=PAD)
    assert flags == [False] * 3


def test_nothing_of_the_graph_survives(model):
    inputs = make_inputs(model, PROMPTS, seed=8)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Stack([SGRS(history_init="prompt_tail", **LAYERS)]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=5, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True
        )
        flags = [(layer.keys.requires_grad, layer.values.requires_grad) for layer in out.past_key_values.layers]
        assert flags == [(False, False)] * 6
        assert handle.bus.last_request.frame.tape == {}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(score.requires_grad for score in out.scores)


def test_memory_does_not_grow_over_two_hundred_steps():
    """No key or value of the cache requires a gradient after a step, and no step leaves tensors behind."""
    model = tiny_llava(seed=0, layers=3, grid=2)
    inputs = make_inputs(model, [(2, 1, 3)], seed=0)
    alive, flags = [], []

    def watch(ids, scores, **kwargs):
        layers = handle.bus.last_request.cache.layers
        flags.extend(flag for layer in layers for flag in (layer.keys.requires_grad, layer.values.requires_grad))
        step = ids.shape[1] - inputs["input_ids"].shape[1]
        if step in (60, 130, 200):
            gc.collect()
            alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
        return torch.zeros(len(ids), dtype=torch.bool)

    with Stack([SGRS(alpha=1.0, layers="1")]).attach(model) as handle:
        handle.generate(
            **inputs, max_new_tokens=200, do_sample=False, pad_token_id=PAD, eos_token_id=[], stopping_criteria=[watch]
        )
        telemetry = handle.telemetry()[0]["sgrs"]
    assert telemetry["steps"] == telemetry["gated"] == 200
    assert len(flags) == 200 * 3 * 2
    assert not any(flags)
    assert len(alive) == 3
    assert max(alive) - min(alive) <= 4


def test_it_works_behind_a_cut_off_that_leaves_one_token():
    @dataclass(frozen=True, kw_only=True)
    class CutOff(Method):
        name: ClassVar[str] = "cut_off"
        summary: ClassVar[str] = "excludes all tokens but the best"
        fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
        tags: ClassVar[Tags] = Tags(writes=frozenset({Point.NEXT_TOKEN_LOGITS}))

        def subscriptions(self, model):
            return [Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)]

        def on_next_token_logits(self, event, state):
            best = event.logits.max(-1, keepdim=True).values
            return event.logits.masked_fill(event.logits < best, -torch.inf)

    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS[:2])
    expected, _, _ = generate(model, [], inputs)
    for order in (0, 1):
        tokens, telemetry, _ = generate(model, [CutOff(), SGRS(**LAYERS)][:: 1 - 2 * order], inputs)
        assert torch.equal(tokens, expected)
        assert telemetry[0]["sgrs"]["extra_backwards"] >= 1


def test_a_saliency_that_is_no_number_is_an_error():
    model = tiny_llava(seed=0)
    model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(HookError, match="not a number"):
        generate(model, [SGRS(**LAYERS)], make_inputs(model, PROMPTS[:1]))


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
)
def test_refuses_other_ways_of_decoding(model, arguments):
    with pytest.raises(StackConflict):
        generate(model, [SGRS()], make_inputs(model, PROMPTS), **arguments)


def test_plain_generate_names_the_remedy(model):
    inputs = make_inputs(model, PROMPTS)
    with Stack([SGRS()]).attach(model), pytest.raises(StackConflict, match=r"handle\.generate"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    "values",
    [
        *({name: value} for name, value in (("alpha", -0.1), ("alpha", math.nan), ("top_k", 0), ("eta", 0.0))),
        *({name: value} for name, value in (("temperature", 0.0), ("skip_above", 1.1), ("window", 0))),
        *({name: "x"} for name in OPTIONS if name != "include_diagonal"),
        {"query_row": "candidate"},
        {"history_init": "prompt_tail", "gradient": "direct"},
        {"history_init": "prompt_tail", "query_row": "candidate_legacy"},
    ],
)
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.sgrs.{next(iter(values))}="):
        SGRS(**values)


def test_presets():
    assert SGRS.preset("paper") == SGRS()
    assert SGRS.preset("safe").exempt == "special"
    assert {name: SGRS.fidelity_of(name).value for name in SGRS.presets} == {
        "paper": "paper",
        "safe": "paper",
        "official-code": "control",
        "efficient": "reconstructed",
        "forward-only": "reconstructed",
    }
