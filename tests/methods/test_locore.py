"""LocoRE against the naive implementation of its equations."""

from __future__ import annotations

import itertools

import pytest
import torch

from mitigate.errors import ConfigError
from mitigate.methods.locore import LocoRE
from tests.references import naive_locore, runs
from tests.references.tiny import EOS, PAD, make_inputs, split_rows, tiny_llava

# one, two and no text after the picture; one and two pictures; left padding
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 0)]
MODES = ("post_raw", "post_renorm", "logit_bias", "logit_scale")


def generate(model, method, inputs, steps=7, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


@pytest.mark.parametrize(
    ("mode", "history", "layers", "seed"),
    [
        (mode, history, layers, seed)
        for seed, (mode, history, layers) in enumerate(
            itertools.product(MODES, ("after_image", "generated"), ("all", "1-3"))
        )
    ],
)
def test_equals_naive_full_sequence(mode, history, layers, seed):
    model = tiny_llava(seed=seed)
    inputs = make_inputs(model, PROMPTS, seed=seed)
    out, _ = generate(model, LocoRE(beta=0.8, window=3, mode=mode, history_start=history, layers=layers), inputs)
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    chosen = range(6) if layers == "all" else range(1, 4)
    for row, sample in enumerate(split_rows(inputs, 6)):
        tokens, logits = naive_locore.generate(
            model,
            **sample,
            beta=0.8,
            window=3,
            mode=mode,
            history_start=history,
            layers=chosen,
            max_new_tokens=7,
            eos=(EOS,),
        )
        assert fresh[row, : len(tokens)].tolist() == tokens
        ours = torch.stack(out.logits, 1)[row, : len(tokens)]
        # float32 rounding grows with the logits (tens): 1e-5 relative to their size
        torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


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


def test_generated_history_cannot_touch_the_first_token(model):
    inputs = make_inputs(model, PROMPTS, seed=5)
    out, telemetry = generate(model, LocoRE(beta=5.0, history_start="generated"), inputs, steps=1)
    plain = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(out.logits[0], plain.logits[0])
    assert all(sample["locore"]["rows_edited"] == 0 for sample in telemetry)


def test_after_image_edits_every_predicting_row(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=5)
    _, telemetry = generate(model, LocoRE(), inputs, steps=4, eos_token_id=[])
    bus = telemetry[0]["bus"]
    assert telemetry[0]["locore"]["rows_edited"] == bus["attention_rows"] == 4 * 6


@pytest.mark.parametrize("values", [{"beta": -1.0}, {"window": 0}, {"mode": "raw"}, {"history_start": "image"}])
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.locore.{next(iter(values))}="):
        LocoRE(**values)
