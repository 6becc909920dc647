"""D-LEAF against the naive implementation of its reconstruction, its worked examples and its invariants."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from mitigate.adapters.llava import LlavaAdapter
from mitigate.core import (
    AttentionProbs,
    AttentionScores,
    Method,
    MethodState,
    ModelFacts,
    Phase,
    Point,
    Rows,
    Subscription,
    Tags,
)
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError
from mitigate.methods.dleaf import DLEAF
from mitigate.ops import entropy as ops
from tests.references import naive_dleaf, runs
from tests.references.tiny import PAD, make_inputs, split_rows, tiny_llava

# left padding; two pictures; a picture at the end of the prompt; no picture at all
PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 0), (4, 0, 5)]
STEPS = 4

#: Parameters -> every option of every switch appears at least once away from the default.
VARIANTS = [
    {},
    {"gamma": 0.3},
    {"gamma": 1.0},
    {"rows": "all_generated"},
    {"rows": "all_text"},
    {"rows": "all_text", "prefill": "none", "mix_scope": "image_slice"},
    {"prefill": "none"},
    {"diagnosis_weights": "pre_softmax"},
    {"diagnosis_weights": "pre_softmax", "mix_stage": "pre", "reference": "iaf_weighted"},
    {"renormalise_image": False},
    {"renormalise_image": False, "pool_heads": "max"},
    {"renormalise_image": False, "pool_heads": "mean_of_entropies"},
    {"pool_heads": "renorm_mean"},
    {"pool_heads": "max"},
    {"pool_heads": "mean_of_entropies"},
    {"entropy_scale": "normalised", "delta": -0.1},
    {"entropy_scale": "normalised", "multi_image": "per_image", "delta": -0.1},
    {"delta": 0.2},
    {"threshold": "running_mean"},
    {"threshold": "mean_plus_kstd", "k_std": 0.3},
    {"threshold": "ema", "ema_decay": 0.3},
    {"threshold": "fixed", "fixed_threshold": 2.7, "delta": 0.2},
    {"threshold": "fixed", "fixed_threshold": 0.8, "entropy_scale": "normalised", "first_layer": "eligible"},
    {"bas_scope": "sample"},
    {"bas_scope": "sample", "rows": "all_text"},
    {"bas_scope": "sample", "threshold": "running_mean", "rows": "all_text"},
    {"bas_scope": "sample", "threshold": "ema", "prefill": "none", "layers": "1-4"},
    {"first_layer": "eligible"},
    {"first_layer": "eligible", "threshold": "mean_plus_kstd", "state_update": "post"},
    {"state_update": "post"},
    {"state_update": "post", "mix_stage": "pre", "threshold": "running_mean"},
    {"abnormal_heads": "bottom_k", "bottom_k": 2},
    {"abnormal_heads": "bottom_k", "bottom_k": 9},
    {"abnormal_heads": "ratio_of_best", "best_ratio": 0.9},
    {"abnormal_heads": "below_median"},
    {"reference": "topk_mean", "top_k": 2},
    {"reference": "topk_mean", "top_k": 9},
    {"reference": "iaf_weighted"},
    {"reference_scope": "earlier"},
    {"reference_scope": "earlier", "reference": "topk_mean", "top_k": 2, "mix_stage": "pre"},
    {"mix_scope": "image_slice"},
    {"mix_scope": "image_slice", "mix_stage": "pre"},
    {"mix_stage": "pre"},
    {"layers": "2-4", "threshold": "running_mean"},
    {"multi_image": "per_image"},
    {"multi_image": "per_image", "pool_heads": "mean_of_entropies", "rows": "all_text"},
    {"exclude_image_sinks": "outliers", "sink_std": 1.0},
    {"exclude_image_sinks": "outliers", "sink_std": 1.0, "state_update": "post"},
    {
        "exclude_image_sinks": "outliers",
        "sink_std": 2.0,
        "diagnosis_weights": "pre_softmax",
        "multi_image": "per_image",
    },
    {"gate": "always"},
    {"heads": "all"},
    {"gate": "always", "heads": "all", "reference_scope": "earlier"},
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader(Method):
    """Looks at every row of one layer."""

    name = "reader"
    tags = Tags(reads=frozenset({Point.ATTENTION_PROBS}))
    layer: int

    def subscriptions(self, model):
        return [Subscription(point=Point.ATTENTION_PROBS, layers=(self.layer,), rows=Rows.ALL)]

    def on_attention_probs(self, event, state):
        state.rows = len(event.rows)


def generate(model, method, inputs, steps=STEPS, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


def layers_of(values):
    first, _, last = values.get("layers", "0-5").partition("-")
    return range(int(first), int(last) + 1)


def settings(values):
    known = {field.name for field in dataclasses.fields(naive_dleaf.Settings)}
    return naive_dleaf.Settings(**{name: value for name, value in values.items() if name in known})


@pytest.fixture(scope="module")
def double():
    """In float64 the reference's own rounding does not count; norms and rotary angles stay float32."""
    model = tiny_llava(seed=5).double()
    inputs = make_inputs(model, PROMPTS, seed=5)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    out, _ = generate(model, DLEAF(), inputs, eos_token_id=[])
    return model, inputs, torch.stack(out.logits, 1)


