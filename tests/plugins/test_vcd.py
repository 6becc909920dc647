"""VCD against its equations by brute force, and against arithmetic worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mitigate_vcd.vcd import STEPS as DIFFUSION_STEPS
from mitigate_vcd.vcd import VCD, signal_level

from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError
from tests.plugins import reference_contrast
from tests.plugins.drive import GRID, PROMPTS, FromReference, batch, counted, fresh, generate
from tests.references.tiny import EOS, PAD, split_rows, tiny_llava

STEPS = 6
CASES: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "beta": 0.2, "noise_step": 999},
    {"alpha": 2.0, "beta": 0.05, "cut_off_from": "contrast"},
    {"alpha": 1.0, "beta": 0.0, "noise_step": 300},
    {"alpha": 0.0, "beta": 0.3},
]


def reference(model: Any, sample: dict[str, Any], values: dict[str, Any], **options: Any) -> Any:
    return reference_contrast.vcd(model, **sample, **values, **options)


def close(ours: torch.Tensor, expected: torch.Tensor, atol: float, values: dict[str, Any]) -> None:
    """Compare logits; where one is minus infinity, so is the other. The contrast multiplies rounding errors."""
    assert torch.equal(ours.isinf(), expected.isinf())
    factor = 1.0 + 2.0 * values.get("alpha", 1.0)
    torch.testing.assert_close(ours.float(), expected.float(), rtol=0, atol=atol * factor)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(seed=3).eval()


# ------------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_reference(case: int) -> None:
    """Greedy, in float32: a padded batch with one, two and no picture."""
    model = tiny_llava(seed=case, kv_heads=(2, 1, 4)[case % 3])
    inputs, values = batch(model, seed=case), CASES[case]
    names = ["left", "both", "none"]
    with Stack([VCD(**values)]).attach(model) as handle:
        settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": PAD}
        out = handle.generate(**inputs, max_new_tokens=STEPS, seed=case, sample_ids=names, **settings)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        expected = reference(model, sample, values, steps=STEPS, eos=(EOS,), seed=case, name=names[row])
        assert fresh(out, inputs)[row] == expected.tokens
        ours = torch.stack(out.logits, 1)[row, : len(expected.tokens)]
        finite = expected.logits[expected.logits.isfinite()]
        close(ours, expected.logits, 1e-5 * max(1.0, float(finite.abs().max())), values)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_reference_in_double_precision(case: int) -> None:
    model = tiny_llava(seed=case + 20).double()
    inputs, values = batch(model, seed=case), CASES[case]
    out, _ = generate(model, [VCD(**values)], inputs, STEPS)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        expected = reference(model, sample, values, steps=STEPS, eos=(EOS,), name=str(row))
        assert fresh(out, inputs)[row] == expected.tokens
        close(torch.stack(out.logits, 1)[row, : len(expected.tokens)], expected.logits, 1e-5, values)


@pytest.mark.parametrize(
    "decoding",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
        {"use_cache": False},
    ],
    ids=str,
)
def test_transformers_decoding_chooses_what_it_chooses_from_the_reference(model: Any, decoding: dict[str, Any]) -> None:
    """All beams and copies of a sample see the same noise."""
    inputs, values = batch(model, seed=1), {"alpha": 1.0, "beta": 0.05}
    settings = {"do_sample": False, **decoding, "max_new_tokens": 5, "pad_token_id": PAD}

    def logits(sample: dict[str, Any], number: int, tokens: list[int]) -> torch.Tensor:
        options = {"steps": len(tokens) + 1, "forced": tokens, "name": str(number)}
        return reference(model, sample, values, **options).logits[-1]

    torch.manual_seed(5)
    expected = model.generate(**inputs, **settings, logits_processor=[FromReference(inputs, logits)])
    with Stack([VCD(**values)]).attach(model) as handle:
        for own in (handle.generate, model.generate):
            torch.manual_seed(5)
            assert torch.equal(own(**inputs, **settings), expected)


# --------------------------------------------------------------------------------------------------------------- noise


def test_signal_level_worked_by_hand() -> None:
    """The first factor; the sum of the rates as an integral (of a sigmoid: log(1 + exp(x))); what is left at last."""
    first = 1 - (1e-5 + 4.99e-3 / (1 + math.exp(6)))
    assert signal_level(0) == pytest.approx(first, rel=1e-12)
    low, high = (-6 + 12 * t / 999 for t in (-0.5, 500.5))
    rates = 501 * 1e-5 + 4.99e-3 * (999 / 12) * (math.log1p(math.exp(high)) - math.log1p(math.exp(low)))
    assert signal_level(500) == pytest.approx(math.exp(-rates), rel=5e-4)
    assert 0.07 < signal_level(DIFFUSION_STEPS - 1) < 0.09
    levels = [signal_level(step) for step in range(0, DIFFUSION_STEPS, 50)]
    assert levels == sorted(levels, reverse=True)


def noised(method: VCD, images: list[torch.Tensor], rows: list[int], seeds: list[int]) -> list[torch.Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    state = SimpleNamespace()
    state.get = lambda name: getattr(state, name, None)
    event = SimpleNamespace(images=images, rows=rows, request=SimpleNamespace(generators=generators))
    return method.on_image_input(event, state)  # type: ignore[arg-type]


def test_the_noise_has_the_level_of_its_step() -> None:
    picture = torch.full((3, 200, 200), 2.0)
    (seen,) = noised(VCD(noise_step=500), [picture], [0], [1])
    level = signal_level(500)
    assert float(seen.mean()) == pytest.approx(2.0 * math.sqrt(level), abs=5e-3)
    assert float(seen.std()) == pytest.approx(math.sqrt(1 - level), abs=5e-3)


def test_each_picture_has_its_own_noise_from_its_samples_generator() -> None:
    blank = [torch.zeros(3, 8, 8) for _ in range(3)]
    first, second, other = noised(VCD(), blank, [0, 0, 1], [1, 2])
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(2)
    scale = math.sqrt(1 - signal_level(500))
    torch.testing.assert_close(other, scale * torch.randn(3, 8, 8, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision_sees_the_same_noise(dtype: torch.dtype) -> None:
    picture = torch.linspace(-2, 2, 192).view(3, 8, 8)
    (exact,) = noised(VCD(), [picture], [0], [1])
    (seen,) = noised(VCD(), [picture.to(dtype)], [0], [1])
    assert seen.dtype is dtype
    torch.testing.assert_close(seen.float(), exact, rtol=0, atol=0.02 if dtype is torch.bfloat16 else 2e-3)


def test_a_sample_is_the_same_alone_and_in_a_batch_and_twice(model: Any) -> None:
    inputs, names = batch(model, seed=6), ["a", "b", "c"]
    settings = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": PAD, "seed": 7}
    with Stack([VCD(alpha=2.0, beta=0.0)]).attach(model) as handle:
        together = handle.generate(**inputs, sample_ids=names, **settings)
        assert torch.equal(handle.generate(**inputs, sample_ids=names, **settings), together)
        renamed = handle.generate(**inputs, sample_ids=["x", "y", "z"], **settings)
        reseeded = handle.generate(**inputs, sample_ids=names, **{**settings, "seed": 8})
        for row, sample in enumerate(split_rows(inputs, GRID)):
            given = {name: value for name, value in sample.items() if value is not None}
            alone = handle.generate(**given, sample_ids=[names[row]], **settings)
            tokens = alone[0, given["input_ids"].shape[1] :]
            assert torch.equal(tokens, together[row, inputs["input_ids"].shape[1] :][: len(tokens)])
    for changed in (renamed, reseeded):
        assert not torch.equal(changed[:2], together[:2])
        assert torch.equal(changed[2], together[2])  # no picture, no noise


# ------------------------------------------------------------------------------------------------------- worked by hand


class Prediction(SimpleNamespace):
    """An event whose noised stream says ``noised``."""

    def branch_logits(self, name: str) -> torch.Tensor:
        assert name == "noised"
        return self.noised


def contrasted(
    method: VCD, logits: list[float], blurred: list[float], dtype: torch.dtype = torch.float32
) -> list[float]:
    roles = torch.tensor([[Role.IMAGE, Role.PROMPT]], dtype=torch.int8)
    layout = TokenLayout(roles, ((ImageSpan(image=0, positions=torch.tensor([0]), grid=(1, 1), stop=1),),), 2)
    request = SimpleNamespace(finished=torch.tensor([False]))
    ours, theirs = torch.tensor([[logits], [blurred]], dtype=dtype)
    event = Prediction(logits=ours, noised=theirs, layout=layout, request=request)
    quiet = SimpleNamespace(tracing=False, count=lambda *args: None)
    found = method.on_next_token_logits(event, quiet)  # type: ignore[arg-type]
    assert found is not None
    assert found.dtype is dtype
    return [float(value) for value in found[0]]


def test_contrast_worked_by_hand() -> None:
    # 2 l - l'; exp(-2) is above 0.1, exp(-3) is below
    logits, blurred = [2.0, 0.0, -1.0, 1.0], [3.0, 0.0, -9.0, 0.0]
    assert contrasted(VCD(), logits, blurred) == [1.0, 0.0, -math.inf, 2.0]
    # 3 l - 2 l' = [0, 0, 15, 3]: judged by itself, the least probable token of the clean stream wins
    by_itself = VCD(alpha=2.0, cut_off_from="contrast")
    assert contrasted(by_itself, logits, blurred) == [-math.inf, -math.inf, 15.0, -math.inf]
    assert contrasted(VCD(alpha=2.0, beta=0.0), logits, blurred) == [0.0, 0.0, 15.0, 3.0]


def test_double_precision_is_kept() -> None:
    assert contrasted(VCD(beta=0.0), [1 / 3], [1.0], torch.float64) == pytest.approx([-1 / 3], abs=1e-15)


# ----------------------------------------------------------------------------------------------------------- invariants


def test_identity_is_bit_exact_and_runs_nothing(model: Any) -> None:
    inputs = batch(model, seed=4)
    expected, _ = generate(model, [], inputs, STEPS)
    assert list(VCD.identity().branches()) == []
    with counted(model.lm_head) as forwards, counted(model.model.vision_tower) as towers:
        out, telemetry = generate(model, [VCD.identity()], inputs, STEPS)
    assert (len(forwards), len(towers)) == (STEPS, 1)
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))
    assert all(set(row["vcd"]) == {"seconds"} for row in telemetry)


def test_the_control_runs_no_second_stream_and_changes_no_greedy_answer(model: Any) -> None:
    inputs = batch(model, seed=4)
    expected, _ = generate(model, [], inputs, STEPS)
    with counted(model.lm_head) as forwards:
        out, telemetry = generate(model, [VCD.preset("cut_off")], inputs, STEPS)
    assert len(forwards) == STEPS
    assert torch.equal(out.sequences, expected.sequences)
    assert telemetry[0]["vcd"]["tokens_dropped"] > 0
    assert telemetry[0]["vcd"]["argmax_changed"] == 0


def test_cost_is_one_forward_per_token_and_one_more_look_at_the_picture(model: Any) -> None:
    with counted(model.lm_head) as forwards, counted(model.model.vision_tower) as towers:
        _, telemetry = generate(model, [VCD()], batch(model, PROMPTS[:2]), STEPS, eos_token_id=[])
    assert (len(forwards), len(towers)) == (2 * STEPS, 2)
    assert [row["vcd"]["extra_forwards"] for row in telemetry] == [STEPS, STEPS]
    assert [row["vcd"]["images_edited"] for row in telemetry] == [1, 2]


def test_counters_are_what_the_logits_show(model: Any) -> None:
    inputs = batch(model, seed=5)
    out, telemetry = generate(model, [VCD(alpha=2.0)], inputs, STEPS, eos_token_id=[])
    logits = torch.stack(out.logits, 1)
    for row, sample in enumerate(split_rows(inputs, GRID)):
        counters, tokens = telemetry[row]["vcd"], fresh(out, inputs)[row]
        assert counters["tokens_dropped"] == float(logits[row].isinf().sum())
        plain = reference(model, sample, {"alpha": 0.0, "beta": 0.0}, steps=STEPS, forced=tokens).logits
        assert counters["argmax_changed"] == float((plain.argmax(-1) != torch.tensor(tokens)).sum())
    assert sum(row["vcd"]["argmax_changed"] for row in telemetry) > 0


def test_trace_says_what_happened(model: Any) -> None:
    inputs = batch(model, PROMPTS[:2], seed=5)
    with Stack([VCD()]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=[], pad_token_id=PAD, trace=True
        )
        traces = handle.trace()
    chosen = out[:, inputs["input_ids"].shape[1] :]
    assert [trace.values["contrast_argmax"] for trace in traces] == chosen.T.tolist()
    assert all(1 <= count < 100 for trace in traces for count in trace.values["plausible"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", math.inf),
        ("beta", 1.1),
        ("beta", -0.1),
        ("noise_step", 1000),
        ("noise_step", -1),
        ("cut_off_from", "main"),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"methods\.vcd\.{name}="):
        VCD(**{name: value})
