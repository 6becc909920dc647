"""What SCR must keep whatever it is asked to do: identity, locality, one arithmetic, one result in every setting."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from mitigate.adapters.llava import LlavaAdapter
from mitigate.core import Fidelity, ModelFacts
from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError
from mitigate.methods.scr import SCR
from tests.references import runs
from tests.references.tiny import IMAGE, PAD, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (5, 1, 0)]
FACTS = ModelFacts(family="llava", layers=6, heads=4, kv_heads=2)
VARIANTS = {
    "plain": {},
    "random": {"source_selection": "random"},
    "noise": {"injection": "gaussian_noise"},
    "random-noise": {"source_selection": "random", "injection": "gaussian_noise"},
    "once": {"schedule": "once"},
}


def variant(name, **more):
    return SCR(**{"lam": 1.5, "k_src": 4} | VARIANTS[name] | more)


def generate(model, method, inputs, steps=6, **kwargs):
    return runs.generate(model, [method], inputs, steps, **kwargs)


def hidden_after(model, method, inputs, layer, **kwargs):
    """Block output after the method's edit, as the next block gets it, and the trace of the choice."""
    seen = []
    with Stack([method]).attach(model) as handle:
        block = model.model.language_model.layers[layer]
        hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
        handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD, do_sample=False, trace=True, **kwargs)
        hook.remove()
        trace = handle.trace()
    return seen[-1], trace[0].values if trace else None


def give_grids(monkeypatch, grids, size):
    """Let the adapter see images of ``size`` tokens as rasters of these sides, with separators after them."""

    def image_spans(self, row, batch):
        where = (row == IMAGE).nonzero().flatten()
        return [
            ImageSpan(batch.picture()[0], tokens[: grid[0] * grid[1]], grid, int(tokens[-1]) + 1)
            for grid, tokens in zip(grids, where.split(size), strict=False)
        ]

    monkeypatch.setattr(LlavaAdapter, "image_spans", image_spans)


# --------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("name", VARIANTS)
def test_strength_one_changes_no_bit_and_costs_no_pass(model, name):
    inputs = make_inputs(model, PROMPTS, seed=1)
    expected = model(**inputs).logits
    with Stack([variant(name, lam=1.0)]).attach(model) as handle:
        assert torch.equal(model(**inputs).logits, expected)
        assert all(set(sample["scr"]) == {"seconds"} for sample in handle.telemetry())
    assert SCR.identity().lam == 1.0


def test_image_at_the_end_is_not_ranked_but_random_sources_need_no_ranking(model):
    inputs = make_inputs(model, [(5, 1, 0)], seed=1)
    expected = model(**inputs).logits
    with Stack([SCR(lam=1.5)]).attach(model) as handle:
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.telemetry()[0]["scr"]["images_ranked"] == 0
    with Stack([variant("random")]).attach(model):
        assert not torch.equal(model(**inputs).logits, expected)


def test_text_alone_stays_as_it_is(model):
    inputs = make_inputs(model, [(5, 0, 3)], seed=1)
    expected = model(**inputs).logits
    for name in VARIANTS:
        with Stack([variant(name)]).attach(model):
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("grid", [(2, 18), (18, 2), (1, 36)])
def test_thin_grids_are_left_alone_with_one_warning(monkeypatch, model, grid):
    give_grids(monkeypatch, [grid, grid], 36)
    inputs = make_inputs(model, [(3, 2, 6), (2, 1, 4)], seed=1)
    expected = model(**inputs).logits
    with warnings.catch_warnings(record=True) as caught, Stack([SCR(lam=1.5)]).attach(model) as handle:
        warnings.simplefilter("always")
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.telemetry()[0]["scr"]["sources"] == 0
    assert [str(warning.message) for warning in caught] == [
        "scr leaves images of fewer than 3 rows or columns of patches alone"
    ]


def test_a_thin_grid_beside_a_good_one(monkeypatch, model):
    give_grids(monkeypatch, [(2, 18), (6, 6)], 36)
    with pytest.warns(UserWarning, match="fewer than 3"):
        _, telemetry = generate(model, SCR(lam=1.5, k_src=4), make_inputs(model, [(3, 2, 6)], seed=1))
    assert telemetry[0]["scr"]["sources"] == 4