def equals_naive(model, inputs, values, images=None, tolerance=1e-5):
    """Compare every sample's logits and flags with the reference; return the logits ``[B, T, V]`` and the telemetry."""
    out, telemetry = generate(model, DLEAF(**values), inputs, eos_token_id=[])
    fresh, ours = out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)
    assert torch.equal(fresh, ours.argmax(-1))
    for row, sample in enumerate(split_rows(inputs, 6)):
        logits, sweep = naive_dleaf.logits(
            model,
            **sample,
            forced=fresh[row].tolist(),
            settings=settings(values),
            layers=layers_of(values),
            images=None if images is None else images[row],
        )
        scale = 1.0 if model.dtype is torch.float64 else float(logits.abs().max())
        torch.testing.assert_close(ours[row], logits.float(), rtol=0, atol=tolerance * scale)
        # the reference's last forward holds every row that cached generation computed one by one
        assert telemetry[row]["dleaf"]["layers_flagged"] == len(sweep.flags) if sweep.diagnosed else row == 3
        assert telemetry[row]["dleaf"]["layers_diagnosed"] == len(sweep.diagnosed)
    return ours, telemetry


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_equals_naive_full_sequence(double, values):
    model, inputs, default = double
    ours, _ = equals_naive(model, inputs, values)
    if values:  # no switch is ignored
        assert not torch.allclose(ours, default, rtol=0, atol=1e-3)


@pytest.mark.parametrize("values", [{}, *DLEAF.test_params()[:4]], ids=str)
def test_equals_naive_in_single_precision(values):
    model = tiny_llava(seed=2)
    equals_naive(model, make_inputs(model, PROMPTS, seed=2), values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rows": "all_text", "multi_image": "per_image", "pool_heads": "renorm_mean"},
        {"exclude_image_sinks": "outliers", "sink_std": 1.0, "mix_scope": "image_slice"},
        {"entropy_scale": "normalised", "threshold": "fixed", "fixed_threshold": 0.8, "multi_image": "per_image"},
    ],
    ids=str,
)
def test_pictures_of_unequal_size(double, monkeypatch, values):
    """Only patches count: of every row's first picture 20 columns are patches and the other 16 separators."""
    model, inputs, _ = double
    plain = LlavaAdapter.image_spans

    def unequal(self, row, batch):
        spans = plain(self, row, batch)
        return [dataclasses.replace(span, positions=span.positions[:20], grid=(4, 5)) for span in spans[:1]] + spans[1:]

    monkeypatch.setattr(LlavaAdapter, "image_spans", unequal)
    images = []
    for sample in split_rows(inputs, 6):
        count = 0 if sample["pixel_values"] is None else len(sample["pixel_values"])
        spans = naive_dleaf.image_spans(model, sample["input_ids"], count)
        images.append([spans[0][:20], *spans[1:]] if spans else [])
    equals_naive(model, inputs, values, images=images)


