"""LocoRE against the naive implementation of its equations, and against arithmetic worked by hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from mitigate.core import Point
from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError
from mitigate.methods.locore import LocoRE
from tests.references import naive_locore, runs
from tests.references.tiny import EOS, PAD, full_forward, make_inputs, split_rows, tiny_llava

# one, two and no text after the picture; one and two pictures; left padding
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 0)]
MODES = ("post_raw", "post_renorm", "logit_bias", "logit_scale")
CASES = [
    {"mode": mode, "history_start": history, "layers": layers, "include_self": include_self, "decay_r": decay_r}
    for (mode, history, layers), (include_self, decay_r) in zip(
        itertools.product(MODES, ("after_image", "generated"), ("all", "1-3")),
        itertools.cycle([(False, 1.0), (True, 1.0), (False, 0.4), (True, 0.2), (False, 1.0)]),
        strict=False,
    )
]


def generate(model, method, inputs, steps=7, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


def plain(model, inputs, steps):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_equals_naive_full_sequence(seed):
    grid, kv_heads = ((6, 2), (4, 1), (3, 4))[seed % 3]
    model = tiny_llava(seed=seed, grid=grid, kv_heads=kv_heads)
    inputs = make_inputs(model, PROMPTS, seed=seed)
    out, _ = generate(model, LocoRE(beta=0.8, window=3, **CASES[seed]), inputs)
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    settings = {**CASES[seed], "layers": range(6) if CASES[seed]["layers"] == "all" else range(1, 4)}
    for row, sample in enumerate(split_rows(inputs, grid)):
        tokens, logits = naive_locore.generate(
            model, **sample, beta=0.8, window=3, **settings, max_new_tokens=7, eos=(EOS,)
        )
        assert fresh[row, : len(tokens)].tolist() == tokens
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        # float32 rounding grows with the logits (tens): 1e-5 relative to their size
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_every_option_is_compared():
    assert {case["mode"] for case in CASES} == set(MODES)
    for name, options in (("history_start", 2), ("layers", 2), ("include_self", 2), ("decay_r", 3)):
        for mode in ("post_", "logit_"):
            seen = {case[name] for case in CASES if case["mode"].startswith(mode)}
            assert len(seen) == options, (name, mode)


@pytest.mark.parametrize("mode", MODES)
def test_equals_naive_to_1e_5(mode):
    """In float64, where the reference's own rounding does not count; norms and rotary angles stay float32."""
    model = tiny_llava(seed=5).double()
    inputs = make_inputs(model, PROMPTS, seed=5)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out, _ = generate(model, LocoRE(beta=0.8, window=3, mode=mode), inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, logits = naive_locore.generate(
            model, **sample, beta=0.8, window=3, mode=mode, layers=range(6), max_new_tokens=7, eos=(EOS,)
        )
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        torch.testing.assert_close(ours, logits.float(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ worked by hand


def at_row(layout, row, **matrix):
    """Return an event about one query row."""
    tensor = next(iter(matrix.values()))
    rows = torch.tensor([row])
    return SimpleNamespace(layout=layout, rows=rows, layer=0, row_mask=torch.ones(tensor.shape[0], 1).bool(), **matrix)


def state():
    return SimpleNamespace(once=lambda name, source, compute: compute(), tracing=False)


def by_hand():
    """Six keys: one of the system, two of a picture, three of text (S0 = 3)."""
    roles = torch.tensor([[Role.SYSTEM, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.PROMPT, Role.PROMPT]])
    span = ImageSpan(image=0, positions=torch.tensor([1, 2]), grid=(1, 2), stop=3)
    return TokenLayout(roles.to(torch.int8), ((span,),), 6)


def test_a_row_worked_by_hand():
    layout = by_hand()
    row = torch.tensor([0.40, 0.10, 0.10, 0.10, 0.20, 0.10]).view(1, 1, 1, 6)
    event = at_row(layout, 5, probs=row)
    raw = LocoRE(beta=0.15, window=2).on_attention_probs(event, state()).flatten()
    assert raw.tolist() == pytest.approx([0.40, 0.10, 0.10, 0.115, 0.23, 0.10], abs=1e-6)
    assert float(raw.sum()) == pytest.approx(1 + 0.15 * 0.30, abs=1e-6) == pytest.approx(1.045)
    renormalised = [0.38278, 0.09569, 0.09569, 0.11005, 0.22010, 0.09569]
    found = LocoRE(beta=0.15, window=2, mode="post_renorm").on_attention_probs(event, state()).flatten()
    assert found.tolist() == pytest.approx(renormalised, abs=1e-5)
    biased = LocoRE(beta=0.15, window=2, mode="logit_bias").on_attention_scores(
        at_row(layout, 5, scores=row.log()), state()
    )
    added = (biased - row.log()).flatten()
    assert added.tolist() == pytest.approx([0, 0, 0, 0.139762, 0.139762, 0], abs=1e-6)
    assert biased.softmax(-1).flatten().tolist() == pytest.approx(renormalised, abs=1e-5)


def test_scaled_scores_worked_by_hand():
    """A negative score moves away from its key, a positive one towards it; renormalised weights rise in both."""
    layout = by_hand()
    scores = torch.tensor([1, -0.5, 0, -0.5, 0.5, 0]).view(1, 1, 1, 6)
    weights = scores.softmax(-1)
    assert weights.flatten().tolist() == pytest.approx([0.3586, 0.0800, 0.1319, 0.0800, 0.2175, 0.1319], abs=5e-5)
    scaled = LocoRE(beta=0.15, window=2, mode="logit_scale").on_attention_scores(
        at_row(layout, 5, scores=scores), state()
    )
    after = scaled.softmax(-1).flatten()
    assert after[[3, 4]].tolist() == pytest.approx([0.0734, 0.2319], abs=5e-5)
    raised = LocoRE(beta=0.15, window=2, mode="post_renorm").on_attention_probs(
        at_row(layout, 5, probs=weights), state()
    )
    assert raised.flatten()[[3, 4]].tolist() == pytest.approx([0.0881, 0.2394], abs=5e-5)


def padded_layout(length):
    """Two rows: one picture after padding and nothing left of it but a word; two pictures with text between."""
    roles = [
        [Role.PAD, Role.SYSTEM, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.PROMPT, Role.PROMPT, Role.PROMPT],
        [Role.SYSTEM, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.PROMPT],
    ]
    spans = (
        (ImageSpan(image=0, positions=torch.tensor([2, 3]), grid=(1, 2), stop=4),),
        (
            ImageSpan(image=1, positions=torch.tensor([1, 2]), grid=(1, 2), stop=3),
            ImageSpan(image=2, positions=torch.tensor([4, 5]), grid=(1, 2), stop=6),
        ),
    )
    return TokenLayout(torch.tensor(roles, dtype=torch.int8), spans, length)


@pytest.mark.parametrize(
    ("values", "row", "expected"),
    [
        ({"window": 2}, 7, [[5, 6], [6]]),  # the last prompt row; in the second sample q* - S0 < window
        ({"window": 5}, 7, [[4, 5, 6], [6]]),
        ({"window": 2, "include_self": True}, 7, [[5, 6, 7], [6, 7]]),
        ({"window": 3}, 10, [[7, 8, 9], [7, 8, 9]]),
        ({"window": 9}, 10, [[4, 5, 6, 7, 8, 9], [6, 7, 8, 9]]),
        ({"window": 3, "history_start": "generated"}, 7, [[], []]),  # first token: nothing was generated
        ({"window": 3, "history_start": "generated"}, 8, [[], []]),  # its own row has no earlier one
        ({"window": 3, "history_start": "generated"}, 9, [[8], [8]]),
        ({"window": 3, "history_start": "generated", "include_self": True}, 8, [[8], [8]]),
        ({"window": 2, "history_start": "generated"}, 12, [[10, 11], [10, 11]]),
    ],
)
def test_window_index_table(values, row, expected):
    layout = padded_layout(max(row + 1, 8))
    probs = torch.full((2, 1, 1, layout.length), 1 / layout.length)
    window = LocoRE(**values)._window(at_row(layout, row, probs=probs), probs)
    assert window.shape == (2, 1, 1, layout.length)
    assert [keys.flatten().nonzero().flatten().tolist() for keys in window] == expected
    for keys, roles in zip(window.flatten(1), layout.roles, strict=True):
        assert not bool(keys[roles <= Role.IMAGE].any())  # padding, system and image keys are never scaled
        assert values.get("include_self") or not bool(keys[row])
    gained = LocoRE(beta=0.5, **values).on_attention_probs(at_row(layout, row, probs=probs), state())
    torch.testing.assert_close(gained / probs, torch.where(window, 1.5, 1.0))


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("mode", MODES)
def test_no_gain_is_bit_identical(model, mode):
    inputs = make_inputs(model, PROMPTS, seed=1)
    out, telemetry = generate(model, LocoRE(beta=0.0, mode=mode), inputs, steps=4)
    expected = plain(model, inputs, 4)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert all(sample["locore"].get("rows_edited", 0) == 0 for sample in telemetry)


def test_decay_stands_in_for_beta(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    for mode in MODES:
        weak, _ = generate(model, LocoRE(decay_r=0.4, mode=mode), inputs, steps=4)
        negative, _ = generate(model, LocoRE(beta=-0.6, mode=mode), inputs, steps=4)
        torch.testing.assert_close(torch.stack(weak.logits), torch.stack(negative.logits), rtol=0, atol=1e-5)
    full, _ = generate(model, LocoRE(beta=0.3, decay_r=1.0), inputs, steps=4)
    same, _ = generate(model, LocoRE(beta=0.3), inputs, steps=4)
    assert torch.equal(torch.stack(full.logits), torch.stack(same.logits))


@pytest.mark.parametrize("mode", MODES)
def test_row_sums_are_what_the_mode_says(model, mode):
    """post_raw: 1 + beta m with m the mass on the window before the edit; the other modes: 1."""
    inputs = make_inputs(model, PROMPTS[:2], seed=2)
    stack = {"locore": LocoRE(beta=0.5, window=3, mode=mode)}
    with Stack(stack).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=PAD, eos_token_id=[], trace=True)
        traces, telemetry = handle.trace(), handle.telemetry()
    assert [(trace.step, trace.layer) for trace in traces] == [(step, layer) for step in range(3) for layer in range(6)]
    for trace in traces:
        for window, row in zip(trace.values["window_mass"], trace.values["row_mass"], strict=True):
            assert 0 < window < 1
            assert row == pytest.approx(1 + 0.5 * window if mode == "post_raw" else 1.0, abs=1e-5)
    if mode == "post_raw":  # what the bus counts anyway is the same number: beta times the mass
        for row in range(2):
            masses = sum(trace.values["window_mass"][row] for trace in traces)
            assert telemetry[row]["locore"]["l1_change"] == pytest.approx(0.5 * masses, rel=1e-4)
    for row, sample in enumerate(split_rows(inputs, 6)):
        ids = sample["input_ids"]
        settings = {"beta": 0.5, "window": 3, "mode": mode, "layers": None, "history_start": "after_image"}
        edits = naive_locore.edits(model, ids, prompt_len=ids.shape[1], **settings)
        last = full_forward(model, ids, sample["pixel_values"], collect=True, **edits).probs
        for layer in range(6):
            expected = float(last[layer][:, -1].sum(-1).mean())
            assert traces[layer].values["row_mass"][row] == pytest.approx(expected, abs=1e-5)


def test_cached_equals_uncached(model):
    inputs = make_inputs(model, PROMPTS, seed=3)
    cached, _ = generate(model, LocoRE(beta=2.0), inputs)
    uncached, _ = generate(model, LocoRE(beta=2.0), inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=2e-4)


def test_renormalising_equals_a_bias_on_the_scores(model):
    inputs = make_inputs(model, PROMPTS, seed=4)
    renormalised, _ = generate(model, LocoRE(beta=1.5, mode="post_renorm"), inputs)
    biased, _ = generate(model, LocoRE(beta=1.5, mode="logit_bias"), inputs)
    torch.testing.assert_close(torch.stack(renormalised.logits), torch.stack(biased.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_generated_history_cannot_touch_the_first_token(model, mode):
    inputs = make_inputs(model, PROMPTS, seed=5)
    method = LocoRE(beta=5.0, history_start="generated", mode=mode)
    out, telemetry = generate(model, method, inputs, steps=1)
    assert torch.equal(out.logits[0], plain(model, inputs, 1).logits[0])
    assert all(sample["locore"]["rows_edited"] == 0 for sample in telemetry)


@pytest.mark.parametrize("mode", MODES)
def test_other_rows_of_the_prompt_are_bit_identical(model, mode):
    inputs = make_inputs(model, PROMPTS[:2], seed=6)
    hidden = {}

    def keep(name):
        def hook(module, args, output):
            hidden.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    def run(name):
        layers = model.model.language_model.layers
        hooks = [layer.register_forward_hook(keep(name)) for layer in layers]
        try:
            return model(**inputs).logits
        finally:
            for hook in hooks:
                hook.remove()

    before = run("plain")
    with Stack([LocoRE(beta=2.0, mode=mode)]).attach(model):
        after = run("edited")
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert bool((after[:, -1] != before[:, -1]).any(-1).all())
    for old, new in zip(hidden["plain"], hidden["edited"], strict=True):
        assert torch.equal(new[:, :-1], old[:, :-1])
        assert not torch.equal(new[:, -1], old[:, -1])


def test_after_image_edits_every_predicting_row(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=5)
    _, telemetry = generate(model, LocoRE(), inputs, steps=4, eos_token_id=[])
    bus = telemetry[0]["bus"]
    assert telemetry[0]["locore"]["rows_edited"] == bus["attention_rows"] == 4 * 6


# ---------------------------------------------------------------------------------------------------------- parameters


def test_presets_say_how_close_they_are():
    assert LocoRE.preset("paper") == LocoRE()
    assert {name: LocoRE.fidelity_of(name).value for name in LocoRE.presets} == {
        "paper": "paper",
        "lineage": "reconstructed",
        "logit_bias": "reconstructed",
        "efficient": "reconstructed",
    }
    facts = SimpleNamespace(layers=32)
    (line,) = LocoRE.preset("lineage").subscriptions(facts)
    assert line.layers == tuple(range(9, 15))
    assert line.point is Point.ATTENTION_SCORES
    (line,) = LocoRE().subscriptions(facts)
    assert line.layers == tuple(range(32))
    assert line.point is Point.ATTENTION_PROBS


@pytest.mark.parametrize(
    "values",
    [
        *({"beta": value} for value in (-1.0, math.inf, math.nan)),
        *({"decay_r": value} for value in (0.0, 1.1, math.nan)),
        {"window": 0},
        {"mode": "raw"},
        {"history_start": "image"},
    ],
)
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.locore.{next(iter(values))}="):
        LocoRE(**values)