def test_more_sources_than_candidates(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, telemetry = generate(model, SCR(lam=1.5, k_src=1000), make_inputs(model, [(3, 1, 6)], seed=1))
    assert telemetry[0]["scr"]["sources"] == 16
    assert telemetry[0]["scr"]["neighbours"] == 20


# ------------------------------------------------------------------------------------------------ arithmetic and place


@pytest.mark.parametrize("name", ["plain", "random", "noise"])
def test_one_application_is_exact_and_touches_nothing_else(model, name):
    """At the edited block: Eq. 1 to the last bit (noise: its norm), every other position as without the method."""
    inputs = make_inputs(model, PROMPTS, seed=2)
    method = variant(name, lam=1.1, layers="2", k_src=3)
    plain, _ = hidden_after(model, SCR.identity(), inputs, 2)
    edited, roles = hidden_after(model, method, inputs, 2)
    for row in range(len(PROMPTS)):
        expected = plain[row].clone()
        owners = dict(zip(roles["neighbours"][row], roles["owners"][row], strict=True))
        assert set(owners.values()) <= set(roles["sources"][row])
        for near, source in owners.items():
            given = edited[row, near] - plain[row, near]
            if name == "noise":
                torch.testing.assert_close(given.norm(), 0.1 * plain[row, source].norm(), rtol=1e-4, atol=0)
                assert abs(torch.cosine_similarity(given, plain[row, source], 0)) < 0.6
                expected[near] = edited[row, near]
            else:
                expected[near] = plain[row, near] + (1.1 - 1.0) * plain[row, source]
        for source in roles["sources"][row]:
            expected[source] = plain[row, source] / 1.1
        assert torch.equal(edited[row], expected)
        visual = inputs["input_ids"][row] == IMAGE
        assert torch.equal(edited[row, ~visual], plain[row, ~visual])
        assert not torch.equal(edited[row], plain[row]) or not roles["sources"][row]


def identity_blocks(layers, grid=4):
    """A decoder whose blocks add nothing to the residual stream; attention still ranks the patches."""
    model = tiny_llava(seed=3, layers=layers, grid=grid)
    for block in model.model.language_model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def residual():
    return identity_blocks(22, grid=6)


@pytest.mark.parametrize(
    ("n", "gain", "scale"), [(12, 0.750, 0.319), (16, 0.861, 0.218), (21, 0.951, 0.135)], ids=["12", "16", "21"]
)
def test_many_layers_have_the_closed_form(residual, n, gain, scale):
    """Neighbours end with lam (1 - lam^-n) of their source, sources with lam^-n of themselves."""
    inputs = make_inputs(residual, PROMPTS, seed=4)
    shrunk = 1.1**-n
    assert 1.1 * (1 - shrunk) == pytest.approx(gain, abs=6e-4)
    assert shrunk == pytest.approx(scale, abs=6e-4)
    start, _ = hidden_after(residual, SCR.identity(), inputs, 0)
    end, roles = hidden_after(residual, SCR(lam=1.1, k_src=5, layers=f"0-{n - 1}"), inputs, 21)
    expected = start.double()
    for row in range(len(PROMPTS)):
        for near, source in zip(roles["neighbours"][row], roles["owners"][row], strict=True):
            expected[row, near] += 1.1 * (1 - shrunk) * start[row, source]
        for source in roles["sources"][row]:
            expected[row, source] *= shrunk
    assert sum(map(len, roles["sources"])) == 15
    torch.testing.assert_close(end.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "factor"), [(12, 1.511), (16, 1.587), (21, 1.649)])
def test_norm_growth_has_the_closed_form(monkeypatch, n, factor):
    """Two sources side by side on 3x4 equal patches own five neighbours each: the norm of the set grows by a table."""
    give_grids(monkeypatch, [(3, 4)], 16)
    model = identity_blocks(22)
    projector = model.model.multi_modal_projector
    projector.linear_2.weight.zero_()
    projector.linear_2.bias.copy_(torch.randn(64))
    _, telemetry = generate(model, SCR(lam=1.1, k_src=2, layers=f"0-{n - 1}"), make_inputs(model, [(3, 1, 6)]), steps=1)
    counted = telemetry[0]["scr"]
    assert (counted["sources"], counted["neighbours"]) == (2, 10)
    assert counted["norm_growth"] == pytest.approx(factor, abs=6e-4)
    assert counted["norm_growth_visual"] == pytest.approx(factor, abs=6e-4), "all twelve patches are touched"


