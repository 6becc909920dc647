"""The saliency recorded, drawn and intervened on, against full-sequence gradients written from the equations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mitigate.adapters import LoadedModel, adapter_for
from mitigate.core import Access, AttentionProbs, Fidelity, Method, ModelFacts, Point, Subscription, Tags
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.diagnostics import saliency_maps
from mitigate.diagnostics.saliency import Saliency, SaliencyObserver
from mitigate.diagnostics.saliency_interventions import SaliencyMarks, TextGain
from mitigate.diagnostics.saliency_stack_maps import under_stack
from mitigate.errors import ConfigError
from mitigate.testing.tiny import Prompt, tiny_model
from tests.references import naive_sgrs
from tests.references.runs import warm_model
from tests.references.tiny import PAD, full_forward, make_inputs, split_rows, tiny_processor

LAYERS = (1, 3)
STEPS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    return warm_model()


def watched(model: Any, inputs: dict[str, Any], methods: Any = None, **options: Any) -> tuple[Any, Any, list[Any]]:
    observer = SaliencyObserver(**{"layers": LAYERS, "candidates": 3, **options})
    with Stack({**(methods or {}), "observer": observer}).attach(model) as handle:
        out = handle.generate(**inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=PAD)
        state = handle.bus.last_request.state("observer")
        diagnostic = Saliency()
        rows = [diagnostic.measure(state, row) for row in range(len(out))]
    return out[:, inputs["input_ids"].shape[1] :], state, rows


def test_recorded_rows_are_those_of_a_full_sequence_pass(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4), (2, 1, 7)])
    tokens, _, rows = watched(model, inputs)
    for row, single in enumerate(split_rows(inputs, 6)):
        ids, prompt = single["input_ids"], single["input_ids"].shape[1]
        for step in range(STEPS):
            target = int(tokens[row, step])
            found = rows[row][step]
            parts = naive_sgrs.products(
                model, ids, single["pixel_values"], target, layers=range(6), dtype=torch.float64
            )
            shares = [naive_sgrs.normalise(part.abs().sum(0), "row_l2") for part in parts]
            first = int((ids[0] == model.config.image_token_id).nonzero().max()) + 1
            where = torch.arange(ids.shape[1])
            image = ids[0] == model.config.image_token_id
            for place, layer in enumerate(range(6)):
                share = shares[layer]
                assert found["score_layers"][place] == pytest.approx(float(share[first:].mean()), rel=2e-3)
                assert found["diagonal_layers"][place] == pytest.approx(float(share[-1]), rel=2e-3, abs=1e-5)
                assert found["image_layers"][place] == pytest.approx(float(share[image].mean()), rel=2e-3)
                groups = [share[where < first][~image[:first]].sum(), share[image].sum()]
                groups += [share[first:prompt].sum(), share[prompt:].sum()]
                np.testing.assert_allclose(found["saliency_groups"][place], groups, rtol=2e-3, atol=1e-5)
            assert found["score"] == pytest.approx(
                sum(float(shares[layer][first:].mean()) for layer in LAYERS) / 2, rel=2e-3
            )
            assert found["columns"] == ids.shape[1] - first
            ids = torch.cat([ids, torch.tensor([[target]])], 1)


def test_probability_entropy_attention_and_candidates(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    tokens, _, ((first, *_),) = watched(model, inputs)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    out = full_forward(model, ids, pixels, collect=True)
    p = out.logits[-1].double().softmax(-1)
    assert first["p"] == pytest.approx(float(p[tokens[0, 0]]), rel=1e-4)
    assert first["entropy"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    text = ids.shape[1] - 4
    wanted = sum(float(out.probs[layer][:, -1].mean(0)[text:].mean()) for layer in LAYERS) / 2
    assert first["attention"] == pytest.approx(wanted, rel=1e-4)
    top = p.topk(3).indices.tolist()
    exact = naive_sgrs.saliency(model, ids, pixels, [int(tokens[0, 0]), *top], layers=LAYERS)
    np.testing.assert_allclose(first["exact"], exact, rtol=2e-3)
    assert len(first["direct"]) == 4
    assert not np.allclose(first["direct"], first["exact"], rtol=1e-2)  # an approximation, measured apart


def test_watching_changes_no_token(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4), (2, 1, 7)])
    plain = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=PAD)
    tokens, _, _ = watched(model, inputs)
    assert torch.equal(plain[:, inputs["input_ids"].shape[1] :], tokens)


def test_cheap_settings_record_the_same_score(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    (_, _, (full,)), (_, _, (cheap,)) = watched(model, inputs), watched(model, inputs, everywhere=False, candidates=0)
    assert [step["score"] for step in cheap] == pytest.approx([step["score"] for step in full], rel=1e-5)
    assert len(cheap[0]["score_layers"]) == len(LAYERS)
    assert "exact" not in cheap[0]


@pytest.mark.parametrize("window", [0, 2])
def test_the_gain_scales_attention_to_earlier_text_only(model: Any, window: int) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    text, prompt = ids.shape[1] - 4, ids.shape[1]
    with Stack([TextGain(gain=0.4, window=window)]).attach(model) as handle:
        out = handle.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
        )

    def edit(layer: int, probs: torch.Tensor) -> torch.Tensor:
        edited = probs.clone()
        for query in range(prompt - 1, probs.shape[1]):
            for key in range(max(text, query - window) if window else text, query):
                edited[:, query, key] *= 0.4
        return edited

    for step in range(3):
        whole = out.sequences[:, : prompt + step]
        wanted = full_forward(model, whole, pixels, probs_edit=edit).logits[-1]
        torch.testing.assert_close(out.logits[step][0], wanted, rtol=1e-3, atol=1e-4)


def test_the_gain_may_be_limited_to_tokens_of_high_saliency(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    pixels, prompt = inputs["pixel_values"], inputs["input_ids"].shape[1]

    def run(above: float) -> tuple[Any, list[bool], list[float]]:
        methods = {
            "marks": SaliencyMarks(above=above, layers="1,3"),
            "gain": TextGain(gain=0.2, marked_by="marks"),
            "observer": SaliencyObserver(layers=LAYERS, candidates=0),
        }
        with Stack(methods).attach(model) as handle:
            out = handle.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=PAD,
                output_logits=True,
                return_dict_in_generate=True,
            )
            request = handle.bus.last_request
            seen = [step["diagonal"] for step in Saliency().measure(request.state("observer"), 0)]
            return out, [bool(marks[0]) for marks in request.state("marks").marks], seen

    _, none, seen = run(1.0)
    assert none == [False] * 4
    middle = sorted(seen[:3])[1]
    out, marked, seen = run(middle * 0.999)
    assert marked == [value > middle * 0.999 for value in seen]
    assert len(set(marked[:3])) == 2

    def edit(layer: int, probs: torch.Tensor) -> torch.Tensor:
        edited = probs.clone()
        for query in range(prompt - 1, probs.shape[1]):
            for place, high in enumerate(marked):
                if high and prompt + place < query:
                    edited[:, query, prompt + place] *= 0.2
        return edited

    for step in range(4):
        wanted = full_forward(model, out.sequences[:, : prompt + step], pixels, probs_edit=edit).logits[-1]
        torch.testing.assert_close(out.logits[step][0], wanted, rtol=1e-3, atol=1e-4)
    plain = full_forward(model, out.sequences[:, : prompt + 3], pixels).logits[-1]
    assert not torch.allclose(out.logits[3][0], plain, atol=1e-3) or not any(marked[:2])


def loaded(model: Any) -> LoadedModel:
    adapter = adapter_for(model)
    return LoadedModel(model, tiny_processor(model.config), adapter, adapter.facts(model))


@pytest.fixture(scope="module")
def mapped(model: Any) -> tuple[Any, Any, torch.Tensor, int]:
    """The map of the token 33 after two written tokens, and a full graph of the same."""
    inputs = make_inputs(model, [(3, 1, 4)])
    found = saliency_maps.token_map(loaded(model), inputs, [50, 60], 33, LAYERS, "paper")
    ids = torch.cat([inputs["input_ids"], torch.tensor([[50, 60]])], 1)
    return found, full_forward(model, ids, inputs["pixel_values"], collect=True, leaves=True), ids, 33


def test_maps_are_those_of_the_equations(model: Any, mapped: Any) -> None:
    found, out, ids, target = mapped
    keep = (ids[0] != model.config.image_token_id).nonzero().flatten()
    wanted = [out.probs[layer] for layer in LAYERS]
    gradients = torch.autograd.grad(-out.logits[-1].log_softmax(-1)[target], wanted, retain_graph=True)
    maps = []
    for a, g in zip(wanted, gradients, strict=True):
        summed = (a * g).abs().sum(0).tril().detach()
        maps.append(summed / summed.norm(dim=1, keepdim=True))
    whole = torch.stack(maps).mean(0)
    np.testing.assert_allclose(found.saliency, whole[keep][:, keep], rtol=5e-3, atol=1e-4)
    attention = torch.stack([a.mean(0) for a in wanted]).mean(0).detach()
    np.testing.assert_allclose(found.attention, attention[keep][:, keep], rtol=1e-3, atol=1e-5)
    assert found.groups == ["system"] * 3 + ["prompt"] * 4 + ["output"] * 2
    assert len(found.texts) == 9
    image = ids[0] == model.config.image_token_id
    share = float(whole[-1][image].sum() / whole[-1].sum())
    assert found.last["saliency"]["image"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("stack", [False, True])
def test_a_map_leaves_out_what_frames_a_picture(stack: bool) -> None:
    tiny = tiny_model("qwen2_vl")
    inputs = tiny.inputs((Prompt("dog ?", (4,)),))
    subject = LoadedModel(tiny.model, tiny.processor, tiny.adapter, tiny.facts)
    roles = tiny.adapter.layout(tiny.model, inputs["input_ids"], None, inputs, tiny.processor).roles[0]
    assert (roles == Role.SEPARATOR).any()
    methods = {"fade": Fade()} if stack else None
    found = saliency_maps.token_map(subject, inputs, [50, 60], 33, LAYERS, "paper", methods)
    text = [int((roles == role).sum()) for role in (Role.SYSTEM, Role.PROMPT)]
    assert found.groups == ["system"] * text[0] + ["prompt"] * text[1] + ["output"] * 2


@dataclass(frozen=True, kw_only=True)
class Fade(Method):
    """Halves the attention of predicting rows to the three columns before them."""

    name: ClassVar[str] = "fade"
    summary: ClassVar[str] = "halves attention"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(writes=frozenset({Point.ATTENTION_PROBS}))

    def subscriptions(self, model: ModelFacts) -> list[Subscription]:
        return [Subscription(point=Point.ATTENTION_PROBS, access=Access.WRITE, layers=(1, 2))]

    def on_attention_probs(self, event: AttentionProbs, state: Any) -> torch.Tensor:
        keys = torch.arange(event.probs.shape[-1])
        near = (keys < event.rows[:, None]) & (keys >= event.rows[:, None] - 3)
        return torch.where(near, 0.5 * event.probs, event.probs)


def test_maps_under_a_stack_are_those_of_the_edited_pass(model: Any, mapped: Any) -> None:
    plain, _, ids, target = mapped
    inputs = make_inputs(model, [(3, 1, 4)])
    found = saliency_maps.token_map(loaded(model), inputs, [50, 60], target, LAYERS, "paper", {"fade": Fade()})

    def edit(layer: int, probs: torch.Tensor) -> torch.Tensor:
        edited = probs.clone()
        for query in range(inputs["input_ids"].shape[1] - 1, probs.shape[1]) if layer in (1, 2) else ():
            edited[:, query, query - 3 : query] *= 0.5
        return edited.detach().requires_grad_() if not edited.requires_grad else edited

    out = full_forward(model, ids, inputs["pixel_values"], collect=True, leaves=True, probs_edit=edit)
    keep = (ids[0] != model.config.image_token_id).nonzero().flatten()
    weights = [out.probs[layer] for layer in LAYERS]
    gradients = torch.autograd.grad(-out.logits[-1].log_softmax(-1)[target], weights, retain_graph=True)
    maps = []
    for a, g in zip(weights, gradients, strict=True):
        summed = (a * g).abs().sum(0).tril().detach()
        maps.append(summed / summed.norm(dim=1, keepdim=True).clamp_min(1e-30))
    attention = torch.stack([a.mean(0) for a in weights]).mean(0).detach()
    np.testing.assert_allclose(found.attention, attention[keep][:, keep], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.saliency, torch.stack(maps).mean(0)[keep][:, keep], rtol=5e-3, atol=1e-4)
    assert not np.allclose(found.saliency[-1], plain.saliency[-1], rtol=0.05)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_maps_with_the_watcher_alone_are_the_plain_ones(model: Any, mapped: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    parts = under_stack(loaded(model), inputs, [50, 60], 33, LAYERS, {})
    keep = (mapped[2][0] != model.config.image_token_id).nonzero().flatten()
    np.testing.assert_allclose(saliency_maps.paper_map(parts)[keep][:, keep], mapped[0].saliency, rtol=5e-3, atol=1e-4)


def test_the_demo_scripts_mixture(model: Any, mapped: Any) -> None:
    _, out, ids, target = mapped
    inputs = make_inputs(model, [(3, 1, 4)])
    found = saliency_maps.token_map(loaded(model), inputs, [50, 60], 33, LAYERS, "legacy_demo")
    (gradient,) = torch.autograd.grad(-out.logits[-1].log_softmax(-1)[target], [out.probs[0]], retain_graph=True)
    product = (out.probs[0] * gradient).detach()
    keep = (ids[0] != model.config.image_token_id).nonzero().flatten()
    scores: list[torch.Tensor] = []
    full_forward(model, ids, inputs["pixel_values"], scores_edit=lambda layer, z: (scores.append(z), z)[1])
    total = 0.0
    for score in scores:
        one = (score.masked_fill(score.isinf(), 0.0) * product).abs().mean(0)[keep][:, keep]
        total = total + (one - one.min()) / (one.max() - one.min())
    wanted = torch.log1p(torch.as_tensor(total))
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
    assert len(scores) == 6
    np.testing.assert_allclose(found.saliency, wanted, rtol=2e-2, atol=2e-3)


def test_maps_leave_the_model_as_it_was(model: Any) -> None:
    inputs = make_inputs(model, [(3, 1, 4)])
    before = model(**inputs).logits
    implementation = model.config.text_config._attn_implementation
    saliency_maps.token_map(loaded(model), inputs, [50], 33, LAYERS, "legacy_demo")
    assert model.config.text_config._attn_implementation == implementation
    assert torch.equal(model(**inputs).logits, before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_map_is_drawn(mapped: Any, tmp_path: Path) -> None:
    from mitigate.diagnostics.saliency_figures import draw_map

    path = draw_map(mapped[0], "a title", tmp_path, "map")
    assert path.stat().st_size > 10_000
    assert path.with_suffix(".svg").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"maps": "other"}, "diagnostic.maps="),
        ({"candidates": 1}, "diagnostic.candidates=1"),
        ({"gains": (-1.0,)}, "diagnostic.gains="),
        ({"sample": "a"}, "diagnostic.token=-1"),
        ({"bins": 0}, "diagnostic.bins=0"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Saliency(**parameters)


def test_an_unknown_sample_is_named() -> None:
    with pytest.raises(ConfigError, match=r"diagnostic\.sample=x"):
        saliency_maps.choose(Saliency(sample="x", token=0), [])
