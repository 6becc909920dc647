"""The saliency itself: arithmetic worked by hand, invariants, the official code's row, and the direct path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mitigate.core import Access, Fidelity, Method, Point, Rows, Subscription, Tags
from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.core.stack import Stack
from mitigate.methods.sgrs import SGRS
from mitigate.ops.saliency import NORMS, cotangent, last_columns, layer_shares, normalised, reduced, saliency_row
from tests.references import naive_sgrs
from tests.references.tiny import PAD, full_forward, make_inputs, split_rows, tiny_llava

PROMPTS = [(3, 1, 6), (2, 2, 4), (4, 1, 1)]


def traced(model, method, inputs, steps=3, **kwargs):
    with Stack([method]).attach(model) as handle:
        handle.generate(**inputs, max_new_tokens=steps, do_sample=False, pad_token_id=PAD, trace=True, **kwargs)
        return handle.trace()


# ------------------------------------------------------------------------------------------------------ worked by hand

PRODUCT = torch.tensor([[[0.06, -0.02, 0, 0.03, -0.01, 0.02], [-0.02, 0.02, 0.04, 0.01, 0.03, 0.06]]])
OUTPUT = torch.tensor([[False, False, False, True, True, True]])


def test_a_row_worked_by_hand():
    row = saliency_row(PRODUCT, torch.ones_like(PRODUCT))
    torch.testing.assert_close(row, torch.tensor([[0.08, 0.04, 0.04, 0.04, 0.04, 0.08]]))
    assert float(row.norm()) == pytest.approx(0.138564, abs=1e-6)
    share = normalised(row, "row_l2")
    expected = torch.tensor([[0.5774, 0.2887, 0.2887, 0.2887, 0.2887, 0.5774]])
    torch.testing.assert_close(share, expected, atol=5e-5, rtol=0)
    assert float(reduced(share, OUTPUT, "mean")) == pytest.approx(0.38490, abs=1e-5)
    assert float(reduced(share, OUTPUT, "mean")) <= 3**-0.5 == pytest.approx(0.5774, abs=1e-4)
    assert float(reduced(normalised(row, "row_l1"), OUTPUT, "mean")) == pytest.approx(0.16667, abs=1e-5)
    assert float(reduced(normalised(row, "row_max"), OUTPUT, "mean")) == pytest.approx(0.66667, abs=1e-5)
    assert float(reduced(share, OUTPUT, "sum")) == pytest.approx(1.15470, abs=1e-5)
    cut = last_columns(OUTPUT, 2)
    assert cut.tolist() == [[False] * 4 + [True] * 2]
    assert float(reduced(share, cut, "window_sum")) == pytest.approx(0.28868 + 0.57735, abs=1e-5)


def test_the_threshold_worked_by_hand():
    state = SimpleNamespace(history=[[0.30, 0.35, 0.40, 0.38, 0.42, 0.45], []])
    event = SimpleNamespace(logits=torch.zeros(2, 5))
    tau = SGRS(window_rule="last_w")._threshold(state, event)
    assert tau.tolist() == pytest.approx([0.240, 0.0], abs=1e-6)
    assert 0.20 < float(tau[0]) <= 0.3849  # .20 is rejected, .3849 accepted
    assert SGRS(window_rule="w_plus_1")._threshold(state, event)[0] == pytest.approx(0.230, abs=1e-6)


def layout_by_hand(length):
    """Two rows: one picture with padding before; two pictures, the second one last but two."""
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
    ("values", "length", "expected"),
    [
        ({}, 8, [[4, 5, 6, 7], [6, 7]]),  # the last prompt row predicts the first token
        ({"include_diagonal": False}, 8, [[4, 5, 6], [6]]),
        ({}, 10, [[4, 5, 6, 7, 8, 9], [6, 7, 8, 9]]),
        ({"history_start": "generated"}, 8, [[], []]),
        ({"history_start": "generated"}, 9, [[8], [8]]),
        ({"history_start": "generated", "include_diagonal": False}, 9, [[], []]),
        ({"reduce": "window_sum", "window": 3}, 8, [[5, 6, 7], [6, 7]]),
        ({"reduce": "window_sum", "window": 3, "include_diagonal": False}, 10, [[6, 7, 8], [6, 7, 8]]),
    ],
)
def test_the_columns_of_earlier_text(values, length, expected):
    mask = SGRS(**values)._earlier_text(layout_by_hand(length), length - 1)
    assert mask.shape == (2, length)
    assert [row.nonzero().flatten().tolist() for row in mask] == expected


# ----------------------------------------------------------------------------------------------------------- invariants


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 4), keys=st.integers(2, 9), power=st.integers(-36, 18))
def test_scale_heads_and_bounds(seed, heads, keys, power):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, heads, keys, generator=generator).softmax(-1)
    gradient = torch.randn(3, heads, keys, generator=generator)
    columns = torch.rand(3, keys, generator=generator) > 0.4
    (share,) = layer_shares([(attention, gradient)], [columns], norm="row_l2", reduce="mean")
    (scaled,) = layer_shares([(attention, gradient * 10.0**power)], [columns], norm="row_l2", reduce="mean")
    torch.testing.assert_close(scaled, share, rtol=1e-4, atol=1e-6)  # also where squares leave float32
    row = saliency_row(attention, gradient)
    torch.testing.assert_close(normalised(row, "row_l2").norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(normalised(row / heads, "row_l2"), normalised(row, "row_l2"))  # mean over heads
    count = columns.sum(-1)
    assert bool((share[:, 0] >= 0).all())
    assert bool((share[:, 0] <= count.clamp_min(1) ** -0.5 + 1e-6).all())
    assert bool((share[count == 0] == 0).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_of_zeros_stays_one(norm):
    assert torch.equal(normalised(torch.zeros(2, 5), norm), torch.zeros(2, 5))


@given(seed=st.integers(0, 10**6), spread=st.floats(0.1, 12.0))
def test_the_cotangent_is_the_cross_entropys_gradient(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(3, 20, generator=generator, dtype=torch.float64) * spread).requires_grad_()
    token = torch.randint(20, (3,), generator=generator)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, token, reduction="sum"), logits)
    found = cotangent(logits.detach().float(), token, unit=False)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5)
    unit = cotangent(logits.detach().float(), token)
    torch.testing.assert_close(unit.double(), gradient / gradient.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lead", [10.0, 60.0, 300.0, 60000.0])
def test_a_certain_token_has_a_finite_score_and_the_right_one(dtype, lead):
    """p -> 1: the gradient vanishes and its direction does not; a score of zero would be a rejection for nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, generator=generator)
    logits[0, 7] = lead
    weights = torch.randn(50, 4, 9, generator=generator, dtype=torch.float64)
    rounded = logits.to(dtype)
    away = cotangent(rounded.float(), torch.tensor([7]))
    gradient = torch.einsum("bv,vhk->bhk", away.to(dtype).double(), weights)  # the model's own precision
    attention = torch.full((1, 4, 9), 1 / 9)
    columns = torch.arange(9)[None] >= 4
    (share,) = layer_shares([(attention, gradient.float())], [columns], norm="row_l2", reduce="mean")
    others = rounded.double().index_fill(1, torch.tensor([7]), -math.inf).softmax(-1)
    others[0, 7] = -1.0
    product = (attention * torch.einsum("bv,vhk->bhk", others, weights))[0]
    expected = naive_sgrs.score_rows([product], range(4, 9), norm="row_l2", reduce="mean", window=1)
    assert float(share) == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 2e-3)