def test_one_application_grows_the_set_by_8_percent_at_most(monkeypatch):
    give_grids(monkeypatch, [(3, 3)], 16)
    model = identity_blocks(6)
    projector = model.model.multi_modal_projector
    projector.linear_2.weight.zero_()
    projector.linear_2.bias.copy_(torch.randn(64))
    _, telemetry = generate(model, SCR(lam=1.1, schedule="once"), make_inputs(model, [(3, 1, 6)]), steps=1)
    assert telemetry[0]["scr"]["norm_growth"] == pytest.approx((8 * 1.1 + 1 / 1.1) / 9)


def test_half_precision_stays_half_precision():
    model = tiny_llava(seed=2).to(torch.bfloat16)
    inputs = make_inputs(model, PROMPTS, seed=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    for name in ("plain", "noise"):
        hidden, _ = hidden_after(model, variant(name), inputs, 0)
        assert hidden.dtype == torch.bfloat16
        assert hidden.isfinite().all()


# ------------------------------------------------------------------------------------ one result, however it is reached


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_uncached(model, name, beams):
    inputs = make_inputs(model, PROMPTS, seed=3)
    cached, counted = generate(model, variant(name), inputs, num_beams=beams)
    uncached, again = generate(model, variant(name), inputs, num_beams=beams, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    names = ("sources", "neighbours", "norm_growth", "norm_growth_visual", "attention_entropy")
    for one, other in zip(counted, again, strict=True):
        for counter in names:
            assert one["scr"].get(counter, 0.0) == pytest.approx(other["scr"].get(counter, 0.0), rel=1e-4), counter


@pytest.mark.parametrize("name", ["plain", "random", "noise"])
def test_beams_and_copies_measure_what_one_row_measures(model, name):
    inputs = make_inputs(model, PROMPTS, seed=3)
    _, single = generate(model, variant(name), inputs, steps=2)
    _, beams = generate(model, variant(name), inputs, steps=2, num_beams=3)
    for one, three in zip(single, beams, strict=True):
        assert three["scr"]["sources"] == 3 * one["scr"]["sources"], "edits are counted in every beam"
        for counter in ("attention_entropy", "images_ranked", "norm_growth", "norm_growth_visual"):
            assert three["scr"].get(counter, 0.0) == pytest.approx(one["scr"].get(counter, 0.0), rel=1e-4), counter


@pytest.mark.parametrize("name", VARIANTS)
def test_left_padding_changes_nothing(model, name):
    inputs = make_inputs(model, PROMPTS, seed=5)
    names = [f"sample {row}" for row in range(3)]
    together, roles = hidden_after(model, variant(name), inputs, 3, sample_ids=names)
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    for row, sample in enumerate(split_rows(inputs, 6)):
        alone, own = hidden_after(model, variant(name), sample, 3, sample_ids=[names[row]])
        torch.testing.assert_close(together[row, pads[row] :], alone[0], rtol=1e-4, atol=1e-4)
        for part in ("sources", "neighbours", "owners"):
            assert [column - pads[row] for column in roles[part][row]] == own[part][0]


@pytest.mark.parametrize("more", [{}, {"entropy": "norm", "layers": "all"}, {"head_fraction": 0.3}])
def test_a_truncated_pass_gives_the_same(model, more):
    inputs = make_inputs(model, PROMPTS, seed=6)
    blocks = model.model.language_model.layers
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: calls.append(index)) for index, block in enumerate(blocks)
    ]
    outs = [generate(model, SCR(lam=1.5, k_src=4, truncate_pass1=on, **more), inputs, steps=1) for on in (True, False)]
    for hook in hooks:
        hook.remove()
    assert torch.equal(torch.stack(outs[0][0].logits), torch.stack(outs[1][0].logits))
    counters = [[{k: v for k, v in s["scr"].items() if k != "seconds"} for s in telemetry] for _, telemetry in outs]
    assert counters[0] == counters[1]
    depth = 6 if "layers" in more else 4  # the last ranking layer is 3
    assert calls == [*range(depth), *range(6), *range(6), *range(6)]


