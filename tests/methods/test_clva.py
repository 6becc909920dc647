"""CLVA's reading of its abstract: worked example, planted maps, the naive implementation, invariants."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import ClassVar

import pytest
import torch

from mitigate.adapters.llava import LlavaAdapter
from mitigate.core import Access, Fidelity, Method, ModelFacts, Phase, Point, Rows, Subscription, Tags
from mitigate.core.layout import ImageSpan
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, UnsupportedModel
from mitigate.methods.clva import CLVA
from mitigate.methods.scr import SCR
from mitigate.methods.sgrs import SGRS
from mitigate.ops.anchors import Maps, Reading, keep_anchors, mean_over_images, nearest_patches
from mitigate.ops.pull import drift_gate, mixture, score_step
from mitigate.ops.random import hashed_uniform
from mitigate.ops.similarity import (
    bhattacharyya,
    hellinger,
    jensen_shannon,
    masked_deviation,
    restricted,
    top,
)
from tests.references import naive_clva, runs
from tests.references.tiny import EOS, IMAGE, PAD, image_spans, make_inputs, split_rows, tiny_llava

# one, two and no text after the picture; one, two and no pictures; left padding
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 0), (6, 0, 5)]
STRONG = {"alpha": 2.0, "beta": 1.0, "mix": 0.6, "damp": 0.9}
FACTS = ModelFacts(family="llava", layers=6, heads=4, kv_heads=2)
#: Sets of options that take different ways through the code.
VARIANTS = {
    "logit": {},
    "prob_mix": {"operator": "prob_mix", "gate": "bhattacharyya"},
    "log_ratio": {"operator": "log_ratio", "rows": "all_text"},
    "frozen": {"refresh": "prefill"},
    "frozen_all_text": {"refresh": "prefill", "rows": "all_text", "mode": "product"},
    "embedding": {"noise_source": "embedding", "rows": "all_text", "mass": "preserve"},
    "image_mean": {"noise_source": "image_mean", "multi_image": "per_image"},
    "random": {"noise_source": "random", "scale": "mad"},
    "heads": {"anchor_unit": "heads", "heads": "visual", "pool": "mass", "rho": 0.5},
}


def generate(model, method, inputs, steps=5, **kwargs):
    return runs.generate(model, method if isinstance(method, list) else [method], inputs, steps, **kwargs)


def logits_of(out):
    return torch.stack(out.logits, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Keeps the attention weights it sees; reads only."""

    name: ClassVar[str] = "watch"
    summary: ClassVar[str] = "reads"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS}))
    seen: ClassVar[list] = []
    rows: str = "last"

    def subscriptions(self, model):
        layers = tuple(range(model.layers))
        rows = Rows(self.rows)
        return [Subscription(point=Point.ATTENTION_PROBS, layers=layers, rows=rows)]

    def on_attention_probs(self, event, state):
        self.seen.append((event.step, event.layer, event.probs.clone(), event.layout))


def watched(model, methods, inputs, **kwargs):
    Watch.seen.clear()
    generate(model, [*methods, Watch()], inputs, **kwargs)
    return {(step, layer): (probs[:, :, -1], layout) for step, layer, probs, layout in Watch.seen}


# ------------------------------------------------------------------------------------------------- the worked example

NOISE = [0.40, 0.10, 0.10, 0.30, 0.10]
MIDDLE = [0.10, 0.45, 0.25, 0.10, 0.10]
DEEP = [0.30, 0.20, 0.15, 0.25, 0.10]
SCORES = [-1.0, 0.5, 0.2, -0.8, 0.5]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def example(**values):
    columns = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    return CLVA(**values).maps(tensor(NOISE), tensor(MIDDLE), tensor([0.0] * 5), columns)


def close(ours, expected, atol=5e-5):
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=ours.dtype), rtol=0, atol=atol)


def test_worked_example_anchors_and_noise():
    maps = example()
    close(maps.anchors, [0, 1, 0.4286, 0, 0])
    close(maps.penalty, [1, 0, 0, 0.6667, 0])


def test_worked_example_gate():
    deep, noise, middle = tensor(DEEP), tensor(NOISE), tensor(MIDDLE)
    to_noise, to_middle = bhattacharyya(deep, noise), bhattacharyya(deep, middle)
    close(to_noise, [0.98417])
    close(to_middle, [0.92497])
    close(to_noise / (to_noise + to_middle), [0.5155])
    between = float(bhattacharyya(noise, middle))
    low, high = between / (1 + between), 1 / (1 + between)
    close(drift_gate(deep, noise, middle), [(float(to_noise / (to_noise + to_middle)) - low) / (high - low)])
    close(drift_gate(noise, noise, middle), [1.0])
    close(drift_gate(middle, noise, middle), [0.0])
    close(drift_gate(deep, noise, noise), [0.5])


def test_worked_example_operators():
    maps, scores = example(), tensor(SCORES)
    close(score_step(scores[:, :, 0], maps, "logit", "absmean", 0.5, 0.25), [-0.15, 0.3, 0.1286, -0.1, 0])
    close(
        score_step(scores[:, :, 0], maps, "log_ratio", "absmean", 0.5, 0.25),
        [-0.2452, 0.3147, 0.1308, -0.1996, -0.0719],
    )
    mixed = mixture(tensor(DEEP).unsqueeze(1), maps, torch.ones(1, 1, 1, dtype=torch.float64), 0.2, 0.5)
    close(mixed, [0.1565, 0.3487, 0.2165, 0.1739, 0.1043])
    close(mixed.sum(-1), [1.0], atol=1e-12)


