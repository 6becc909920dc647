"""The references against hand-made arithmetic, and their decoder against the transformers implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from . import naive_locore, naive_scr, naive_sgrs
from .tiny import (
    EOS,
    IMAGE,
    PAD,
    full_forward,
    image_spans,
    make_inputs,
    merged_embeddings,
    split_rows,
    strip,
    tiny_llava,
    tiny_processor,
)

GRID = 6
PROMPTS = [(3, 1, 5), (2, 2, 4), (4, 1, 0)]
LOCORE = {"beta": 0.5, "window": 3, "mode": "post_raw", "layers": None, "history_start": "after_image"}
SGRS = {"alpha": 0.6, "top_k": 4, "max_resample": 2, "window": 3, "layers": [2, 3]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(0, grid=GRID)


@pytest.fixture(scope="module")
def rows(model: LlavaForConditionalGeneration) -> list[dict[str, torch.Tensor | None]]:
    return split_rows(make_inputs(model, PROMPTS, seed=1), GRID)


def close(actual: object, expected: object, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        atol=tolerance,
        rtol=0,
    )


# ------------------------------------------------------------------------------------------------ models and decoder


@torch.no_grad()
def test_decoder_by_hand_equals_transformers(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    padded = model(**inputs).logits
    for index, row in enumerate(split_rows(inputs, GRID)):
        logits = full_forward(model, row["input_ids"], row["pixel_values"]).logits
        alone = model(**row).logits[0]
        assert (logits - alone).abs().max() < 3e-5
        assert (logits - padded[index, -len(logits) :]).abs().max() < 3e-5


@torch.no_grad()
def test_text_only_prompt_and_other_shapes():
    small = tiny_llava(3, layers=2, heads=2, kv_heads=2, grid=3)
    inputs = make_inputs(small, [(4, 0, 3)], seed=2)
    assert "pixel_values" not in inputs
    logits = full_forward(small, inputs["input_ids"], None).logits
    assert (logits - small(**inputs).logits[0]).abs().max() < 3e-5


def test_inputs_are_left_padded_and_split_back(model):
    inputs = make_inputs(model, PROMPTS, seed=1)
    assert inputs["pixel_values"].shape[0] == 4
    lengths = [3 + 36 + 5, 2 + 36 + 1 + 36 + 4, 4 + 36]
    assert inputs["attention_mask"].sum(1).tolist() == lengths
    assert inputs["input_ids"][0, : max(lengths) - lengths[0]].eq(PAD).all()
    split = split_rows(inputs, GRID)
    assert torch.equal(torch.cat([row["pixel_values"] for row in split]), inputs["pixel_values"])
    assert [len(image_spans(model, row["input_ids"], len(row["pixel_values"]))) for row in split] == [1, 2, 1]
    assert strip(inputs["input_ids"][:1], inputs["attention_mask"][:1]).shape[1] == lengths[0]
    assert split[2]["input_ids"][0, -1] == IMAGE


def test_greedy_reference_equals_generate_and_is_not_constant(model, rows):
    for row in rows:
        tokens, logits = naive_locore.generate(model, **row, **{**LOCORE, "beta": 0.0}, max_new_tokens=6, eos=[EOS])
        out = model.generate(**row, max_new_tokens=6, do_sample=False)
        assert tokens == out[0, row["input_ids"].shape[1] :].tolist()
        assert len(set(tokens)) > 1
        assert logits.shape == (len(tokens), 100)


def test_attention_is_not_uniform_and_the_image_matters(model, rows):
    row = rows[0]
    out = full_forward(model, row["input_ids"], row["pixel_values"], collect=True)
    last = torch.stack(out.probs)[:, :, -1]
    entropy = -(last * last.clamp_min(1e-30).log()).sum(-1).mean()
    assert entropy < 0.85 * math.log(last.shape[-1])
    other = full_forward(model, row["input_ids"], -row["pixel_values"])
    assert (out.logits[-1] - other.logits[-1]).abs().max() > 0.1
    embedded = merged_embeddings(model, row["input_ids"], row["pixel_values"])
    assert embedded[3:39].std() > 0.2


def test_model_and_processor_round_trip(tmp_path: Path):
    original = tiny_llava(5, layers=2, grid=4)
    original.save_pretrained(tmp_path)
    tiny_processor(original.config).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    picture = Image.new("RGB", (30, 20), (200, 30, 60))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a dog?"}]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    longer = prompt.replace("is there", "Please answer yes or no. is there")
    inputs = processor(images=[[picture], [picture]], text=[prompt, longer], return_tensors="pt", padding=True)
    assert inputs["input_ids"].eq(IMAGE).sum(1).tolist() == [16, 16]
    assert inputs["input_ids"].eq(3).sum() == 0  # no unknown word
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["input_ids"][0, 0] == PAD
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, original(**inputs).logits)
    out = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert processor.batch_decode(out[:, -3:], skip_special_tokens=True)[0].split()


# -------------------------------------------------------------------------------------------------------- LocoRE


def test_locore_row_worked_by_hand():
    gamma = naive_locore.gain_matrix(6, 6, 3, 0.15, 2)
    assert naive_locore.window_keys(5, 3, 2) == [3, 4]
    assert gamma[5].tolist() == [1, 1, 1, 1.15, 1.15, 1]
    assert (gamma[:5] == 1).all()
    a = torch.zeros(1, 6, 6)
    a[0, 5] = torch.tensor([0.40, 0.10, 0.10, 0.10, 0.20, 0.10])
    raw = naive_locore.apply_probs(a, gamma, "post_raw")[0, 5]
    close(raw, [0.40, 0.10, 0.10, 0.115, 0.23, 0.10], 1e-6)
    close(raw.sum(), 1.045, 1e-6)
    renormalised = [0.38278, 0.09569, 0.09569, 0.11005, 0.22010, 0.09569]
    close(naive_locore.apply_probs(a, gamma, "post_renorm")[0, 5], renormalised, 1e-5)
    biased = torch.softmax(naive_locore.apply_scores(a.log(), gamma, "logit_bias")[0, 5], -1)
    close(biased, renormalised, 1e-5)

    z = torch.zeros(1, 6, 6)
    z[0, 5] = torch.tensor([1, -0.5, 0, -0.5, 0.5, 0])
    close(torch.softmax(z[0, 5], -1), [0.3586, 0.0800, 0.1319, 0.0800, 0.2175, 0.1319])
    scaled = torch.softmax(naive_locore.apply_scores(z, gamma, "logit_scale")[0, 5], -1)
    close(scaled[[3, 4]], [0.0734, 0.2319])
    raised = naive_locore.apply_probs(torch.softmax(z, -1), gamma, "post_renorm")[0, 5]
    close(raised[[3, 4]], [0.0881, 0.2394])


def test_locore_window_starts_at_the_right_key(model, rows):
    ids = rows[1]["input_ids"]  # two images
    prompt = ids.shape[1]
    assert naive_locore.output_start(model, ids, prompt, "after_image") == prompt - 4
    assert naive_locore.output_start(model, ids, prompt, "generated") == prompt
    assert naive_locore.output_start(model, rows[2]["input_ids"], 40, "after_image") == 40  # image last
    assert naive_locore.window_keys(10, 9, 5) == [9]
    assert naive_locore.window_keys(9, 9, 5) == []
    assert naive_locore.window_keys(20, 9, 5) == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("mode", naive_locore.MODES)
def test_locore_identity_and_row_sums(model, rows, mode):
    row = rows[0]
    settings = {**LOCORE, "mode": mode}
    plain = full_forward(model, row["input_ids"], row["pixel_values"], collect=True)
    off = naive_locore.edits(model, row["input_ids"], prompt_len=44, **{**settings, "beta": 0.0})
    assert torch.equal(full_forward(model, row["input_ids"], row["pixel_values"], **off).logits, plain.logits)
    on = naive_locore.edits(model, row["input_ids"], prompt_len=44, **settings)
    gained = full_forward(model, row["input_ids"], row["pixel_values"], collect=True, **on)
    assert torch.equal(gained.logits[:-1], plain.logits[:-1])
    assert not torch.equal(gained.logits[-1], plain.logits[-1])
    mass = plain.probs[0][:, -1, 40:43].sum(-1)
    expected = 1 + 0.5 * mass if mode == "post_raw" else torch.ones_like(mass)
    close(gained.probs[0][:, -1].sum(-1), expected, 1e-5)


def test_locore_renormalisation_equals_bias_over_several_tokens(model, rows):
    results = [
        naive_locore.generate(model, **rows[0], **{**LOCORE, "mode": mode}, max_new_tokens=4)
        for mode in ("post_renorm", "logit_bias")
    ]
    assert results[0][0] == results[1][0]
    close(results[0][1], results[1][1])


@pytest.mark.parametrize("history_start", ["after_image", "generated"])
def test_locore_cached_decoding_agrees(model, rows, monkeypatch, history_start):
    """A cached decode that scales only its own last row equals the full sequence with every predictor row scaled."""
    for row in rows:
        prompt = row["input_ids"].shape[1]
        start = naive_locore.output_start(model, row["input_ids"], prompt, history_start)

        def attention(module, query, key, value, attention_mask, scaling, start=start, **kwargs):
            groups = module.num_key_value_groups
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            scores = query @ key.transpose(2, 3) * scaling
            probs = torch.softmax(scores if attention_mask is None else scores + attention_mask, -1)
            last = key.shape[2] - 1
            probs[:, :, -1, max(start, last - 3) : last] *= 1.5
            return (probs @ value).transpose(1, 2), None

        monkeypatch.setattr("transformers.models.llama.modeling_llama.eager_attention_forward", attention)
        model.set_attn_implementation("eager")
        out = model.generate(
            **row, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=[]
        )
        model.set_attn_implementation("sdpa")
        settings = {**LOCORE, "history_start": history_start}
        tokens, logits = naive_locore.generate(model, **row, **settings, max_new_tokens=5)
        assert out.sequences[0, prompt:].tolist() == tokens
        close(torch.cat(out.logits), logits)


def test_locore_generated_leaves_first_tokens_alone(model, rows):
    base = naive_locore.generate(model, **rows[0], **{**LOCORE, "beta": 0.0}, max_new_tokens=3)
    late = naive_locore.generate(
        model, **rows[0], **{**LOCORE, "history_start": "generated"}, max_new_tokens=3, forced=base[0]
    )
    assert torch.equal(late[1][:2], base[1][:2])  # no earlier generated key for the first two rows
    assert not torch.equal(late[1][2], base[1][2])


# ----------------------------------------------------------------------------------------------------------- SCR

HAND_GRID = torch.tensor(
    [[9, 9, 9, 9, 9], [9, 5, 3, 2, 9], [9, 4, 6, 1, 9], [9, 0.5, 0.7, 0.9, 9], [9, 9, 9, 9, 9]], dtype=torch.float32
)


def owned(roles: naive_scr.Roles, row: int, column: int) -> list[tuple[int, int]]:
    return sorted(divmod(n, 5) for n, s in roles[1].items() if s == row * 5 + column)


def test_scr_grid_worked_by_hand():
    two = naive_scr.choose(HAND_GRID, 2)
    assert [divmod(s, 5) for s in two[0]] == [(2, 2), (1, 1)]
    assert owned(two, 2, 2) == [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)]
    assert owned(two, 1, 1) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    three = naive_scr.choose(HAND_GRID, 3)
    assert [divmod(s, 5) for s in three[0]] == [(2, 2), (1, 1), (2, 1)]
    assert owned(three, 2, 2) == [(1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)]
    assert len(owned(three, 1, 1)) == 5
    assert owned(three, 2, 1) == [(3, 0)]
    greedy = naive_scr.choose(HAND_GRID, 2, "greedy_nms")
    assert greedy[0] == [12]
    assert len(owned(greedy, 2, 2)) == 8


def test_scr_choice_edge_cases():
    assert naive_scr.choose(torch.rand(2, 7), 4) == ([], {})
    sources, owners = naive_scr.choose(HAND_GRID, 100)
    assert len(sources) == 9
    assert len(owners) == 16
    tied, _ = naive_scr.choose(torch.ones(4, 5), 2)
    assert tied == [6, 7]
    four = naive_scr.choose(HAND_GRID, 1, neighbourhood="4")[1]
    assert sorted(four) == [7, 11, 13, 17]
    assert len(naive_scr.choose(HAND_GRID, 1, neighbourhood="radius2")[1]) == 24


def test_scr_single_application_and_closed_form():
    roles = [naive_scr.choose(HAND_GRID, 2)]
    once = naive_scr.redistribute(torch.ones(25, 1), roles, 1.1).flatten()
    for patch in range(25):
        close(once[patch], 1 / 1.1 if patch in roles[0][0] else 1.1 if patch in roles[0][1] else 1.0, 1e-6)
    for n, gain, scale, factor in ((12, 0.750, 0.319, 1.511), (16, 0.861, 0.218, 1.587), (21, 0.951, 0.135, 1.649)):
        x = torch.ones(2, 1, dtype=torch.float64)
        for _ in range(n):
            x = naive_scr.redistribute(x, [([0], {1: 0})], 1.1)
        close([x[1, 0] - 1, x[0, 0], (5 * x[1, 0] + x[0, 0]) / 6], [gain, scale, factor], 6e-4)


def test_scr_cache_and_full_recomputation_agree(model, rows):
    settings = {"k_src": 4, "diag_layers": [2, 3]}
    for row in rows:
        chosen = naive_scr.roles(model, **row, **settings)
        tokens, logits = naive_scr.generate(model, **row, lam=1.3, early_layers=[0, 1], max_new_tokens=4, **settings)

        def hook(module, args, output, chosen=chosen):
            if output.shape[1] == 1:
                return output
            return naive_scr.redistribute(output[0], chosen, 1.3)[None]

        handles = [model.model.language_model.layers[layer].register_forward_hook(hook) for layer in (0, 1)]
        out = model.generate(
            **row, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=[]
        )
        for handle in handles:
            handle.remove()
        assert out.sequences[0, row["input_ids"].shape[1] :].tolist() == tokens
        close(torch.cat(out.logits), logits)


def test_scr_roles_and_map(model, rows):
    settings = {"k_src": 4, "diag_layers": [2, 3]}
    maps = naive_scr.attention_map(model, **rows[1], diag_layers=[2, 3])
    assert [tuple(m.shape) for m in maps] == [(6, 6), (6, 6)]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        attentions = model(**rows[1], output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    queries = [38, *range(75, 79)]  # the token between the images and the four at the end
    expected = torch.stack([attentions[layer][0][:, queries, 2:38].mean((0, 1)) for layer in (2, 3)]).mean(0)
    close(maps[0].flatten(), expected, 1e-6)
    chosen = naive_scr.roles(model, **rows[1], **settings)
    assert all(2 <= p < 38 for p in [*chosen[0][0], *chosen[0][1]])
    assert all(39 <= p < 75 for p in [*chosen[1][0], *chosen[1][1]])
    assert naive_scr.roles(model, **rows[2], **settings) == [([], {})]  # no text after the image
    ids, pixels = rows[0]["input_ids"], rows[0]["pixel_values"]
    same = naive_scr.edit(naive_scr.roles(model, ids, pixels, **settings), 1.0, [0, 1])
    assert torch.equal(
        full_forward(model, ids, pixels, hidden_edit=same).logits, full_forward(model, ids, pixels).logits
    )


# ---------------------------------------------------------------------------------------------------------- SGRS


def test_sgrs_score_worked_by_hand():
    product = torch.tensor([[0.06, -0.02, 0, 0.03, -0.01, 0.02], [-0.02, 0.02, 0.04, 0.01, 0.03, 0.06]])
    row = naive_sgrs.normalise(product.abs().sum(0), "row_l2")
    close(row, [0.5774, 0.2887, 0.2887, 0.2887, 0.2887, 0.5774])
    expected = {("row_l2", "mean"): 0.38490, ("row_l1", "mean"): 0.16667, ("row_max", "mean"): 0.66667}
    expected |= {("row_l2", "sum"): 1.15470, ("row_l2", "window_sum"): 0.86603}
    for (norm, reduce), value in expected.items():
        close(naive_sgrs.score_rows([product], [3, 4, 5], norm=norm, reduce=reduce, window=2), value, 1e-5)
    history = [0.30, 0.35, 0.40, 0.38, 0.42, 0.45]
    close(naive_sgrs.threshold(history, 0.6, 5), 0.240, 1e-9)
    close(naive_sgrs.threshold(history, 0.6, 6), 0.230, 1e-9)
    assert naive_sgrs.threshold([], 0.6, 5) == 0.0
    with pytest.raises(ValueError, match="not a number"):
        naive_sgrs.score_rows([product * math.nan], [3], norm="row_l2", reduce="mean", window=1)


def test_sgrs_inverse_cdf():
    assert [naive_sgrs.pick([0.4, 0.2, 0.2], u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.9999)] == [0, 0, 1, 1, 2, 2]


def test_sgrs_candidate_row_is_exactly_zero(model, rows):
    ids = torch.cat([rows[0]["input_ids"], torch.tensor([[17]])], dim=1)
    parts = naive_sgrs.products(model, ids, rows[0]["pixel_values"], 17, layers=range(6), row=-1, loss_row=-2)
    assert all((part == 0).all() for part in parts)
    parts = naive_sgrs.products(model, ids, rows[0]["pixel_values"], 17, layers=range(6), row=-2, loss_row=-2)
    assert all((part != 0).any() for part in parts)


def test_sgrs_gradient_equals_the_transformers_graph(model, rows):
    row = rows[0]
    embeddings = merged_embeddings(model, row["input_ids"], row["pixel_values"])[None].requires_grad_(True)
    model.set_attn_implementation("eager")
    out = model(inputs_embeds=embeddings, output_attentions=True)
    model.set_attn_implementation("sdpa")
    loss = torch.nn.functional.cross_entropy(out.logits[:, -1], torch.tensor([23]))
    gradients = torch.autograd.grad(loss, out.attentions)
    ours = naive_sgrs.products(model, row["input_ids"], row["pixel_values"], 23, layers=range(6))
    for layer in range(6):
        close(ours[layer], (out.attentions[layer] * gradients[layer])[0, :, -1].detach(), 2e-5)


def test_sgrs_precision_bounds_and_columns(model, rows):
    ids, pixels = rows[0]["input_ids"], rows[0]["pixel_values"]
    single = naive_sgrs.saliency(model, ids, pixels, [7, 30, 64], layers=[2, 3])
    double = naive_sgrs.saliency(model, ids, pixels, [7, 30, 64], layers=[2, 3], dtype=torch.float64)
    close(single, double, 1e-5)
    assert len(set(single)) == 3
    assert all(0 < s <= 1 / math.sqrt(5) for s in single)
    assert naive_sgrs.output_columns(model, ids, 44, "after_image", True) == [39, 40, 41, 42, 43]
    assert naive_sgrs.output_columns(model, ids, 44, "after_image", False) == [39, 40, 41, 42]
    assert naive_sgrs.output_columns(model, ids, 44, "generated", True) == []
    assert naive_sgrs.output_columns(model, ids, 42, "generated", True) == [42, 43]
    with pytest.raises(ValueError, match="output column"):
        naive_sgrs.saliency(model, ids, pixels, [7], layers=[2], history_start="generated")


def test_sgrs_raw_gain_does_not_depend_on_the_leaf(model, rows):
    ids, pixels = rows[0]["input_ids"], rows[0]["pixel_values"]
    after = naive_sgrs.products(model, ids, pixels, 9, layers=range(6), locore=LOCORE)
    edits = naive_locore.edits(model, ids, prompt_len=44, **LOCORE)
    before: list[torch.Tensor] = []

    def keep(layer: int, probs: torch.Tensor) -> torch.Tensor:
        before.append(probs)
        return edits["probs_edit"](layer, probs)

    logits = full_forward(model, ids, pixels, leaves=True, probs_edit=keep).logits
    gradients = torch.autograd.grad(-torch.log_softmax(logits[-1], -1)[9], before)
    for layer in range(6):
        close(after[layer], (before[layer] * gradients[layer])[:, -1].detach(), 1e-6)
    plain = naive_sgrs.products(model, ids, pixels, 9, layers=range(6))
    assert (plain[3] - after[3]).abs().max() > 1e-4


def test_sgrs_zero_alpha_in_order_is_greedy(model, rows):
    tokens, trace = naive_sgrs.generate(
        model, **rows[0], **{**SGRS, "alpha": 0.0}, proposal="greedy_order", max_new_tokens=4
    )
    greedy, logits = naive_locore.generate(model, **rows[0], **{**LOCORE, "beta": 0.0}, max_new_tokens=4)
    assert tokens == greedy
    close(torch.stack([record["logits"] for record in trace]), logits, 1e-6)
    assert [len(record["history"]) for record in trace] == [1, 2, 3, 4]
    assert [len(record["J"]) for record in trace] == [5, 6, 7, 8]


def test_sgrs_bookkeeping_of_rejection_and_fallback(model, rows):
    calls: list[tuple[int, int]] = []

    def draws(step: int, draw: int) -> float:
        calls.append((step, draw))
        return 0.0

    tokens, trace = naive_sgrs.generate(model, **rows[0], **{**SGRS, "alpha": 50.0}, draws=draws, max_new_tokens=3)
    assert calls == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert trace[0]["tau"] == 0
    assert not trace[0]["fallback"]
    assert len(trace[0]["S"]) == 1
    for record in trace[1:]:
        assert record["fallback"]
        assert record["rejected"] == record["candidates"][:2]
        assert len(record["S"]) == 4
        assert record["token"] == max(record["S"], key=record["S"].get)
    assert len(trace[2]["history"]) == 3
    assert tokens == [record["token"] for record in trace]
    close(trace[2]["tau"], 50 * sum(trace[1]["history"]) / 2, 1e-9)
    _, stale = naive_sgrs.generate(
        model, **rows[0], **{**SGRS, "alpha": 50.0}, draws=draws, max_new_tokens=2, history_on_fallback=False
    )
    assert len(stale[1]["history"]) == 1


def test_sgrs_skips_without_output_columns(model, rows):
    greedy, _ = naive_locore.generate(model, **rows[0], **{**LOCORE, "beta": 0.0}, max_new_tokens=1)
    late = {**SGRS, "history_start": "generated"}
    tokens, trace = naive_sgrs.generate(model, **rows[0], **late, draws=lambda step, draw: 0.99, max_new_tokens=2)
    assert tokens[0] == greedy[0]
    assert trace[0]["skipped"]
    assert trace[0]["history"] == []
    assert trace[0]["S"] == {}
    assert trace[1]["J"] == [44]
    assert len(trace[1]["history"]) == 1
    assert tokens[1] == trace[1]["candidates"][-1]
    tokens, _ = naive_sgrs.generate(
        model, **rows[0], **late, draws=lambda step, draw: 0.99, max_new_tokens=1, on_skip="proposal"
    )
    assert tokens[0] != greedy[0]
    image_last, trace = naive_sgrs.generate(model, **rows[2], **SGRS, proposal="greedy_order", max_new_tokens=1)
    assert trace[0]["skipped"]
    assert len(image_last) == 1


@pytest.mark.parametrize("mode", ["post_raw", "logit_bias"])
def test_sgrs_with_locore_shares_the_modified_forward(model, rows, mode):
    locore = {**LOCORE, "mode": mode}
    tokens, trace = naive_sgrs.generate(
        model, **rows[0], **SGRS, proposal="greedy_order", locore=locore, max_new_tokens=3
    )
    _, logits = naive_locore.generate(model, **rows[0], **locore, max_new_tokens=3, forced=tokens)
    close(torch.stack([record["logits"] for record in trace]), logits, 1e-6)
    ids = torch.cat([rows[0]["input_ids"], torch.tensor([tokens[:2]])], dim=1)
    candidate, value = next(iter(trace[2]["S"].items()))
    again = naive_sgrs.saliency(
        model, ids, rows[0]["pixel_values"], [candidate], layers=SGRS["layers"], locore=locore, prompt_len=44
    )
    close(again[0], value, 1e-6)