@pytest.mark.parametrize(
    "values", [{}, *DLEAF.test_params(), {"bas_scope": "sample"}, {"bas_scope": "sample", "rows": "all_text"}], ids=str
)
def test_cached_equals_uncached(model, values):
    inputs = make_inputs(model, PROMPTS, seed=3)
    cached, _ = generate(model, DLEAF(**values), inputs, eos_token_id=[])
    uncached, _ = generate(model, DLEAF(**values), inputs, eos_token_id=[], use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=2e-4)


@pytest.mark.parametrize("values", [{}, *DLEAF.test_params(), {"bas_scope": "sample"}], ids=str)
def test_batch_equals_one_by_one(model, values):
    """Also with draws of the random gate, whose samples keep their names; flags differ between samples."""
    inputs = make_inputs(model, PROMPTS, seed=4)
    names = ["a", "b", "c", "d"]
    out, telemetry = generate(model, DLEAF(**values), inputs, eos_token_id=[], seed=1, sample_ids=names)
    flags = {sample["dleaf"].get("layers_flagged") for sample in telemetry[:3]}
    assert len(flags) > 1
    for row, sample in enumerate(split_rows(inputs, 6)):
        kept = {key: value for key, value in sample.items() if value is not None}
        own, alone = generate(model, DLEAF(**values), kept, eos_token_id=[], seed=1, sample_ids=[names[row]])
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], torch.stack(own.logits, 1)[0], rtol=0, atol=2e-4)
        for counter in ("layers_diagnosed", "layers_flagged", "heads_mixed"):
            assert telemetry[row]["dleaf"].get(counter, 0.0) == alone[0]["dleaf"].get(counter, 0.0)


@pytest.mark.parametrize("values", [{}, {"gate": "random"}, {"mix_stage": "pre", "rows": "all_text"}], ids=str)
def test_beams_and_several_sequences(model, values):
    inputs = make_inputs(model, PROMPTS, seed=6)
    with Stack([DLEAF(**values)]).attach(model) as handle:
        beams = handle.generate(**inputs, max_new_tokens=4, num_beams=3, pad_token_id=PAD)
        assert len(handle.telemetry()) == 4
        assert handle.telemetry()[0]["dleaf"]["layers_diagnosed"] > 0
        assert torch.equal(beams, handle.generate(**inputs, max_new_tokens=4, num_beams=3, pad_token_id=PAD))
        many = handle.generate(**inputs, max_new_tokens=4, num_return_sequences=2, do_sample=True, pad_token_id=PAD)
        assert many.shape[0] == 8


def test_a_threshold_per_sample_refuses_beams(model):
    inputs = make_inputs(model, PROMPTS[:1], seed=6)
    with Stack([DLEAF(bas_scope="sample")]).attach(model) as handle, pytest.raises(ConfigError, match="bas_scope"):
        handle.generate(**inputs, max_new_tokens=4, num_beams=3, pad_token_id=PAD)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("values", [{}, {"reference_scope": "earlier"}, {"bas_scope": "sample"}], ids=str)
def test_rows_that_another_method_asks_for_do_not_disturb(model, layer, values):
    inputs = make_inputs(model, PROMPTS, seed=7)
    alone, counted = generate(model, DLEAF(**values), inputs, eos_token_id=[])
    both, together = runs.generate(model, [Reader(layer=layer), DLEAF(**values)], inputs, STEPS, eos_token_id=[])
    torch.testing.assert_close(torch.stack(alone.logits), torch.stack(both.logits), rtol=0, atol=2e-4)
    for one, other in zip(counted, together, strict=True):
        assert one["dleaf"]["layers_flagged"] == other["dleaf"]["layers_flagged"]


# ----------------------------------------------------------------------------------------------------------- invariants


def test_identity_is_bit_identical_and_still_diagnoses(model):
    inputs = make_inputs(model, PROMPTS, seed=8)
    plain = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True, output_logits=True
    )
    for values in ({}, {"mix_scope": "image_slice"}, {"mix_stage": "pre"}):
        out, telemetry = generate(model, DLEAF(gamma=0.0, **values), inputs, steps=3)
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
        assert telemetry[0]["dleaf"]["layers_flagged"] > 0
        assert telemetry[0]["dleaf"]["heads_mixed"] == 0
    assert DLEAF.identity() == DLEAF(gamma=0.0)