def test_worked_example_through_the_whole_edit():
    bias, gate = CLVA().pull.score_bias(tensor(SCORES)[:, :, 0].unsqueeze(2), example())
    close(bias, [-0.15, 0.3, 0.1286, -0.1, 0])
    assert float(gate) == 1.0
    equal, _ = CLVA(heads="visual").pull.score_bias(tensor(SCORES)[:, :, 0].unsqueeze(2), example())
    assert torch.equal(bias, equal)  # a single head has the mean mass
    gated, gate = CLVA(gate="bhattacharyya").pull.score_bias(tensor(SCORES)[:, :, 0].unsqueeze(2), example())
    assert 0 < float(gate) < 1
    close(gated, (gate.flatten() * bias.flatten()).tolist(), atol=1e-12)


def test_scales():
    maps, scores = example(), tensor(SCORES)[:, :, 0]
    # lower median .2; distances 1.2, .3, 0, 1.0, .3: median .3
    close(score_step(scores, maps, "logit", "mad", 1.0, 0.0), [0, 0.3, 0.3 * 0.15 / 0.35, 0, 0])
    close(score_step(scores, maps, "logit", "none", 1.0, 1.0), [-1, 1, 0.4286, -0.6667, 0])


def test_log_ratio_is_cut_at_two():
    step = score_step(tensor(SCORES)[:, :, 0], example(), "log_ratio", "absmean", 10.0, 0.0).flatten()
    assert float(step.max()) == 2.0
    assert float(step.min()) == -2.0


@pytest.mark.parametrize(("shared", "expected"), [("keep", [1, 0, 0, 0, 0]), ("suppress", [1, 0, 0, 0.6667, 0])])
def test_noise_tokens_that_are_anchors(shared, expected):
    rise = tensor([0.0, 0.3, 0.2, 0.1, 0.0])  # the fourth token rises although the early layers look at it
    columns = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    maps = CLVA(mode="dynamics", shared_tokens=shared).maps(tensor(NOISE), tensor(MIDDLE), rise, columns)
    close(maps.anchors, [0, 1, 0.6667, 0.3333, 0])
    close(maps.penalty, expected)


def test_anchor_count_ties_and_columns():
    columns = torch.ones(1, 1, 1, 30, dtype=torch.bool)
    columns[..., 25:] = False
    scores = torch.ones(1, 1, 1, 30)
    assert keep_anchors(scores, columns, 0.10, 1).nonzero()[:, 3].tolist() == [0, 1]  # round(2.5) is 2
    assert int((keep_anchors(scores, columns, 0.10, 8) > 0).sum()) == 8
    assert int((keep_anchors(scores, columns, 1.0, 8) > 0).sum()) == 25
    assert int((keep_anchors(scores, columns, None, 1) > 0).sum()) == 25
    assert not keep_anchors(torch.zeros(1, 1, 1, 30), columns, 0.1, 8).any()


# --------------------------------------------------------------------------------------------------- the planted maps

OBJECT, SINKS, TEXT = list(range(200, 230)), [3, 77, 300, 301, 450, 570], 24


def planted(layer, generator):
    """Attention of one row, ``[1, 8, 1, K]``: object in the middle, sinks early and again in deep layers."""
    weights = torch.rand(8, 576 + TEXT, generator=generator, dtype=torch.float64) + 0.5
    middle = 13 <= layer <= 20
    weights[:, OBJECT] *= 6.0 if middle else 1.0
    weights[:, SINKS] *= 30.0 if layer <= 2 or layer >= 22 else 4.0
    return (weights / weights.sum(-1, keepdim=True)).view(1, 8, 1, -1)


def read_planted(method):
    windows, generator = method.windows(32), torch.Generator().manual_seed(0)
    columns = torch.zeros(1, 1, 1, 576 + TEXT, dtype=torch.bool)
    columns[..., :576] = True
    reading = Reading(
        columns=columns,
        windows=windows,
        pool=method.pool,
        top_heads=method.top_heads,
        normalise=method.normalise,
        head_share=method.rho if method.anchor_unit == "heads" else None,
        noise_from=lambda reading: reading.early,
        dtype=torch.float64,
    )
    for layer in range(windows.deep[0]):
        weights = planted(layer, generator)
        if layer <= windows.mid[-1]:
            reading.add(layer, weights)
    maps = method.maps(reading.noise, reading.middle, reading.rise, columns)
    return maps, planted(windows.deep[0], generator)


@pytest.mark.parametrize("mode", ["contrast", "product"])
def test_planted_object_is_found_and_no_sink(mode):
    maps, _ = read_planted(CLVA(mode=mode))
    found = (maps.anchors > 0).nonzero()[:, 3].tolist()
    assert set(OBJECT) <= set(found)
    assert not set(SINKS) & set(found)
    assert len(found) <= 58
    assert set(SINKS) <= set((maps.penalty > 0.5).nonzero()[:, 3].tolist())


