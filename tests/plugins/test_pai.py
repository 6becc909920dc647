"""PAI against its equations by brute force, and against arithmetic worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mitigate_pai.pai import PAI, after_image

from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError
from tests.plugins import reference_contrast
from tests.plugins.drive import GRID, PROMPTS, FromReference, batch, counted, fresh, generate
from tests.references.tiny import EOS, PAD, split_rows, tiny_llava

STEPS = 6
CASES: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "gamma": 2.0, "layers": "all"},
    {"alpha": 1.0, "gamma": 1.5, "rows": "after_image", "guidance_on": "logits"},
    {"alpha": 1.0, "gamma": 3.0, "guidance_on": "probs", "cut_off": 0.02},
    {"alpha": 0.3, "gamma": 4.0, "cut_off": 0.3, "cut_off_from": "guided", "layers": "1-3"},
    {"alpha": 0.0, "gamma": 2.0, "cut_off": 0.0},
    {"alpha": 0.8, "gamma": 1.0, "cut_off": 0.0},
]
LAYERS = {"all": range(6), "2-": range(2, 6), "1-3": range(1, 4)}


def reference(model: Any, sample: dict[str, Any], values: dict[str, Any], **options: Any) -> Any:
    values = {**values, "layers": LAYERS[values.get("layers", "2-")]}
    return reference_contrast.pai(model, **sample, **values, **options)


def close(ours: torch.Tensor, expected: torch.Tensor, atol: float, values: dict[str, Any]) -> None:
    """Compare logits; where one is minus infinity, so is the other. Guidance multiplies rounding errors by gamma."""
    assert torch.equal(ours.isinf(), expected.isinf())
    if values.get("guidance_on") == "probs":  # the logarithm of a difference is as exact as the difference
        ours, expected = ours.double().softmax(-1), expected.double().softmax(-1)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=atol * values.get("gamma", 1.0))


def normalised(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(seed=3).eval()


# ------------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_reference(case: int) -> None:
    """Greedy, in float32: a padded batch with one, two and no picture."""
    model = tiny_llava(seed=case, kv_heads=(2, 1, 4)[case % 3])
    inputs, values = batch(model, seed=case), CASES[case]
    out, _ = generate(model, [PAI(**values)], inputs, STEPS)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        expected = reference(model, sample, values, steps=STEPS, eos=(EOS,))
        assert fresh(out, inputs)[row] == expected.tokens
        ours = torch.stack(out.logits, 1)[row, : len(expected.tokens)]
        finite = expected.logits[expected.logits.isfinite()]
        close(ours, expected.logits, 1e-5 * max(1.0, float(finite.abs().max())), values)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_reference_in_double_precision(case: int) -> None:
    model = tiny_llava(seed=case + 20).double()
    inputs, values = batch(model, seed=case), CASES[case]
    out, _ = generate(model, [PAI(**values)], inputs, STEPS)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        expected = reference(model, sample, values, steps=STEPS, eos=(EOS,))
        assert fresh(out, inputs)[row] == expected.tokens
        close(torch.stack(out.logits, 1)[row, : len(expected.tokens)], expected.logits, 1e-5, values)


@pytest.mark.parametrize(
    "decoding",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 2.0, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"use_cache": False},
    ],
    ids=str,
)
def test_transformers_decoding_chooses_what_it_chooses_from_the_reference(model: Any, decoding: dict[str, Any]) -> None:
    inputs, values = batch(model, seed=1), {"alpha": 0.5, "gamma": 2.0, "cut_off": 0.05}
    settings = {"do_sample": False, **decoding, "max_new_tokens": 5, "pad_token_id": PAD}

    def logits(sample: dict[str, Any], number: int, tokens: list[int]) -> torch.Tensor:
        return reference(model, sample, values, steps=len(tokens) + 1, forced=tokens).logits[-1]

    torch.manual_seed(5)
    expected = model.generate(**inputs, **settings, logits_processor=[FromReference(inputs, logits)])
    with Stack([PAI(**values)]).attach(model) as handle:
        for own in (handle.generate, model.generate):
            torch.manual_seed(5)
            assert torch.equal(own(**inputs, **settings), expected)


def test_every_switch_is_compared() -> None:
    for name, options in (("rows", 2), ("guidance_on", 3), ("cut_off_from", 2), ("layers", 3)):
        assert len({getattr(PAI(**case), name) for case in CASES}) == options


def test_logits_and_log_probabilities_give_the_same_distribution(model: Any) -> None:
    inputs = batch(model, seed=2)
    first, _ = generate(model, [PAI(gamma=3.0)], inputs, STEPS)
    second, _ = generate(model, [PAI(gamma=3.0, guidance_on="logits")], inputs, STEPS)
    assert torch.equal(first.sequences, second.sequences)
    close(normalised(torch.stack(first.logits)), normalised(torch.stack(second.logits)), 1e-4, {})


# ------------------------------------------------------------------------------------------------------- worked by hand


def layout_by_hand() -> TokenLayout:
    """Two pictures of two tokens with a word between; the prompt ends with column 6."""
    roles = [Role.SYSTEM, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.IMAGE, Role.IMAGE, Role.PROMPT]
    spans = (
        ImageSpan(image=0, positions=torch.tensor([1, 2]), grid=(1, 2), stop=3),
        ImageSpan(image=1, positions=torch.tensor([4, 5]), grid=(1, 2), stop=6),
    )
    return TokenLayout(torch.tensor([roles], dtype=torch.int8), (spans,), 8)


def at_rows(scores: torch.Tensor, rows: list[int]) -> Any:
    return SimpleNamespace(layout=layout_by_hand(), rows=torch.tensor(rows), layer=0, scores=scores)


def quiet() -> Any:
    return SimpleNamespace(once=lambda name, source, compute: compute(), tracing=False, count=lambda *args: None)


def test_scores_worked_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, -4.0, 1.0, -1.0, 0.0, 3.0, 1.0]).view(1, 1, 1, 8)
    raised = PAI(alpha=0.5).on_attention_scores(at_rows(scores, [7]), quiet())
    assert raised.flatten().tolist() == [1.0, 3.0, -2.0, 1.0, -0.5, 0.0, 3.0, 1.0]


def test_rows_after_the_picture_worked_by_hand() -> None:
    assert after_image(layout_by_hand()).nonzero()[:, 1].tolist() == [6, 7]


def test_a_key_the_row_cannot_see_stays_masked() -> None:
    """With alpha = 1 the minimum that stands for "masked" would become zero."""
    scores = torch.full((1, 1, 1, 8), torch.finfo(torch.float32).min)
    scores[..., :4] = 1.0
    raised = PAI(alpha=1.0).on_attention_scores(at_rows(scores, [3]), quiet())
    assert raised.flatten()[:4].tolist() == [1.0, 2.0, 2.0, 1.0]
    assert torch.equal(raised[..., 4:], scores[..., 4:])


class Prediction(SimpleNamespace):
    """An event with logits ``l`` and a text-only stream that says ``l_u``."""

    def branch_logits(self, name: str) -> torch.Tensor:
        assert name == "text"
        return self.text


def predicted(method: PAI, logits: list[float], text: list[float], dtype: torch.dtype = torch.float32) -> list[float]:
    request = SimpleNamespace(finished=torch.tensor([False]))
    ours, theirs = torch.tensor([[logits], [text]], dtype=dtype)
    event = Prediction(logits=ours, text=theirs, layout=layout_by_hand(), request=request)
    found = method.on_next_token_logits(event, quiet())  # type: ignore[arg-type]
    assert found is not None
    assert found.dtype is dtype
    return [float(value) for value in found[0]]


def test_guidance_worked_by_hand() -> None:
    # l_u + 2 (l - l_u); exp(-2) is above 0.1, exp(-3) is below
    logits, text = [2.0, 0.0, -1.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    method = PAI(gamma=2.0, guidance_on="logits")
    assert predicted(method, logits, text) == [3.0, -1.0, -math.inf, 1.0]
    # of the guided distribution only the first and (exp(-2)) the last are plausible
    method = PAI(gamma=2.0, guidance_on="logits", cut_off_from="guided")
    assert predicted(method, logits, text) == [3.0, -math.inf, -math.inf, 1.0]
    probs, alone = [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]
    method = PAI(gamma=1.5, guidance_on="probs", cut_off=0.0)
    found = predicted(method, [math.log(p) for p in probs], [math.log(p) for p in alone])
    assert [math.exp(value) for value in found] == pytest.approx([0.7, 0.3, 0.0], abs=1e-6)


def test_double_precision_is_kept() -> None:
    method = PAI(gamma=2.0, guidance_on="logits", cut_off=0.0)
    assert predicted(method, [1 / 3], [1.0], torch.float64) == pytest.approx([-1 / 3], abs=1e-15)


# ----------------------------------------------------------------------------------------------------------- invariants


def test_identity_is_bit_exact_and_runs_nothing(model: Any) -> None:
    inputs = batch(model, seed=4)
    expected, _ = generate(model, [], inputs, STEPS)
    assert list(PAI.identity().branches()) == []
    with counted(model.lm_head) as forwards:
        out, telemetry = generate(model, [PAI.identity()], inputs, STEPS)
    assert len(forwards) == STEPS
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert all(set(row["pai"]) == {"seconds"} for row in telemetry)


@pytest.mark.parametrize("preset", ["attention", "cut_off"])
def test_without_guidance_there_is_no_second_stream(model: Any, preset: str) -> None:
    with counted(model.lm_head) as forwards:
        _, telemetry = generate(model, [PAI.preset(preset)], batch(model), 3)
    assert len(forwards) == 3
    assert "extra_forwards" not in telemetry[0]["pai"]
    assert telemetry[0]["pai"].get("rows_edited", 0) == (3 * 4 if preset == "attention" else 0)


def test_samples_without_a_picture_are_left_alone(model: Any) -> None:
    inputs = batch(model, [(4, 0, 5), (3, 0, 3)], seed=4)
    expected, _ = generate(model, [], inputs, STEPS)
    with counted(model.lm_head) as forwards:
        out, _ = generate(model, [PAI(alpha=1.0, gamma=3.0)], inputs, STEPS)
    assert len(forwards) == STEPS
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_counters_are_what_the_logits_show(model: Any) -> None:
    """Row 0 and 1 have pictures; tokens dropped are those at minus infinity."""
    inputs = batch(model, seed=5)
    out, telemetry = generate(model, [PAI(alpha=0.0, gamma=4.0, cut_off=0.05)], inputs, STEPS, eos_token_id=[])
    logits = torch.stack(out.logits, 1)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        counters = telemetry[row]["pai"]
        assert counters["tokens_dropped"] == float(logits[row].isinf().sum())
        tokens = fresh(out, inputs)[row]
        plain = reference(
            model, sample, {"alpha": 0.0, "gamma": 1.0, "cut_off": 0.0}, steps=STEPS, forced=tokens
        ).logits
        assert counters["argmax_changed"] == float((plain.argmax(-1) != torch.tensor(tokens)).sum())
        assert counters["steps_edited"] == (0 if row == 2 else STEPS)
    assert sum(row["pai"]["argmax_changed"] for row in telemetry) > 0


def test_trace_says_what_happened(model: Any) -> None:
    inputs = batch(model, PROMPTS[:2], seed=5)
    with Stack([PAI(gamma=3.0)]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=2, do_sample=False, eos_token_id=[], pad_token_id=PAD, trace=True
        )
        traces = handle.trace()
    layers = [trace for trace in traces if trace.layer is not None]
    steps = [trace for trace in traces if trace.layer is None]
    assert [trace.layer for trace in layers] == [2, 3, 4, 5] * 2
    for trace in layers:
        for before, after in zip(trace.values["image_mass_before"], trace.values["image_mass"], strict=True):
            assert 0 < before < after < 1
    chosen = out[:, inputs["input_ids"].shape[1] :]
    assert [trace.values["guided_argmax"] for trace in steps] == chosen.T.tolist()
    assert all(1 <= count < 100 for trace in steps for count in trace.values["plausible"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_where_it_should(dtype: torch.dtype) -> None:
    model = tiny_llava(seed=1).to(dtype)
    out, _ = generate(model, [PAI(alpha=1.0, gamma=5.0)], batch(model), 3)
    logits = torch.stack(out.logits)
    assert not bool(logits.isnan().any())
    assert bool(logits.isfinite().any(-1).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("gamma", math.inf),
        ("gamma", 0.9),
        ("cut_off", 1.1),
        ("cut_off", -0.1),
        ("rows", "last"),
        ("guidance_on", "scores"),
        ("cut_off_from", "main"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.pai\.{name}="):
        PAI(**{name: value})