def test_only_the_predicting_row_of_the_prompt_changes(model):
    inputs = make_inputs(model, PROMPTS, seed=9)
    before = model(**inputs).logits
    with Stack([DLEAF()]).attach(model):
        after = model(**inputs).logits
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert (after[:3, -1] != before[:3, -1]).any(-1).all()
    assert torch.equal(after[3], before[3])  # no picture


class Layer:
    """One sample in front of a stack of hand-made attention rows; prompt columns ``roles``, one picture."""

    def __init__(self, method, images=((1, 2),), keys=4, layers=8, row=None):
        roles = torch.full((1, keys), 3, dtype=torch.int8)
        spans = []
        for index, positions in enumerate(images):
            roles[0, list(positions)] = 2
            spans.append(ImageSpan(index, torch.tensor(positions), None, positions[-1] + 1))
        layout = TokenLayout(roles, (tuple(spans),), keys)
        facts = ModelFacts(family="llava", layers=layers, heads=3, kv_heads=3)
        self.request = SimpleNamespace(layout=layout, facts=facts, samples=1)
        self.method, self.traces = method, []
        self.state = MethodState("dleaf", 1, traces=self.traces)
        self.rows = torch.tensor([keys - 1 if row is None else row])

    def __call__(self, layer, heads, dtype=torch.float64):
        probs = torch.tensor(heads, dtype=dtype)[None, :, None]
        event = AttentionProbs(
            phase=Phase.PREFILL, step=0, branch="main", request=self.request, layer=layer, probs=probs,
            rows=self.rows, row_mask=torch.tensor([[True]]),
        )  # fmt: skip
        new = self.method.on_attention_probs(event, self.state)
        return probs[0, :, 0] if new is None else new[0, :, 0]

    def last(self):
        return self.traces[-1].values


EXAMPLE = [[0.70, 0.10, 0.10, 0.10], [0.20, 0.30, 0.20, 0.30], [0.60, 0.05, 0.25, 0.10]]


@pytest.mark.parametrize("update", ["pre", "post"])
def test_worked_example_of_one_layer(update):
    layer = Layer(DLEAF(gate="always", state_update=update))
    new = layer(0, EXAMPLE)
    expected = [[0.30, 0.26, 0.18, 0.26], EXAMPLE[1], [0.28, 0.25, 0.21, 0.26]]
    torch.testing.assert_close(new, torch.tensor(expected, dtype=torch.float64))
    found = layer.last()
    assert found["entropy"][0] == pytest.approx(0.68814, abs=5e-6)
    assert found["low_heads"] == [[True, False, True]]
    assert found["reference"] == [1]
    assert found["image_mass"][0] == pytest.approx([0.2, 0.5, 0.3])
    assert found["image_mass_after"][0] == pytest.approx([0.44, 0.50, 0.46])
    assert math.isnan(found["threshold"][0])
    # what the threshold learned: 0.68814 uncorrected, 0.68075 corrected
    layer(1, EXAMPLE)
    assert layer.last()["threshold"][0] == pytest.approx(0.68814 if update == "pre" else 0.68075, abs=5e-6)


@pytest.mark.parametrize(("policy", "flagged"), [("bas_min", {1, 3, 5}), ("running_mean", {1, 3})])
def test_worked_example_of_a_threshold(policy, flagged):
    threshold = ops.Threshold(policy=policy)
    entropies = torch.tensor([5.9, 6.1, 5.8, 6.0, 5.7, 5.85], dtype=torch.float64)
    seen, found, levels = threshold.start(entropies[0]), set(), []
    for layer, entropy in enumerate(entropies):
        levels.append(float(threshold.level(seen)))
        found |= {layer} if threshold.flagged(seen, entropy) else set()
        seen = threshold.update(seen, entropy)
    assert found == flagged
    if policy == "running_mean":
        assert levels[1:] == pytest.approx([5.9, 6.0, 5.93333, 5.95, 5.9], abs=1e-4)


LAYERS = 32
DEPTH = torch.arange(LAYERS) / LAYERS
PROFILES = {
    "flat": torch.zeros(LAYERS),
    "falling": -2 * DEPTH,
    "rising": 2 * DEPTH,
    "spike": torch.where(torch.arange(LAYERS) == 20, 1.5, 0.0),
}
HARMONIC = sum(1 / n for n in range(1, LAYERS + 1))