@pytest.mark.parametrize(
    ("operator", "scale"), [("logit", "absmean"), ("logit", "mad"), ("logit", "none"), ("log_ratio", "none")]
)
def test_planted_deep_mass_moves_to_the_object(operator, scale):
    maps, deep = read_planted(CLVA())
    scores, object_mass, sink_mass = deep.log(), [], []
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0):
        pull = CLVA(operator=operator, scale=scale, alpha=strength, beta=strength).pull
        bias, _ = pull.score_bias(scores, maps)
        weights = (scores + bias).softmax(-1).mean(1).flatten()
        image = weights[:576] / weights[:576].sum()
        object_mass.append(float(image[OBJECT].sum()))
        sink_mass.append(float(image[SINKS].sum()))
    assert sorted(set(object_mass)) == object_mass
    assert sorted(set(sink_mass), reverse=True) == sink_mass


def test_planted_mass_moves_with_prob_mix():
    maps, deep = read_planted(CLVA())
    object_mass, sink_mass = [], []
    for strength in (0.0, 0.1, 0.3, 0.6, 1.0):
        new, _ = CLVA(operator="prob_mix", mix=strength, damp=strength).pull.mixed(deep, maps)
        image = new.mean(1).flatten()[:576]
        object_mass.append(float((image / image.sum())[OBJECT].sum()))
        sink_mass.append(float((image / image.sum())[SINKS].sum()))
        torch.testing.assert_close(new.sum(-1), deep.sum(-1))
    assert sorted(set(object_mass)) == object_mass
    assert sorted(set(sink_mass), reverse=True) == sink_mass


def test_reading_takes_means_over_layers():
    """E = 0-1, M = 3: n is a mean of two maps, d of the two increments above layer 1."""
    columns = torch.tensor([True, True, False]).view(1, 1, 1, 3)
    options = {"pool": "mean", "top_heads": 1.0, "normalise": True, "head_share": None, "dtype": torch.float64}
    windows = CLVA(early="0-1", mid="3", deep="5").windows(6)
    reading = Reading(columns=columns, windows=windows, noise_from=lambda reading: reading.early, **options)
    for layer, share in enumerate([0.9, 0.5, 0.6, 0.4]):
        reading.add(layer, torch.tensor([share / 2, (1 - share) / 2, 0.5], dtype=torch.float64).view(1, 1, 1, 3))
    close(reading.noise, [0.7, 0.3, 0.0], atol=1e-9)
    close(reading.middle, [0.4, 0.6, 0.0], atol=1e-9)
    close(reading.rise, [0.1 / 2, 0.2 / 2, 0.0], atol=1e-9)


def test_a_sink_in_both_maps_is_never_an_anchor():
    columns = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noise, middle = (torch.rand(1, 1, 1, 40, generator=generator) for _ in range(2))
        noise[..., 7] = middle[..., 7] = 20.0
        maps = CLVA(rho=1.0).maps(noise, middle, torch.zeros_like(noise), columns)
        assert maps.anchors[..., 7] == 0
        assert maps.penalty[..., 7] == 0
        assert (maps.anchors > 0).any()


# -------------------------------------------------------------------------------------------------- the naive reference


def unequal(images):
    """Cut images of 36 tokens unequally, leaving tokens over; the second image has two tiles."""
    spans = []
    for index, columns in enumerate(images):
        if index == 0:
            spans.append((columns[:24], 0, (4, 6)) if len(images) > 1 else (columns[:30], 0, (5, 6)))
        else:
            spans += [(columns[:18], index, (3, 6)), (columns[18:], index, (6, 3))]
    return spans


@pytest.fixture
def unequal_images(monkeypatch):
    original = LlavaAdapter.image_spans

    def spans(self, row, batch):
        first = batch.pictures
        cut = unequal([span.positions.tolist() for span in original(self, row, batch)])
        return [ImageSpan(first + image, torch.tensor(columns), grid, columns[-1] + 1) for columns, image, grid in cut]

    monkeypatch.setattr(LlavaAdapter, "image_spans", spans)


@pytest.fixture(scope="module")
def double():
    return tiny_llava(seed=5).double()


@pytest.fixture(scope="module")
def double_inputs(double):
    inputs = make_inputs(double, PROMPTS, seed=5)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    return inputs


def drawn(row, columns):
    """Noise of the random control: one number per image token, counted from the sample's first."""
    seed = int.from_bytes(hashlib.sha256(f"0:{row}:0".encode()).digest()[:8], "big") >> 1
    draw = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    return {column: float(hashed_uniform(draw, place + 1)) for place, column in enumerate(sorted(columns))}