@pytest.mark.parametrize("name", ["random", "noise"])
def test_random_sources_and_noise_follow_the_seed_and_the_sample(model, name):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)

    def logits(**kwargs):
        return generate(model, variant(name, k_src=3), inputs, steps=1, **kwargs)[0].logits[0]

    assert torch.equal(logits(seed=1), logits(seed=1))
    assert not torch.equal(logits(seed=1), logits(seed=2))
    assert not torch.equal(logits(sample_ids=["a"]), logits(sample_ids=["b"]))


def test_random_sources_are_uniform_over_the_interior(model):
    """The control draws without looking: over many seeds every interior patch leads about equally often."""
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    counts = torch.zeros(36)
    with Stack([SCR(lam=1.5, k_src=4, source_selection="random", layers="0")]).attach(model) as handle:
        for seed in range(160):
            handle.generate(**inputs, max_new_tokens=1, pad_token_id=PAD, seed=seed, trace=True)
            counts[[column - 3 for column in handle.trace()[0].values["sources"][0]]] += 1
    grid = counts.view(6, 6)
    assert grid[1:5, 1:5].sum() == 4 * 160
    assert (grid[1:5, 1:5] - 40).abs().max() < 25  # 40 expected, standard deviation 5.5


def test_image_in_one_chunk_of_the_prompt(model):
    """A prompt in chunks is served when no pass is needed and each picture comes whole."""
    inputs = make_inputs(model, [(3, 1, 30)], seed=1)
    whole, counted = generate(model, variant("random"), inputs)
    chunked, again = generate(model, variant("random"), inputs, prefill_chunk_size=45)
    assert torch.equal(whole.sequences, chunked.sequences)
    assert counted[0]["scr"]["norm_growth_visual"] == pytest.approx(again[0]["scr"]["norm_growth_visual"])


def test_image_in_a_later_chunk_of_the_prompt(model):
    """Chunks before the picture have nothing to edit."""
    inputs = make_inputs(model, [(40, 1, 6)], seed=1)
    whole, counted = generate(model, variant("random"), inputs)
    chunked, again = generate(model, variant("random"), inputs, prefill_chunk_size=40)
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(whole.logits[0], chunked.logits[0], rtol=0, atol=1e-4)
    assert counted[0]["scr"]["tokens_edited"] == again[0]["scr"]["tokens_edited"] > 0


def test_text_between_the_parts_of_a_picture_does_not_vote():
    """Frames with words between them: who asks about a picture comes after its last token."""
    image = [Role.IMAGE] * 9
    words = [Role.SYSTEM, *image, Role.PROMPT, *image, Role.SEPARATOR, Role.PROMPT, Role.PROMPT]
    roles = torch.tensor([[int(role) for role in words]], dtype=torch.int8)
    spans = tuple(ImageSpan(0, torch.arange(start, start + 9), (3, 3), start + 9) for start in (1, 11))
    layout = TokenLayout(roles, (spans,), 23)
    _, ranking, *_ = SCR().subscriptions(FACTS)
    assert ranking.rows(layout).nonzero()[:, 1].tolist() == [21, 22]


# ------------------------------------------------------------------------------------------------------------- sharing


def questions(model, count=3):
    """Prompts about one picture, and one about another."""
    rows = [make_inputs(model, [(3, 1, 6)], seed=seed) for seed in range(count)]
    for row in rows[1:-1]:
        row["pixel_values"] = rows[0]["pixel_values"]
    return rows