def test_where_a_cut_off_leaves_one_token_the_direction_is_its_own():
    """Rows: only token 1 is left; two are left; none is excluded."""
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf], [1.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]])
    away = cotangent(logits, torch.tensor([1, 1, 1]))
    expected = torch.tensor([[0.0, -1.0, 0.0], [0.5**0.5, -(0.5**0.5), 0.0], [0.5, -1.0, 0.5]])
    expected[2] /= 1.5**0.5
    torch.testing.assert_close(away, expected)
    assert cotangent(logits, torch.tensor([1, 1, 1]), unit=False)[0].abs().sum() == 0


def test_a_leaf_of_ones_gives_attention_times_gradient():
    """The adapter of the authors' demonstrations: multiply A by ones and differentiate with respect to the ones."""
    model = tiny_llava(seed=0)
    sample = split_rows(make_inputs(model, PROMPTS[:1], seed=0), 6)[0]
    ones: dict[int, torch.Tensor] = {}

    def multiply(layer, probs):
        ones[layer] = torch.ones_like(probs, requires_grad=True)
        return probs * ones[layer]

    ids, pixels = sample["input_ids"], sample["pixel_values"]
    logits = full_forward(model, ids, pixels, leaves=True, probs_edit=multiply).logits
    loss = -torch.log_softmax(logits[-1], -1)[9]
    found = torch.autograd.grad(loss, [ones[layer] for layer in range(6)])
    for layer, product in enumerate(naive_sgrs.products(model, ids, pixels, 9, layers=range(6))):
        torch.testing.assert_close(found[layer][:, -1], product, rtol=0, atol=1e-6)


def test_a_cached_step_has_the_full_sequences_saliency():
    """Against float64: the one-token graph over a detached cache leaves nothing out."""
    model = tiny_llava(seed=4)
    inputs = make_inputs(model, PROMPTS, seed=4)
    traces = traced(model, SGRS(alpha=9.0, layers="1,4", proposal="greedy_order"), inputs, steps=4, eos_token_id=[])
    for row, sample in enumerate(split_rows(inputs, 6)):
        ids = sample["input_ids"]
        prompt_len = ids.shape[1]
        for trace in traces:
            candidates, scores = trace.values["candidates"][row], trace.values["saliency"][row]
            known = [place for place, score in enumerate(scores) if not math.isnan(score)]
            expected = naive_sgrs.saliency(
                model, ids, sample["pixel_values"], [candidates[place] for place in known], layers=[1, 4],
                prompt_len=prompt_len, dtype=torch.float64,
            )  # fmt: skip
            assert [scores[place] for place in known] == pytest.approx(expected, abs=5e-6)
            token = candidates[trace.values["chosen_place"][row]]
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