def assert_equals_naive(model, inputs, values, cut, steps=3):
    out, _ = generate(model, CLVA(**STRONG | values), inputs, steps=steps)
    fresh, ours = out.sequences[:, inputs["input_ids"].shape[1] :], logits_of(out)
    windows = CLVA(**values).windows(6)
    layers = {part: getattr(windows, part) for part in ("early", "mid", "deep")}
    settings = naive_clva.Settings(**STRONG | values | layers)
    for row, sample in enumerate(split_rows(inputs, 6)):
        images = image_spans(model, sample["input_ids"], int((sample["input_ids"] == IMAGE).sum()) // 36)
        spans = cut(images)
        draw = drawn(row, [column for columns, _, _ in spans for column in columns])
        tokens, logits = naive_clva.generate(
            model, **sample, settings=settings, spans=spans, max_new_tokens=steps, eos=(EOS,), noise_draw=draw
        )
        assert fresh[row, : len(tokens)].tolist() == tokens
        torch.testing.assert_close(ours[row, : len(tokens)], logits.float(), rtol=0, atol=1e-5)


SWITCHES = [
    {"mode": "contrast"},
    {"mode": "dynamics"},
    {"mode": "product"},
    {"gamma": 0.4, "shared_tokens": "suppress"},
    {"gamma": 0.4, "shared_tokens": "keep", "rho": 0.3, "min_anchors": 2},
    {"mode": "dynamics", "shared_tokens": "suppress", "min_anchors": 1},
    {"anchor_unit": "heads", "rho": 0.5},
    {"anchor_unit": "heads", "mode": "dynamics", "pool": "mass", "rho": 0.1, "early": "0-1"},
    {"anchor_unit": "heads", "pool": "top", "top_heads": 0.25, "rho": 0.5},
    {"pool": "mass"},
    {"pool": "top", "top_heads": 0.5, "gate": "bhattacharyya"},
    {"normalise": False},
    {"normalise": False, "gate": "bhattacharyya", "mode": "product", "pool": "mass"},
    {"noise_source": "embedding"},
    {"noise_source": "embedding", "rows": "all_text", "operator": "log_ratio"},
    {"noise_source": "image_mean"},
    {"noise_source": "image_mean", "multi_image": "per_image", "rows": "all_text"},
    {"noise_source": "random", "gate": "bhattacharyya"},
    {"scale": "mad"},
    {"scale": "none", "mass": "preserve"},
    {"mass": "preserve", "heads": "visual"},
    {"mass": "grow", "multi_image": "per_image"},
    {"gate": "bhattacharyya", "gate_input": "edited"},
    {"operator": "log_ratio"},
    {"operator": "log_ratio", "mass": "preserve", "gate": "bhattacharyya", "multi_image": "per_tile"},
    {"operator": "prob_mix"},
    {"operator": "prob_mix", "gate": "bhattacharyya", "gate_input": "edited", "heads": "visual"},
    {"operator": "prob_mix", "mode": "dynamics", "rows": "all_text", "multi_image": "per_image"},
    {"operator": "prob_mix", "multi_image": "per_tile", "refresh": "prefill", "mass": "preserve"},
    {"rows": "all_text", "mass": "preserve"},
    {"refresh": "prefill"},
    {"refresh": "prefill", "rows": "all_text", "noise_source": "embedding"},
    {"multi_image": "per_tile", "gate": "bhattacharyya"},
    {"early": "0-1", "mid": "2", "deep": "3-5", "mode": "dynamics"},
    {"mid": "final", "deep": "final"},
]


@pytest.mark.parametrize("values", SWITCHES, ids=lambda values: "-".join(str(value) for value in values.values()))
def test_equals_naive_with_unequal_images(double, double_inputs, unequal_images, values):
    """In float64, to 1e-5; image tokens that are no patch are left alone."""
    assert_equals_naive(double, double_inputs, values, unequal)


@pytest.mark.parametrize("values", [{}, {"operator": "prob_mix", "rows": "all_text"}])
def test_equals_naive_with_plain_images(double, double_inputs, values):
    """The row that predicts can be an image token itself."""
    whole = lambda images: [(columns, index, (6, 6)) for index, columns in enumerate(images)]  # noqa: E731
    assert_equals_naive(double, double_inputs, values, whole, steps=4)


def test_every_option_is_compared():
    from mitigate.methods.clva import _OPTIONS

    compared = {(name, value) for values in SWITCHES for name, value in values.items()}
    defaults = {(name, getattr(CLVA(), name)) for name in _OPTIONS}
    wanted = {(name, option) for name, options in _OPTIONS.items() for option in options}
    assert wanted - compared - defaults == {("no_grid", "refuse")}


# ------------------------------------------------------------------------------------------------------ every way in


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", [{"use_cache": False}, {"prefill_chunk_size": 11}, {"cache_implementation": "static"}])
def test_caches_and_chunks_change_nothing(model, variant, way):
    inputs = make_inputs(model, PROMPTS[:3], seed=3)
    method = CLVA(**STRONG | VARIANTS[variant])
    cached, _ = generate(model, method, inputs)
    other, _ = generate(model, method, inputs, **way)
    plain, _ = generate(model, [], inputs)
    assert torch.equal(cached.sequences, other.sequences)
    torch.testing.assert_close(logits_of(cached), logits_of(other), rtol=0, atol=2e-4)
    assert float((logits_of(plain)[:, 0] - logits_of(cached)[:, 0]).abs().max()) > 0.01


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "random"])
def test_batch_equals_one_by_one(model, variant):
    inputs = make_inputs(model, PROMPTS, seed=4)
    method = CLVA(**STRONG | VARIANTS[variant])
    together, _ = generate(model, method, inputs)
    for row, sample in enumerate(split_rows(inputs, 6)):
        given = {name: value for name, value in sample.items() if value is not None}
        alone, _ = generate(model, method, given)
        count = len(alone.logits)
        torch.testing.assert_close(logits_of(together)[row, :count], logits_of(alone)[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_equal_beams_one_by_one(model, variant):
    inputs = make_inputs(model, PROMPTS[:3], seed=6)
    method = CLVA(**STRONG | VARIANTS[variant])

    def beams(given, ids):
        with Stack([method]).attach(model) as handle:
            options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD}
            return handle.generate(**given, **options, sample_ids=ids)[:, given["input_ids"].shape[1] :]

    together = beams(inputs, ["a", "b", "c"])
    for row, sample in enumerate(split_rows(inputs, 6)):
        alone = beams({name: value for name, value in sample.items() if value is not None}, ["abc"[row]])
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_that_change_places_keep_their_maps(model, variant):
    """Without a cache every past row is edited anew in the beam it now belongs to."""
    inputs = make_inputs(model, PROMPTS[:3], seed=6)
    with Stack([CLVA(**STRONG | VARIANTS[variant])]).attach(model) as handle:
        options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD}
        cached, uncached = (
            handle.generate(**inputs, **options, use_cache=cache, return_dict_in_generate=True, output_scores=True)
            for cache in (True, False)
        )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("operator", ["logit", "prob_mix"])
