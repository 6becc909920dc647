"""SGRS against the naive implementation of its equations: full-sequence gradients, one sample at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from mitigate.core import SelectToken
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, StackConflict
from mitigate.methods.locore import LocoRE
from mitigate.methods.sgrs import SGRS
from tests.references import naive_sgrs
from tests.references.tiny import EOS, PAD, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 1)]
LAYERS = {"layers": "2-3"}


class Recorded(SGRS):
    """SGRS that keeps every score it computed."""

    log: list = []  # noqa: RUF012

    def _saliency(self, event: SelectToken, token, rows, columns):
        scores = super()._saliency(event, token, rows, columns)
        for row in rows.nonzero().flatten().tolist():
            self.log.append((row, event.step, int(token[row]), float(scores[row])))
        return scores


def generate(model, methods, inputs, steps=6, **kwargs):
    with Stack(methods).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, **kwargs)
        return out[:, inputs["input_ids"].shape[1] :], handle.telemetry()


def uniforms(seed, sample):
    """Replay the request's generator of one sample: draws come in the order in which they are asked for."""
    import hashlib

    number = int.from_bytes(hashlib.sha256(f"{seed}:{sample}:0".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    return lambda step, draw: float(torch.rand((), dtype=torch.float64, generator=generator))


@pytest.mark.parametrize(
    ("proposal", "history", "norm", "reduce", "locore"),
    [
        ("sample", "after_image", "row_l2", "mean", None),
        ("sample", "generated", "row_l2", "mean", None),
        ("greedy_order", "after_image", "row_l1", "sum", None),
        ("greedy_order", "after_image", "row_max", "window_sum", None),
        ("greedy_order", "generated", "none", "mean", None),
        ("sample", "after_image", "row_l2", "mean", "post_raw"),
        ("greedy_order", "after_image", "row_l2", "mean", "logit_bias"),
        ("greedy_order", "after_image", "row_l2", "mean", "post_renorm"),
    ],
)
def test_equals_naive_full_sequence(proposal, history, norm, reduce, locore):
    for seed in (0, 1):
        model = tiny_llava(seed=seed)
        inputs = make_inputs(model, PROMPTS, seed=seed)
        values = {"alpha": 0.95, "window": 4, "proposal": proposal, "norm": norm, "reduce": reduce}
        values["history_start"] = history
        method = Recorded(**values, **LAYERS)
        method.log.clear()
        stack = [method] if locore is None else [LocoRE(beta=0.7, window=3, mode=locore), method]
        tokens, telemetry = generate(model, stack, inputs, seed=seed)
        gain = locore and {"beta": 0.7, "window": 3, "mode": locore, "layers": range(6), "history_start": "after_image"}
        for row, sample in enumerate(split_rows(inputs, 6)):
            draws = uniforms(seed, str(row)) if proposal == "sample" else None
            expected, trace = naive_sgrs.generate(
                model, **sample, **values, top_k=5, max_resample=3, layers=[2, 3], draws=draws, eos=(EOS,), locore=gain,
                max_new_tokens=6,
            )  # fmt: skip
            assert tokens[row, : len(expected)].tolist() == expected
            scores = {(step, token): value for at, step, token, value in method.log if at == row}
            naive = {(step, token): s for step, record in enumerate(trace) for token, s in record["S"].items()}
            assert scores.keys() == naive.keys()
            size = max(abs(value) for value in naive.values()) if naive else 1.0
            assert all(abs(scores[key] - naive[key]) <= 1e-5 * max(size, 1.0) for key in naive)
            counted = telemetry[row][stack[-1].name]
            assert counted["rejections"] == sum(len(record["rejected"]) for record in trace)
            assert counted.get("fallbacks", 0) == sum(record["fallback"] for record in trace)
            assert counted.get("extra_backwards", 0) == len(naive)


def test_fallback_may_stay_out_of_the_history():
    """Algorithm 1 to the letter: only accepted scores are remembered."""
    model = tiny_llava(seed=0)
    inputs = make_inputs(model, PROMPTS[:2], seed=0)
    values = {"alpha": 1.3, "proposal": "greedy_order", "window": 3}
    lengths = {}
    for option, keep in (("append", True), ("skip", False)):
        tokens, _ = generate(model, [SGRS(**values, history_on_fallback=option, **LAYERS)], inputs, steps=10)
        for row, sample in enumerate(split_rows(inputs, 6)):
            expected, trace = naive_sgrs.generate(
                model, **sample, **values, top_k=5, max_resample=3, layers=[2, 3], eos=(EOS,), max_new_tokens=10,
                history_on_fallback=keep,
            )  # fmt: skip
            assert tokens[row, : len(expected)].tolist() == expected
            lengths[option, row] = len(trace[-1]["history"])
    assert any(lengths["skip", row] < lengths["append", row] for row in range(2))


def test_some_candidates_are_rejected_and_some_fall_back():
    """The comparison above would prove little if nothing were ever rejected."""
    model = tiny_llava(seed=0)
    _, telemetry = generate(model, [SGRS(alpha=0.95, window=4, **LAYERS)], make_inputs(model, PROMPTS, seed=0))
    total = {name: sum(sample["sgrs"].get(name, 0) for sample in telemetry) for name in ("rejections", "fallbacks")}
    assert total["rejections"] > 0
    assert total["fallbacks"] > 0


def test_accepting_everything_in_order_is_greedy(model):
    inputs = make_inputs(model, PROMPTS, seed=2)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    ours, telemetry = generate(model, [SGRS.identity()], inputs, steps=8)
    assert torch.equal(ours, plain[:, inputs["input_ids"].shape[1] :])
    assert all(sample["sgrs"]["rejections"] == 0 for sample in telemetry)


def test_candidate_row_is_the_documented_zero(model):
    """The official code's row: S is 0 everywhere, so every first draw passes."""
    method = Recorded(query_row="candidate", **LAYERS)
    method.log.clear()
    _, telemetry = generate(model, [method], make_inputs(model, PROMPTS, seed=2))
    assert method.log
    assert {value for *_, value in method.log} == {0.0}
    assert all(sample["sgrs"]["rejections"] == 0 for sample in telemetry)


def test_first_token_of_generated_history_is_greedy(model):
    inputs = make_inputs(model, PROMPTS, seed=6)
    tokens, telemetry = generate(model, [SGRS(history_start="generated")], inputs, steps=1)
    plain = model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=PAD)
    assert torch.equal(tokens, plain[:, -1:])
    assert all(sample["sgrs"]["gated"] == 0 for sample in telemetry)


def test_image_at_the_end_of_the_prompt(model):
    """No text after the picture: no earlier text exists at first, and the prompt's last token is an image token."""
    inputs = make_inputs(model, [(4, 1, 0), (6, 1, 0)], seed=3)
    values = {"alpha": 0.95, "proposal": "greedy_order", "window": 4, "top_k": 5, "max_resample": 3}
    tokens, _ = generate(model, [SGRS(**values, include_diagonal=False, **LAYERS)], inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        expected, trace = naive_sgrs.generate(
            model, **sample, **values, include_diagonal=False, layers=[2, 3], eos=(EOS,), max_new_tokens=6
        )
        assert trace[0]["skipped"]
        assert tokens[row, : len(expected)].tolist() == expected


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_in_every_mode_of_the_caller(model, outer):
    inputs = make_inputs(model, PROMPTS, seed=7)
    method = SGRS(alpha=0.95, **LAYERS)
    expected, _ = generate(model, [method], inputs, seed=3)
    with outer():
        fresh = {name: value.clone() for name, value in inputs.items()}
        tokens, telemetry = generate(model, [method], fresh, seed=3)
    assert torch.equal(tokens, expected)
    assert all(sample["sgrs"]["extra_backwards"] > 0 for sample in telemetry)


def test_nothing_of_the_graph_survives(model):
    inputs = make_inputs(model, PROMPTS, seed=8)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with Stack([SGRS(**LAYERS)]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=5, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True
        )
        flags = [(layer.keys.requires_grad, layer.values.requires_grad) for layer in out.past_key_values.layers]
        assert flags == [(False, False)] * 6
        assert handle.bus.last_request.frame.tape == {}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(score.requires_grad for score in out.scores)


def test_saliency_is_finite_when_one_token_is_certain(model):
    """p -> 1: the cotangent is tiny, its direction is not."""
    from types import SimpleNamespace

    logits = torch.zeros(1, 100)
    logits[0, 7] = 300.0
    weights = torch.rand(1, 100, 4, 9, dtype=torch.float64).float()

    def gradients(cotangent):
        assert cotangent.isfinite().all()
        return {0: (torch.full((1, 4, 9), 1 / 9), torch.einsum("bv,bvhk->bhk", cotangent, weights))}

    event = SimpleNamespace(logits=logits, attention_gradients=gradients)
    columns = torch.arange(9)[None] >= 4
    score = SGRS()._saliency(event, torch.tensor([7]), torch.tensor([True]), columns)
    assert score.isfinite().all()


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
    [{"alpha": -0.1}, {"top_k": 0}, {"norm": "l2"}, {"proposal": "beam"}, *({n: "x"} for n in ("reduce", "exempt"))],
)
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.sgrs.{next(iter(values))}="):
        SGRS(**values)


def test_every_switch_is_compared():
    """Guard of the table above: each option of norm and reduce occurs."""
    table = test_equals_naive_full_sequence.pytestmark[0].args[1]
    assert {case[2] for case in table} == {"row_l2", "row_l1", "row_max", "none"}
    assert {case[3] for case in table} == {"mean", "sum", "window_sum"}
    assert set(itertools.chain.from_iterable(case[:2] for case in table)) >= {"sample", "greedy_order", "generated"}


def test_logits_processors_of_the_caller_are_respected(model):
    """A token the caller forbids is neither proposed nor taken as fallback."""
    inputs = make_inputs(model, PROMPTS, seed=2)
    method = SGRS(alpha=5.0, top_k=3, **LAYERS)
    free, _ = generate(model, [method], inputs, seed=1)
    banned = sorted(set(free.flatten().tolist()) - {PAD})
    tokens, telemetry = generate(model, [method], inputs, seed=1, suppress_tokens=banned)
    assert not set(tokens.flatten().tolist()) & set(banned)
    assert sum(sample["sgrs"]["fallbacks"] for sample in telemetry) > 0
    only = [token for token in range(100) if token != 42]
    for proposal in ("sample", "greedy_order"):
        method = SGRS(alpha=5.0, top_k=3, proposal=proposal, **LAYERS)
        tokens, telemetry = generate(model, [method], inputs, steps=3, suppress_tokens=only)
        assert set(tokens.flatten().tolist()) == {42}
        assert all(sample["sgrs"]["rejections"] <= 2 for sample in telemetry)  # one candidate: nothing else to reject