@pytest.mark.parametrize(
    ("profile", "policy", "expected"),
    [
        ("flat", "bas_min", LAYERS - HARMONIC),  # a new minimum comes with probability 1/l
        ("flat", "running_mean", 15.5),
        ("flat", "mean_plus_kstd", 6.3),
        ("flat", "ema", 15.5),
        ("falling", "bas_min", 13.1),
        ("falling", "running_mean", 0.8),
        ("falling", "mean_plus_kstd", 0.5),
        ("falling", "ema", 0.7),
        ("rising", "bas_min", 30.5),
        ("rising", "running_mean", 30.1),
        ("rising", "mean_plus_kstd", 28.2),
        ("rising", "ema", 30.3),
        ("spike", "bas_min", 28.0),
        ("spike", "running_mean", 13.6),
        ("spike", "mean_plus_kstd", 5.3),
        ("spike", "ema", 12.6),
    ],
)
def test_how_many_layers_a_policy_flags(profile, policy, expected):
    """Noise of standard deviation 0.1 around a profile over 32 layers."""
    threshold = ops.Threshold(policy=policy)
    noise = 0.1 * torch.randn(20000, LAYERS, generator=torch.Generator().manual_seed(0))
    entropies = (6 + PROFILES[profile] + noise).T
    seen, flagged = threshold.start(entropies[0]), torch.zeros(20000)
    for entropy in entropies:
        flagged += threshold.flagged(seen, entropy)
        seen = threshold.update(seen, entropy)
    assert float(flagged.mean()) == pytest.approx(expected, abs=0.1)