def test_finished_samples_are_not_counted(model, operator):
    inputs = make_inputs(model, PROMPTS[:3], seed=7)
    method = CLVA(operator=operator, gate="bhattacharyya")
    out, full = generate(model, method, inputs, steps=4, eos_token_id=[])
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    end = fresh[0][0]
    _, short = generate(model, method, inputs, steps=4, eos_token_id=[end])
    lengths = [row.index(end) + 1 if end in row else 4 for row in fresh]
    assert max(lengths) == 4
    for row, length in enumerate(lengths):
        assert short[row]["clva"]["anchor_rows"] == length
        assert short[row]["clva"]["layers_edited"] == 2 * length
        for counter in ("gate", "image_mass_before", "image_mass_after"):  # none is above 1 per row and layer
            assert short[row]["clva"][counter] <= short[row]["clva"]["layers_edited"]
        for counter in ("anchors", "gate", "image_mass_before", "image_mass_after"):
            assert (short[row]["clva"][counter] < full[row]["clva"][counter]) == (length < 4)


@pytest.mark.parametrize("rows", ["last", "predictors", "all"])
def test_rows_others_ask_for_are_left_alone(model, rows):
    inputs = make_inputs(model, PROMPTS, seed=8)
    for variant in ("logit", "prob_mix", "frozen_all_text"):
        method = CLVA(**STRONG | VARIANTS[variant])
        alone, _ = generate(model, method, inputs, use_cache=False)
        shared, _ = generate(model, [Watch(rows=rows), method], inputs, use_cache=False)
        torch.testing.assert_close(logits_of(alone), logits_of(shared), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize(
    "method",
    [
        CLVA.identity(),
        CLVA(alpha=0.0, beta=0.0, gate="bhattacharyya"),
        CLVA(alpha=0.0, beta=0.0, operator="log_ratio", mass="preserve"),
        CLVA(mix=0.0, damp=0.0, operator="prob_mix", gate="bhattacharyya"),
    ],
    ids=["identity", "logit", "log_ratio", "prob_mix"],
)
def test_without_strength_bit_identical(model, method):
    inputs = make_inputs(model, PROMPTS, seed=1)
    plain, _ = generate(model, [], inputs)
    ours, telemetry = generate(model, method, inputs)
    assert torch.equal(logits_of(plain), logits_of(ours))
    assert set(telemetry[0]["clva"]) == {"seconds"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_without_image_is_untouched(model, variant):
    inputs = make_inputs(model, PROMPTS, seed=1)
    plain, _ = generate(model, [], inputs)
    ours, telemetry = generate(model, CLVA(**STRONG | VARIANTS[variant]), inputs)
    assert torch.equal(logits_of(plain)[3], logits_of(ours)[3])
    assert telemetry[3]["clva"]["layers_edited"] == telemetry[3]["clva"].get("rows_edited", 0) == 0
    assert telemetry[0]["clva"]["rows_edited"] > 0
    text = make_inputs(model, [(4, 0, 3), (6, 0, 1)], seed=1)
    plain, _ = generate(model, [], text)
    ours, _ = generate(model, CLVA(**STRONG | VARIANTS[variant]), text)
    assert torch.equal(logits_of(plain), logits_of(ours))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_sum_to_one(model, variant):
    seen = watched(model, [CLVA(**STRONG | VARIANTS[variant])], make_inputs(model, PROMPTS, seed=2))
    assert {layer for _, layer in seen} == set(range(6))
    for probs, _ in seen.values():
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs.sum(-1)), rtol=0, atol=1e-5)
        assert (probs >= 0).all()


@pytest.mark.parametrize("values", [{"operator": "prob_mix"}, {"operator": "logit", "mass": "preserve"}])
def test_text_keeps_its_attention(model, values):
    inputs = make_inputs(model, PROMPTS, seed=2)
    plain, ours = (watched(model, methods, inputs, steps=1) for methods in ([], [CLVA(**STRONG | values)]))
    before, layout = plain[0, 4]
    after, _ = ours[0, 4]
    text = ~layout.image_mask[:, None].expand_as(before)
    if values["operator"] == "prob_mix":
        assert torch.equal(before[text], after[text])
    torch.testing.assert_close(before[text], after[text], rtol=1e-4, atol=1e-6)
    assert float((before - after).abs().max()) > 0.01