# ---------------------------------------------------------------------------------------------- the official code's row


def test_the_official_procedure_scores_zero():
    """Append a candidate, take the loss before it, read its own row: zero for every candidate and every layer."""
    model = tiny_llava(seed=0)
    sample = split_rows(make_inputs(model, PROMPTS[:1], seed=0), 6)[0]
    ids, pixels = sample["input_ids"], sample["pixel_values"]
    top = full_forward(model, ids, pixels).logits[-1].topk(5).indices.tolist()
    scores = naive_sgrs.official_scores(model, ids, pixels, top, layers=range(6), start=39)
    assert scores == [[0.0] * 6] * 5
    assert all(value > 0 for value in naive_sgrs.saliency(model, ids, pixels, top, layers=range(6)))


def test_the_negative_control_is_plain_sampling_of_the_candidates():
    """A score of zero against a threshold of zero: the first draw always passes, and no gradient is needed."""
    model = tiny_llava(seed=2)
    inputs = make_inputs(model, PROMPTS, seed=2)
    method = SGRS.preset("official-code", layers="2-3")
    traces = traced(model, method, inputs, steps=6, seed=1)
    for trace in traces:
        scores = [score for row in trace.values["saliency"] for score in row if not math.isnan(score)]
        assert set(scores) <= {0.0}
        assert scores
        assert trace.values["threshold"] == [0.0] * 3
        assert not any(refused for row in trace.values["rejected"] for refused in row)
    free = traced(model, SGRS(alpha=0.0, layers="2-3"), inputs, steps=6, seed=1)
    assert [trace.values["chosen_place"] for trace in traces] == [trace.values["chosen_place"] for trace in free]
    assert {place for trace in traces for place in trace.values["chosen_place"]} > {0}


def test_in_half_precision_the_official_clamp_gives_no_number():
    """Zero over a clamp that rounds to zero: all candidates are rejected, and the most probable one is taken."""
    row = torch.zeros(9, dtype=torch.float16)
    score = float((row / row.norm().clamp(min=1e-9)).mean())
    assert math.isnan(score)
    assert not score >= 0.0
    assert max({"most probable": score, "second": score}.items(), key=lambda item: item[1])[0] == "most probable"


# ------------------------------------------------------------------------------------------------------ the direct path


@dataclass(frozen=True, kw_only=True)
class Asks(Method):
    """Keeps the gradients of a cotangent at every step."""

    name: ClassVar[str] = "asks"
    summary: ClassVar[str] = "keeps gradients"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset({Point.ATTENTION_PROBS, Point.TOKEN_CHOSEN}), gradient=True)
    found: ClassVar[dict] = {}

    access: str
    orthogonal: bool = True

    @property
    def needs_gradient(self):
        return self.access == "gradient"

    def subscriptions(self, model):
        last = (model.layers - 1,)
        return [
            Subscription(point=Point.ATTENTION_PROBS, access=Access(self.access), layers=last, rows=Rows.LAST),
            Subscription(point=Point.TOKEN_CHOSEN),
        ]

    def on_attention_probs(self, event, state):
        pass

    def on_token_chosen(self, event, state):
        away = cotangent(event.logits, event.tokens)
        if self.orthogonal:  # to the logits: then the norm's own scale does not move
            away = away - event.logits * (away * event.logits).sum(-1, keepdim=True) / event.logits.pow(2).sum(
                -1, keepdim=True
            )
        found = event.attention_gradients(away)
        self.found[self.access, event.step] = found
        assert not any(part.requires_grad for pair in found.values() for part in pair)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_direct_path_is_exact_where_nothing_else_moves(kv_heads):
    """Last layer, no MLP, a cotangent that leaves the norm's scale alone: both gradients are the same."""
    model = tiny_llava(seed=1, layers=2, kv_heads=kv_heads)
    model.model.language_model.layers[-1].mlp.down_proj.weight.zero_()
    model.model.language_model.norm.weight.copy_(torch.rand(64) + 0.5)
    inputs = make_inputs(model, PROMPTS, seed=1)
    Asks.found.clear()
    for orthogonal, same in ((True, True), (False, False)):
        stack = {access: Asks(access=access, orthogonal=orthogonal) for access in ("gradient", "direct")}
        with Stack(stack).attach(model) as handle:
            handle.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=PAD, eos_token_id=[])
        for step in range(3):
            (exact,), (direct,) = (Asks.found[access, step].values() for access in ("gradient", "direct"))
            torch.testing.assert_close(exact[0], direct[0])
            size = float(exact[1].abs().max())
            assert size > 1e-3
            assert (float((exact[1] - direct[1]).abs().max()) <= 1e-4 * size) == same