def random_heads(seed, heads=8, keys=12):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(heads, keys, generator=generator, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("values", [{}, {"mix_scope": "image_slice"}, {"reference": "iaf_weighted"}], ids=str)
def test_rows_sum_to_one_and_image_mass_grows_with_gamma(values):
    heads, masses = random_heads(1), []
    for gamma in (0.0, 0.2, 0.5, 0.8, 1.0):
        layer = Layer(DLEAF(gamma=gamma, gate="always", **values), images=((2, 3, 4, 5),), keys=12)
        new = layer(0, heads.tolist())
        torch.testing.assert_close(new.sum(-1), torch.ones(8, dtype=torch.float64))
        masses.append(float(new[:, 2:6].sum(-1).mean()))
    assert masses == sorted(masses)
    assert masses[-1] > masses[0]
    if not values:  # affine in gamma
        assert masses[1:4] == pytest.approx([masses[0] + g * (masses[4] - masses[0]) for g in (0.2, 0.5, 0.8)])


def test_gamma_of_one_makes_the_head_the_best_one():
    new = Layer(DLEAF(gamma=1.0, gate="always"))(0, EXAMPLE)
    assert torch.equal(new, torch.tensor([EXAMPLE[1]] * 3, dtype=torch.float64))


def test_reference_and_unflagged_rows_stay_bit_for_bit():
    method = DLEAF()
    layer = Layer(method, images=((2, 3, 4, 5),), keys=12)
    flags = []
    for index in range(8):
        heads = random_heads(index).float()
        new = layer(index, heads.tolist(), torch.float32)
        found = layer.last()
        flags.append(found["flagged"][0])
        kept = ~torch.tensor(found["low_heads"][0])
        assert kept[found["reference"][0]]
        assert torch.equal(new[kept], heads[kept])
        assert torch.equal(new, heads) != flags[-1]
        assert 0 <= found["entropy"][0] <= math.log(4)
    assert 0 < sum(flags) < 8


@pytest.mark.parametrize("pool", ops.POOLS)
@pytest.mark.parametrize("multi_image", ["union", "per_image"])
def test_no_mass_on_the_picture_is_the_largest_entropy(pool, multi_image):
    method = DLEAF(pool_heads=pool, multi_image=multi_image, first_layer="eligible", reference="iaf_weighted")
    blind = [[0.5, 0.0, 0.0, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    layer = Layer(method, images=((1, 2), (3, 4)), keys=6)
    new = layer(0, blind)
    assert layer.last()["entropy"][0] == pytest.approx(math.log(4 if multi_image == "union" else 2))
    assert torch.isfinite(new).all()
    torch.testing.assert_close(new.sum(-1), torch.ones(2, dtype=torch.float64))
    assert layer.last()["flagged"] == [True]


@pytest.mark.parametrize("seed", range(3))
def test_flags_do_not_depend_on_the_unit_of_entropy(seed):
    flags = []
    for scale in ("nats", "normalised"):
        layer = Layer(DLEAF(entropy_scale=scale, threshold="running_mean"), images=((2, 3, 4, 5),), keys=12)
        for index in range(8):
            layer(index, random_heads(10 * seed + index).tolist())
        flags.append([trace.values["flagged"] for trace in layer.traces])
    assert flags[0] == flags[1]
    assert [True] in flags[0]


def test_renormalising_separates_spread_from_mass():
    """A uniform layer has the same entropy at 2 % and at 60 % image mass only if it is renormalised."""
    keys = torch.ones(1, 1, 577, dtype=torch.bool)
    keys[..., 0] = False
    found = {}
    for mass in (0.02, 0.6):
        weights = torch.full((1, 1, 1, 577), mass / 576, dtype=torch.float64)
        weights[..., 0] = 1 - mass
        for renormalise in (True, False):
            found[mass, renormalise] = float(ops.pooled_entropy(weights, keys, renormalise=renormalise))
    assert found[0.02, True] == pytest.approx(found[0.6, True])
    assert found[0.6, True] == pytest.approx(6.356, abs=1e-3)
    assert found[0.02, False] == pytest.approx(0.21, abs=0.01)
    assert found[0.6, False] == pytest.approx(4.12, abs=0.01)


def test_rows_before_a_picture_do_not_see_it():
    """A row between two pictures is judged by the first alone; a row before both is left alone."""
    weights = [[0.2, 0.1, 0.3, 0.4, 0, 0, 0], [0.3, 0.2, 0.4, 0.1, 0, 0, 0]]
    between = Layer(DLEAF(gate="always"), images=((1, 2), (4, 5)), keys=7, row=3)
    between(0, weights)
    share = (0.1 + 0.2) / (0.4 + 0.6)
    assert between.last()["entropy"][0] == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))
    assert between.last()["flagged"] == [True]
    before = Layer(DLEAF(gate="always"), images=((1, 2), (4, 5)), keys=7, row=0)
    rows = [[1.0, 0, 0, 0, 0, 0, 0]] * 2
    assert before(0, rows).tolist() == rows
    assert before.last()["flagged"] == [False]


def test_masked_scores_stay_masked():
    """Scores at the dtype's minimum must neither overflow nor become visible when they are mixed before softmax."""
    lowest = torch.finfo(torch.float32).min
    for values in ({}, {"reference": "iaf_weighted"}, {"reference": "topk_mean", "mix_scope": "image_slice"}):
        layer = Layer(DLEAF(gate="always", mix_stage="pre", **values), keys=5)
        scores = torch.tensor([[[[lowest, 1.0, 0.5, 0.2, lowest]], [[lowest, 0.1, -2.0, 0.3, lowest]]]])
        event = AttentionScores(
            phase=Phase.PREFILL, step=0, branch="main", request=layer.request, layer=0, scores=scores,
            rows=layer.rows, row_mask=torch.tensor([[True]]),
        )  # fmt: skip
        new = layer.method.on_attention_scores(event, layer.state)
        assert torch.equal(new == lowest, scores == lowest)
        assert torch.isfinite(new.softmax(-1)).all()
        assert not torch.equal(new, scores)


# --------------------------------------------------------------------------------- ablations, counters, traces, options


def test_random_gate_fires_at_its_rate_and_follows_seed_and_sample(model):
    inputs = make_inputs(model, PROMPTS[:2], seed=1)

    def run(rate, **kwargs):
        out, telemetry = generate(model, DLEAF(gate="random", gate_rate=rate), inputs, 16, eos_token_id=[], **kwargs)
        flagged = sum(sample["dleaf"]["layers_flagged"] for sample in telemetry)
        return out.logits[0], flagged / sum(sample["dleaf"]["layers_diagnosed"] for sample in telemetry)

    assert run(0.0)[1] == 0.0
    assert run(1.0)[1] == 1.0
    assert run(0.3)[1] == pytest.approx(0.3, abs=0.1)
    assert torch.equal(run(0.5, seed=1)[0], run(0.5, seed=1)[0])
    assert not torch.equal(run(0.5, seed=1)[0], run(0.5, seed=2)[0])
    assert not torch.equal(run(0.5, sample_ids=["a", "b"])[0], run(0.5, sample_ids=["c", "d"])[0])
    always, _ = generate(model, DLEAF(gate="always"), inputs, 16, eos_token_id=[])
    assert torch.equal(run(1.0)[0], always.logits[0])


def test_random_gate_corrects_as_the_reference_does(double):
    model, inputs, _ = double
    draws = {}
    with Stack([DLEAF(gate="random")]).attach(model) as handle:
        out = handle.generate(
            **inputs, max_new_tokens=STEPS, pad_token_id=PAD, eos_token_id=[], do_sample=False, trace=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        for trace in handle.trace():
            draws[trace.step, trace.layer] = trace.values["flagged"]
    fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
    for row, sample in enumerate(split_rows(inputs, 6)):
        length = sample["input_ids"].shape[1]
        logits, _ = naive_dleaf.logits(
            model,
            **sample,
            forced=fresh[row].tolist(),
            settings=naive_dleaf.Settings(gate="random"),
            draws=lambda layer, column, row=row, length=length: draws[column - length + 1, layer][row],
        )
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], logits.float(), rtol=0, atol=1e-5)


