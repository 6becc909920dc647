"""SGRS and LocoRE in one loop, against a full-sequence loop that knows nothing of caches."""

from __future__ import annotations

import math

import pytest
import torch

from mitigate.core.stack import Stack
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from tests.references import naive_locore, naive_sgrs
from tests.references.tiny import EOS, PAD, full_forward, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 1), (4, 1, 0)]
GAIN = {"beta": 0.7, "window": 3}
GATE = {"alpha": 0.95, "window": 4, "proposal": "greedy_order", "top_k": 5, "max_resample": 3}


def run(model, stack, inputs, steps=6, **kwargs):
    """Return tokens, telemetry, traces and how often the model ran."""
    calls = []
    counter = model.register_forward_hook(lambda module, args, output: calls.append(output.logits.shape[1]))
    try:
        with Stack(stack).attach(model) as handle:
            out = handle.generate(
                **inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, trace=True, **kwargs
            )
            tokens = out[:, inputs["input_ids"].shape[1] :]
            return tokens, handle.telemetry(), [item for item in handle.trace() if item.method == "sgrs"], calls
    finally:
        counter.remove()


@pytest.mark.parametrize("gradient", ["exact", "direct"])
@pytest.mark.parametrize(
    ("mode", "layers", "extra"),
    [
        ("post_raw", "all", {}),
        ("post_renorm", "all", {"include_self": True}),
        ("logit_bias", "1-3", {}),
        ("logit_scale", "all", {"decay_r": 0.3}),
        ("post_raw", "2-4", {"history_start": "generated"}),
    ],
)
def test_equals_the_naive_closed_loop(mode, layers, extra, gradient):
    """The gain acts on every row that predicted a token; saliency is measured on the attention it leaves."""
    model = tiny_llava(seed=6)
    inputs = make_inputs(model, PROMPTS, seed=6)
    locore = LocoRE(**GAIN, mode=mode, layers=layers, **extra)
    sgrs = SGRS(**GATE, layers="2-3", gradient=gradient)
    naive = {"all": range(6), "1-3": range(1, 4), "2-4": range(2, 5)}[layers]
    gain = {**GAIN, "mode": mode, "layers": naive, "history_start": "after_image", **extra}
    for stack in ([sgrs, locore], [locore, sgrs]):
        tokens, telemetry, traces, _ = run(model, stack, inputs)
        for row, sample in enumerate(split_rows(inputs, 6)):
            expected, steps = naive_sgrs.generate(
                model, **sample, **GATE, layers=[2, 3], eos=(EOS,), locore=gain, gradient=gradient, max_new_tokens=6
            )
            assert tokens[row, : len(expected)].tolist() == expected
            for trace, step in zip(traces, steps, strict=False):
                scores = dict(zip(trace.values["candidates"][row], trace.values["saliency"][row], strict=True))
                known = {token: score for token, score in scores.items() if not math.isnan(score)}
                assert known == pytest.approx(step.S, abs=1e-5)
            assert telemetry[row]["sgrs"]["rejections"] == sum(len(step.rejected) for step in steps)
            assert telemetry[row]["locore"]["rows_edited"] > 0


def test_scores_are_of_the_edited_attention(model):
    """The comparison above would not notice a gain that saliency ignores, if the gain changed nothing."""
    inputs = make_inputs(model, PROMPTS[:1], seed=1)
    alone = run(model, [SGRS(**GATE, layers="2-3")], inputs, steps=1)[2][0].values["saliency"]
    edited = run(model, [SGRS(**GATE, layers="2-3"), LocoRE(**GAIN)], inputs, steps=1)[2][0].values["saliency"]
    assert abs(alone[0][0] - edited[0][0]) > 1e-4


@pytest.mark.parametrize("order", [1, -1])
def test_no_extra_forward(model, order):
    """One forward a step; the prompt runs in two parts, so that the first token's graph spans one token."""
    inputs = make_inputs(model, PROMPTS[:2], seed=3)
    stack = [SGRS(**GATE, layers="2-3"), LocoRE(**GAIN)][::order]
    steps = 7
    _, telemetry, _, calls = run(model, stack, inputs, steps=steps, eos_token_id=[])
    width = inputs["input_ids"].shape[1]
    assert calls[1:] == [1] * steps
    assert len(calls) == steps + 1
    assert width - 1 >= calls[0]
    for sample in telemetry:
        assert sample["bus"]["forwards"] == steps
        assert "extra_forwards" not in sample["sgrs"]
        assert sample["locore"]["rows_edited"] == steps * 6
    direct = [SGRS(**GATE, layers="2-3", gradient="direct"), LocoRE(**GAIN)][::order]
    assert len(run(model, direct, inputs, steps=steps, eos_token_id=[])[3]) == steps


@pytest.mark.parametrize("mode", ["post_raw", "post_renorm"])
def test_where_the_leaf_is_placed(mode):
    """A gain without renormalisation: before and after it, weight times gradient is the same. With one it is not."""
    model = tiny_llava(seed=0)
    sample = split_rows(make_inputs(model, PROMPTS[:1], seed=0), 6)[0]
    ids, pixels = sample["input_ids"], sample["pixel_values"]
    settings = {**GAIN, "mode": mode, "layers": None, "history_start": "after_image"}
    after = naive_sgrs.products(model, ids, pixels, 9, layers=range(6), locore=settings)
    edits = naive_locore.edits(model, ids, prompt_len=ids.shape[1], **settings)
    before = []

    def keep(layer, probs):
        before.append(probs)
        return edits["probs_edit"](layer, probs)

    logits = full_forward(model, ids, pixels, leaves=True, probs_edit=keep).logits
    gradients = torch.autograd.grad(-torch.log_softmax(logits[-1], -1)[9], before)
    differences = [
        float((after[layer] - (before[layer].detach() * gradients[layer])[:, -1]).abs().max()) for layer in range(6)
    ]
    assert (max(differences) < 1e-6) == (mode == "post_raw")


def test_committed_keys_are_those_of_locore_alone(model):
    """Rejected candidates are never fed: forcing the same tokens under LocoRE alone gives the same cache."""
    inputs = make_inputs(model, PROMPTS[:1], seed=2)
    caches = []
    stack = [SGRS(**{**GATE, "alpha": 1.5}, layers="2-3"), LocoRE(**GAIN)]
    with Stack(stack).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=[], return_dict_in_generate=True
        )
        assert handle.telemetry()[0]["sgrs"]["rejections"] > 0
    caches.append(out.past_key_values)
    with Stack([LocoRE(**GAIN)]).attach(model), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for token in out.sequences[0, inputs["input_ids"].shape[1] : -1]:
            cache = model(input_ids=token[None, None], past_key_values=cache, use_cache=True).past_key_values
    for ours, forced in zip(out.past_key_values.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, forced.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values, forced.values, rtol=0, atol=1e-4)