@pytest.mark.parametrize("term", ["alpha", "beta"])
def test_monotone_in_strength(model, term):
    """More alpha: more attention to anchors; more beta: less to noise tokens (first edited layer, same anchors)."""
    inputs = make_inputs(model, PROMPTS[:3], seed=2)
    masses = []
    for strength in (0.0, 0.25, 0.5, 1.0, 2.0):
        values = {"alpha": 0.0, "beta": 0.0, term: strength, "scale": "absmean"}
        seen = watched(model, [CLVA(**values)], inputs, steps=1)
        marks = anchors_of(model, inputs)["anchor_score" if term == "alpha" else "noise_score"] > 0
        probs = seen[0, 4][0].mean(1)
        masses.append((probs * marks).sum(-1) * (1 if term == "alpha" else -1))
    steps = torch.stack(masses).diff(dim=0)
    assert (steps > 0).all()


def anchors_of(model, inputs):
    with Stack([CLVA()]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD, trace=True)
        found = next(entry for entry in handle.trace() if "anchors" in entry.values)
    return {name: torch.tensor(value) for name, value in found.values.items()}


def test_nothing_is_left_of_an_earlier_request(model):
    first, second = make_inputs(model, PROMPTS, seed=1), make_inputs(model, [(2, 1, 3), (3, 2, 2)], seed=2)
    for variant in ("frozen", "embedding", "random"):
        method = CLVA(**STRONG | VARIANTS[variant])
        options = {"max_new_tokens": 3, "pad_token_id": PAD, "return_dict_in_generate": True, "output_logits": True}
        with Stack([method]).attach(model) as handle:
            fresh = handle.generate(**second, **options)
            handle.generate(**first, **options)
            again = handle.generate(**second, **options)
        assert torch.equal(logits_of(fresh), logits_of(again))


def test_composes_with_scr_in_both_orders(model):
    inputs = make_inputs(model, PROMPTS[:3], seed=3)
    scr, clva = SCR(lam=1.6, k_src=4), CLVA(**STRONG)
    one, _ = generate(model, [scr, clva], inputs)
    other, telemetry = generate(model, [clva, scr], inputs)
    alone = [generate(model, method, inputs)[0] for method in (scr, clva)]
    off, _ = generate(model, [scr, CLVA.identity()], inputs)
    assert torch.equal(logits_of(one), logits_of(other))
    assert torch.equal(logits_of(off), logits_of(alone[0]))
    for single in alone:
        assert float((logits_of(one)[:, 0] - logits_of(single)[:, 0]).abs().max()) > 1e-3
    assert telemetry[0]["clva"]["rows_edited"] > 0
    assert telemetry[0]["scr"]["tokens_edited"] > 0


@pytest.mark.parametrize("operator", ["logit", "prob_mix"])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_pass_and_stay_finite(model, operator, first):
    inputs = make_inputs(model, PROMPTS[:3], seed=3)
    clva, sgrs = CLVA(**STRONG, operator=operator, gate="bhattacharyya"), SGRS(alpha=0.95, layers="0-5")
    out, telemetry = generate(model, [clva, sgrs] if first else [sgrs, clva], inputs, steps=3)
    assert torch.isfinite(logits_of(out)).all()
    assert telemetry[0]["sgrs"]["extra_backwards"] > 0
    assert telemetry[0]["clva"]["rows_edited"] > 0


# ------------------------------------------------------------------------------------------ what a reader gets to see


def test_counters_and_trace_say_what_happened(model):
    inputs = make_inputs(model, PROMPTS, seed=7)
    with Stack([CLVA(**STRONG, gate="bhattacharyya"), Watch()]).attach(model) as handle:
        Watch.seen.clear()
        handle.generate(**inputs, max_new_tokens=3, pad_token_id=PAD, trace=True, eos_token_id=[])
        telemetry, traces = handle.telemetry(), [entry for entry in handle.trace() if entry.method == "clva"]
    found = [entry for entry in traces if "anchors" in entry.values]
    edits = [entry for entry in traces if "gate" in entry.values]
    assert [(entry.step, entry.layer) for entry in found] == [(step, 3) for step in range(3)]
    assert [(entry.step, entry.layer) for entry in edits] == [(step, layer) for step in range(3) for layer in (4, 5)]
    width = inputs["input_ids"].shape[1]
    images = inputs["input_ids"] == IMAGE
    for entry in found:
        anchors = torch.tensor(entry.values["anchors"])
        score, noise = torch.tensor(entry.values["anchor_score"]), torch.tensor(entry.values["noise_score"])
        assert anchors.shape == score.shape == noise.shape == (4, width + entry.step)
        assert torch.equal(anchors, score > 0)
        assert not (anchors[:, :width] & ~images).any()
        assert not (anchors & (noise > 0)).any()
        assert anchors.sum(1).tolist()[3] == 0
        assert anchors.any(1).tolist() == [True, True, True, False]
    for row in range(4):
        counted = telemetry[row]["clva"]
        assert counted["anchors"] == sum(sum(entry.values["anchors"][row]) for entry in found)
        assert counted["anchor_rows"] == (3 if row < 3 else 0)
        assert counted["layers_edited"] == (6 if row < 3 else 0)
        gates = sum(entry.values["gate"][row] for entry in edits) if row < 3 else 0.0
        assert counted["gate"] == pytest.approx(gates, abs=1e-5)
        after = sum(
            float((probs[row, :, -1] * layout.image_mask[row]).sum(-1).mean())
            for _, layer, probs, layout in Watch.seen
            if layer >= 4
        )
        assert counted["image_mass_after"] == pytest.approx(after if row < 3 else 0.0, abs=1e-4)
    assert any(abs(value) > 0.01 for entry in edits for value in entry.values["bias"][0])