def ask_all(model, method, rows):
    found = []
    with Stack([method]).attach(model) as handle:
        for row in rows:
            out = handle.generate(
                **row, max_new_tokens=2, pad_token_id=PAD, trace=True,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            counted = handle.telemetry()[0]["scr"]
            found.append((counted.get("extra_forwards", 0), handle.trace()[0].values, counted, out.logits[0]))
    return found


def test_one_ranking_per_image(model):
    rows = questions(model)
    shared = ask_all(model, SCR(lam=1.5, k_src=4, cache_per_image=True, entropy="norm"), rows)
    own = ask_all(model, SCR(lam=1.5, k_src=4, entropy="norm"), rows)
    assert [entry[0] for entry in shared] == [1, 0, 1]
    assert [entry[0] for entry in own] == [1, 1, 1]
    assert shared[0][1] == own[0][1]
    assert shared[1][1] == shared[0][1], "the first question's sources, whatever is asked"
    assert shared[1][1]["sources"] != own[1][1]["sources"]
    assert shared[2][1] == own[2][1]
    assert torch.equal(shared[0][3], own[0][3])
    for counter in ("attention_entropy", "norm_entropy", "images_ranked"):
        assert shared[1][2][counter] == shared[0][2][counter]


def test_the_same_image_twice_in_a_batch_is_ranked_once(model):
    first, second = questions(model, 3)[:2]
    batch = {name: torch.cat((first[name], second[name])) for name in first}
    method = SCR(lam=1.5, k_src=4, cache_per_image=True)
    ((passes, values, *_),) = ask_all(model, method, [batch])
    assert passes == 1
    assert values["sources"][0] == values["sources"][1]


@pytest.mark.parametrize("other", [{"text_queries": "last"}, {"head_fraction": 0.25}, {"diagnostic_layers": "5"}])
def test_rankings_of_different_settings_are_not_shared(model, other):
    row = questions(model)[0]
    methods = {"a": SCR(lam=1.5, k_src=4, cache_per_image=True)}
    methods["b"] = dataclasses.replace(methods["a"], **other)
    with Stack(methods).attach(model) as handle:
        handle.generate(**row, max_new_tokens=1, pad_token_id=PAD, trace=True)
        first, second = (trace.values["sources"] for trace in handle.trace())
        counted = handle.telemetry()[0]
    assert first != second
    assert counted["a"]["extra_forwards"] == counted["b"]["extra_forwards"] == 1


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("text", "layers"),
    [("8-16", (5,)), ("2-16", (2, 3, 4, 5)), ("1,9", (1, 5)), ("0.25-0.5", (2, 3)), ("0-1,0.9-1.0", (0, 1, 5))],
)
def test_ranking_layers_end_with_the_decoder(text, layers):
    (subscription,) = [
        item for item in SCR(diagnostic_layers=text).subscriptions(FACTS) if item.point == "attention_probs"
    ]
    assert subscription.layers == layers


def test_edited_layers_are_not_clamped():
    with pytest.raises(ConfigError, match="names layer 6"):
        SCR(layers="0-11").subscriptions(FACTS)
    with pytest.raises(ConfigError, match=r"methods.scr.diagnostic_layers"):
        SCR(diagnostic_layers="early").subscriptions(FACTS)


def test_default_layers_are_the_papers_for_the_papers_model():
    llava = dataclasses.replace(FACTS, layers=32)
    layers = {item.point.value: item.layers for item in SCR().subscriptions(llava)}
    assert layers["hidden_states"] == tuple(range(12))
    assert layers["attention_probs"] == tuple(range(8, 17))


def test_question_only_without_the_processor_says_what_to_do(model):
    inputs = make_inputs(model, [(3, 1, 6)], seed=1)
    with pytest.raises(ConfigError, match=r"methods.scr.text_queries=question_only.*attach with the processor"):
        generate(model, SCR(text_queries="question_only"), inputs)


def test_presets_and_ablations_change_one_thing_each():
    for name, changes in SCR.presets.items():
        assert SCR.preset(name) == SCR(**changes)
    controls = {"uniform_smooth", "gaussian_noise"}
    assert {name for name in SCR.presets if SCR.preset_fidelity.get(name) is Fidelity.CONTROL} == controls
    ablations = SCR(lam=1.2, k_src=7).ablations({})
    assert ablations == {
        "4-connected": SCR(lam=1.2, k_src=7, neighbourhood="4"),
        "radius2": SCR(lam=1.2, k_src=7, neighbourhood="radius2"),
        "uniform-smooth": SCR(lam=1.2, k_src=7, source_selection="random"),
        "gaussian-noise": SCR(lam=1.2, k_src=7, injection="gaussian_noise"),
    }


@pytest.mark.parametrize(
    "values",
    [
        {"lam": 0.9},
        {"lam": float("inf")},
        {"k_src": 0},
        {"head_fraction": 0.0},
        {"head_fraction": 1.5},
        *(
            {name: "other"}
            for name in (
                "ownership", "neighbourhood", "schedule", "text_queries", "source_selection", "injection", "tile_mode",
                "multi_image", "entropy",
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_name_the_parameter(values):
    with pytest.raises(ConfigError, match=f"methods.scr.{next(iter(values))}="):
        SCR(**values)