def test_ablations_take_the_stages_apart():
    method = DLEAF(gamma=0.5)
    variants = method.ablations({"layers_diagnosed": 80.0, "layers_flagged": 20.0})
    assert variants == {
        "gate always": DLEAF(gamma=0.5, gate="always"),
        "all heads": DLEAF(gamma=0.5, heads="all"),
        "random gate": DLEAF(gamma=0.5, gate="random", gate_rate=0.25),
    }
    assert set(method.ablations({})) == {"gate always", "all heads"}


def test_counters_and_traces_agree(model):
    inputs = make_inputs(model, PROMPTS, seed=11)
    with Stack([DLEAF()]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=STEPS, pad_token_id=PAD, eos_token_id=[], trace=True)
        telemetry, traces = handle.telemetry(), handle.trace()
    assert [(trace.step, trace.layer) for trace in traces] == [(step, layer) for step in range(4) for layer in range(6)]
    assert {trace.phase for trace in traces[:6]} == {"prefill"}
    for row in range(4):
        values = [{name: value[row] for name, value in trace.values.items()} for trace in traces]
        counted = telemetry[row]["dleaf"]
        assert counted["layers_diagnosed"] == (0 if row == 3 else len(values))
        assert counted["layers_flagged"] == sum(value["flagged"] for value in values)
        assert counted["heads_mixed"] == sum(sum(value["low_heads"]) for value in values)
        for counter, name in (("image_mass_before", "image_mass"), ("image_mass_after", "image_mass_after")):
            assert counted[counter] == pytest.approx(sum(sum(value[name]) / 4 for value in values), rel=1e-5)
        if row < 3:
            assert 0 < counted["layers_flagged"] < counted["layers_diagnosed"]
            assert counted["image_mass_after"] > counted["image_mass_before"]


def test_presets_say_what_they_are():
    assert DLEAF.preset("paper") == DLEAF.preset("reconstructed") == DLEAF()
    assert DLEAF.preset("selective") == DLEAF(threshold="running_mean")
    assert DLEAF.fidelity == "reconstructed"


@pytest.mark.parametrize(
    "values",
    [
        {"gamma": 1.1},
        {"rows": "first"},
        {"bottom_k": 0},
        {"ema_decay": -0.1},
        {"sink_std": -1.0},
        {"delta": float("nan")},
        {"fixed_threshold": None, "threshold": "fixed"},
        {"pool_heads": "renorm_mean", "renormalise_image": False},
        {"gate_rate": 2.0},
        {"mix_stage": "both"},
    ],
)
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.dleaf.{next(iter(values))}="):
        DLEAF(**values)