def test_a_sample_s_gate_does_not_depend_on_others(model):
    """The mean is over the sample's own pictures, however many another sample has."""
    method = CLVA(**STRONG, gate="bhattacharyya", multi_image="per_image")
    inputs = make_inputs(model, PROMPTS, seed=7)
    _, together = generate(model, method, inputs, steps=1)
    for row, sample in enumerate(split_rows(inputs, 6)):
        alone = {name: value for name, value in sample.items() if value is not None}
        counted = generate(model, method, alone, steps=1)[1][0]["clva"]
        assert counted.get("gate", 0.0) == pytest.approx(together[row]["clva"]["gate"], abs=1e-5)


def test_image_mass_grows_or_stays(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=7)
    for values, grows in [({}, True), ({"mass": "preserve"}, False), ({"operator": "prob_mix"}, False)]:
        _, telemetry = generate(model, CLVA(alpha=2.0, beta=0.0, mix=0.5, **values), inputs)
        counted = telemetry[0]["clva"]
        if grows:
            assert counted["image_mass_after"] > counted["image_mass_before"] + 0.01
        else:
            assert counted["image_mass_after"] == pytest.approx(counted["image_mass_before"], abs=1e-4)


# ------------------------------------------------------------------------------------------- parameters and geometry


@pytest.mark.parametrize(
    ("depth", "early", "mid", "deep"),
    [
        (32, (0, 2), (13, 20), (22, 31)),
        (40, (0, 2), (16, 25), (28, 39)),
        (28, (0, 1), (11, 17), (20, 27)),
        (8, (0, 0), (3, 4), (6, 7)),
        (6, (0, 0), (2, 3), (4, 5)),
        (3, (0, 0), (1, 1), (2, 2)),
    ],
)
def test_windows_follow_the_depth(depth, early, mid, deep):
    windows = CLVA().windows(depth)
    for layers, (first, last) in zip((windows.early, windows.mid, windows.deep), (early, mid, deep), strict=True):
        assert layers == tuple(range(first, last + 1))


def test_final_windows():
    windows = CLVA.preset("final_layers").windows(32)
    assert (windows.mid, windows.deep) == (tuple(range(21, 29)), (29, 30, 31))
    late = CLVA.preset("mid_layers_late_edit").windows(32)
    assert (late.mid, late.deep) == (tuple(range(13, 21)), windows.deep)


@pytest.mark.parametrize(
    "values", [{"early": "3"}, {"mid": "4-5"}, {"deep": "3-5"}, {"early": "0-2"}, {"mid": "0-1"}, {"deep": "1"}]
)
def test_windows_out_of_order_are_refused(values):
    with pytest.raises(ConfigError, match=r"methods.clva: early .* must follow one another"):
        CLVA(**values).subscriptions(FACTS)


@pytest.mark.parametrize("depth", [1, 2])
def test_two_layers_are_too_few(depth):
    with pytest.raises(ConfigError, match="must follow one another"):
        CLVA().windows(depth)


def test_it_reads_and_writes_only_what_it_needs():
    plain = CLVA().subscriptions(FACTS)
    assert [(item.point, item.access, item.layers) for item in plain] == [
        (Point.ATTENTION_PROBS, Access.READ, (0, 2, 3)),
        (Point.ATTENTION_SCORES, Access.WRITE, (4, 5)),
    ]
    assert CLVA(mode="dynamics").subscriptions(FACTS)[0].layers == (0, 1, 2, 3)
    assert CLVA(refresh="prefill").subscriptions(FACTS)[0].phases == {Phase.PREFILL}
    assert CLVA(operator="prob_mix").subscriptions(FACTS)[1].point is Point.ATTENTION_PROBS


def test_models_without_a_grid():
    facts = dataclasses.replace(FACTS, family="instructblip", spatial_grid=False)
    with pytest.warns(UserWarning, match="instructblip"):
        CLVA().subscriptions(facts)
    with pytest.raises(UnsupportedModel, match="no_grid=refuse"):
        CLVA(no_grid="refuse").subscriptions(facts)


def test_presets_and_ablations():
    assert CLVA.fidelity is Fidelity.FROM_ABSTRACT
    assert CLVA.preset("paper") == CLVA.preset("abstract") == CLVA()
    assert CLVA.preset("anchors_only", alpha=1.0) == CLVA(alpha=1.0, beta=0.0, damp=0.0)
    assert CLVA.preset("suppression_only") == CLVA(alpha=0.0, mix=0.0)
    own = CLVA(alpha=1.0, normalise=False)
    variants = own.ablations({})
    assert set(variants) == {
        "anchors_only",
        "suppression_only",
        "final_layers",
        "mid_layers_late_edit",
        "random_noise",
    }
    assert variants["anchors_only"] == CLVA(alpha=1.0, normalise=False, beta=0.0, damp=0.0)
    assert len({str(method) for method in variants.values()}) == 5
    for method in variants.values():
        method.subscriptions(FACTS)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": -0.1},
        {"beta": float("nan")},
        {"gamma": float("inf")},
        {"rho": 1.5},
        {"min_anchors": 0},
        {"mix": 2.0},
        {"damp": -1.0},
        {"top_heads": -0.5},
        {"mode": "static"},
        {"gate": "cosine"},
        {"operator": "hidden"},
        {"anchor_unit": "features"},
        {"normalise": False, "noise_source": "random"},
        {"mass": "grow", "operator": "prob_mix"},
    ],
)
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.clva.{next(iter(values))}="):
        CLVA(**values)


# ------------------------------------------------------------------------------------------------- functions on maps


def test_likeness_of_distributions():
    left, right = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    close(bhattacharyya(left, right), [0.5])
    close(hellinger(left, right), [0.5**0.5])
    close(jensen_shannon(left, right), [0.5 * torch.log(torch.tensor(2.0)).item()])
    far = torch.tensor([0.0, 0.0, 1.0])
    near = torch.tensor([1.0, 0.0, 0.0])
    close(torch.stack([f(near, far) for f in (bhattacharyya, hellinger, jensen_shannon)]), [0, 1, 0.6931])
    close(torch.stack([f(near, near) for f in (bhattacharyya, hellinger, jensen_shannon)]), [1, 0, 0])


def test_restriction_keeps_nothing_where_there_is_nothing():
    share, mass = restricted(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[True, True, False]]))
    close(share, [0.4, 0.6, 0.0])
    close(mass, [0.5])
    share, mass = restricted(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[False, False, False]]))
    assert not share.any()
    assert not mass.any()


def test_top_prefers_the_first_of_equals():
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert top(values, torch.tensor([2, 3])).tolist() == [[False, True, True, False], [True, True, True, False]]


def test_deviation_ignores_other_columns():
    values = torch.tensor([[5.0, 1.0, 2.0, 100.0, 4.0]])
    # 1 2 4 5: lower median 2; distances 1 0 2 3: lower median 1
    close(masked_deviation(values, torch.tensor([[True, True, True, False, True]])), [1.0])
    close(masked_deviation(values, torch.zeros(1, 5, dtype=torch.bool)), [0.0])


def test_nearest_patches_between_grids():
    small, large = (
        ImageSpan(0, torch.arange(rows * columns), (rows, columns), 0) for rows, columns in ((2, 2), (4, 2))
    )
    assert nearest_patches(small, large) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert nearest_patches(large, small) == [2, 3, 6, 7]
    flat = ImageSpan(0, torch.arange(2), None, 0)
    assert nearest_patches(flat, small) == [0, 0, 1, 1]


def test_mean_over_images_keeps_each_image_s_mass():
    spans = [(ImageSpan(0, torch.tensor([0, 1]), (1, 2), 2), ImageSpan(1, torch.tensor([2, 3]), (1, 2), 4))]
    maps = torch.tensor([0.1, 0.3, 0.45, 0.15]).view(1, 1, 1, 4)
    columns = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    close(mean_over_images(maps, columns, spans), [0.4 * 0.5, 0.4 * 0.5, 0.6 * 0.5, 0.6 * 0.5])


def test_damping_that_would_empty_a_map_leaves_it():
    columns = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    zero, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    maps = Maps(columns, zero, zero, zero, one)
    shares = torch.tensor([0.3, 0.7]).view(1, 1, 1, 1, 2)
    close(mixture(shares, maps, torch.ones(1, 1, 1), 0.5, 1.0), [0.3, 0.7])


def test_rows_without_anchors_or_noise_keep_their_weights_bit_for_bit():
    columns = torch.ones(1, 1, 2, 7, dtype=torch.bool)
    zero = torch.zeros(1, 1, 2, 7)
    anchors = zero.clone()
    anchors[:, :, 1, 3] = 1.0
    weights = torch.rand(1, 4, 2, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    new, _ = CLVA(operator="prob_mix").pull.mixed(weights[..., :7], Maps(columns, zero, zero, anchors, zero))
    assert torch.equal(new[:, :, 0], weights[:, :, 0, :7])
    assert (new[:, :, 1, 3] > weights[:, :, 1, 3]).all()


def test_a_closed_gate_keeps_weights_bit_for_bit():
    """Where the deep map is the middle one, nothing is mixed in and nothing is rounded anew."""
    columns, zero = torch.ones(1, 1, 1, 7, dtype=torch.bool), torch.zeros(1, 1, 1, 7)
    weights = torch.rand(1, 1, 1, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)[..., :7]
    noise, anchors, penalty = zero.clone(), zero.clone(), zero.clone()
    noise[..., 0] = anchors[..., 3] = penalty[..., 0] = 1.0
    maps = Maps(columns, noise, weights / weights.sum(), anchors, penalty)
    for gate, same in (("bhattacharyya", True), ("none", False)):
        new, found = CLVA(operator="prob_mix", gate=gate).pull.mixed(weights, maps)
        assert torch.equal(new, weights) is same
        assert float(found) == float(not same)
