"""InstructBLIP against its processor, and against its own forward, in which the picture is embedded by the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import T5Config

from mitigate.adapters.instructblip import InstructBlipAdapter
from mitigate.core import Access, Point, Subscription
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing.tiny_instructblip import build
from tests.core.test_branches import Contrast
from tests.core.test_points import Probe

ADAPTER, QUERIES = InstructBlipAdapter(), 8
PICTURES = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
PROMPT = st.tuples(st.integers(0, 2), st.integers(1, 6))


@cache
def tiny():
    return build()


def picture(seed):
    noise = torch.rand(3, 9 + seed, 12, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def made(texts, pictures):
    return ADAPTER.inputs(*tiny(), texts, pictures)


def layout_of(inputs):
    return ADAPTER.layout(tiny()[0], inputs["input_ids"], inputs["attention_mask"], inputs)


@settings(max_examples=25, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=4))
def test_layout_of_any_batch(prompts):
    inputs = made(["red " * words for _, words in prompts], [[picture(n) for n in range(some)] for some, _ in prompts])
    layout = layout_of(inputs)
    image, width = 0, inputs["input_ids"].shape[1]
    for row, (some, words) in enumerate(prompts):
        roles = [Role.IMAGE] * QUERIES * some + [Role.PROMPT] * (1 + words)  # the text begins with <s>
        padding = width - len(roles)
        assert layout.prompt_roles[row].tolist() == [Role.PAD] * padding + roles
        assert int(layout.after_image[row]) == padding + QUERIES * some
        assert [span.image for span in layout.images[row]] == list(range(image, image + some))
        image += some
        for number, span in enumerate(layout.images[row]):
            assert span.grid is None
            assert torch.equal(span.positions, padding + number * QUERIES + torch.arange(QUERIES))


def test_inputs_are_those_of_the_processor():
    model, processor = tiny()
    text = "describe this image"
    theirs = processor(text=[text], images=[picture(1)], return_tensors="pt")
    ours = made([text], [[picture(1)]])
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    short = made(["dog", text], [[], [picture(1)]])
    long = model.generate(**short, max_new_tokens=4, do_sample=False, eos_token_id=[])
    alone = model.generate(**ours, max_new_tokens=4, do_sample=False, eos_token_id=[])
    assert torch.equal(long[1, -4:], alone[0, -4:])
    both = made([text, "dog"], [[picture(1)], [picture(2)]])  # a short question beside a long one is answered the same
    found, expected = (
        model.get_image_features(**{name: given[name] for name in PICTURES}).pooler_output[-1]
        for given in (both, made(["dog"], [[picture(2)]]))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    told = processor.tokenizer(["dog"], return_tensors="pt")
    said = model.language_model.generate(**told, max_new_tokens=4, do_sample=False, eos_token_id=[])
    unseen = model.generate(**made(["dog"], [[]]), max_new_tokens=4, do_sample=False, eos_token_id=[])
    assert torch.equal(long[0, -4:], said[0, -4:])
    assert torch.equal(unseen, said)


def test_text_begins_after_the_padding_that_the_processor_puts_behind_the_picture():
    _, processor = tiny()
    texts = ["dog", "what is in the street"]
    inputs = processor(
        text=texts, images=[picture(1), picture(2)], return_tensors="pt", padding=True, padding_side="left"
    )
    layout = layout_of(inputs)
    assert layout.prompt_roles[0].tolist() == [Role.IMAGE] * QUERIES + [Role.PAD] * 4 + [Role.PROMPT] * 2
    assert layout.after_image.tolist() == [QUERIES + 4, QUERIES]
    assert layout.text_queries(0, layout.images[0][0]).tolist() == [QUERIES + 4, QUERIES + 5]


def test_an_embedded_prompt_is_what_the_model_embeds():
    model, _ = tiny()
    inputs = made(["describe this image", "dog"], [[picture(1)], [picture(2), picture(3)]])
    seen = []
    hook = model.language_model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    model(**inputs)
    hook.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pictures = ADAPTER.chosen_images(inputs, [0, 1, 2], layout_of(inputs))
    found = ADAPTER.prompt_inputs(model, ids, mask, pictures)
    assert torch.equal(found["inputs_embeds"], seen[0]["inputs_embeds"])
    assert found["position_ids"][0].tolist() == [0] * 6 + list(range(12))
    assert set(ADAPTER.prompt_inputs(model, ids, mask, {})) == {"position_ids"}


def test_pixels_of_pictures():
    inputs = made(["describe this image", "dog"], [[picture(1)], [picture(2), picture(3)]])
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    same = ADAPTER.with_images(inputs, images, layout)
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    chosen = ADAPTER.chosen_images(inputs, [2, 0], layout)
    other = made(["dog", "describe this image"], [[picture(3)], [picture(1)]])
    assert set(chosen) == set(PICTURES)
    assert all(torch.equal(chosen[name], other[name]) for name in chosen)
    unseen = made(["dog"], [[]])
    assert ADAPTER.images(unseen, layout_of(unseen)) == []


class Looker(Contrast):
    """Contrasts with a branch that sees negatives, and notes which pictures are projected for it."""

    tags = replace(Contrast.tags, reads=frozenset({Point.VISUAL_EMBEDDINGS}))

    def subscriptions(self, model):
        there = frozenset({self.branch})
        looks = Subscription(point=Point.VISUAL_EMBEDDINGS, access=Access.READ, branches=there)
        return [*super().subscriptions(model), looks]

    def on_visual_embeddings(self, event, state):
        state.trace(event, seen=float(event.features[0].sum()))


def test_a_branch_sees_its_own_pictures():
    model, processor = tiny()
    inputs = made(["describe this image", "dog"], [[picture(1)], [picture(2)]])
    expected, found = [], inputs["input_ids"]
    negative = {**inputs, "pixel_values": -inputs["pixel_values"]}
    for _ in range(4):
        mask = torch.nn.functional.pad(
            inputs["attention_mask"], (0, found.shape[1] - inputs["input_ids"].shape[1]), value=1
        )
        now = {"input_ids": found, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        main, other = (model(**{**given, **now}).logits[:, -1] for given in (inputs, negative))
        expected.append(other)
        found = torch.cat([found, (2 * main - other).argmax(-1)[:, None]], 1)
    method = Looker(images=True, point=Point.IMAGE_INPUT)
    with Stack([method]).attach(model, processor) as handle:
        given = handle.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=[], trace=True)
        traces = handle.trace()
    assert torch.equal(given, found)
    others = [trace.values["other"] for trace in traces if "other" in trace.values]
    torch.testing.assert_close(torch.tensor(others), torch.stack(expected), rtol=0, atol=2e-4)
    shown = model.get_image_features(**{name: negative[name] for name in PICTURES}).pooler_output.detach()
    assert [trace.values["seen"] for trace in traces if "seen" in trace.values] == [
        pytest.approx(float(shown[0].sum()))
    ]


def test_what_cannot_be_served_is_refused():
    model, processor = tiny()
    inputs = made(["describe this image", "dog"], [[picture(1)], [picture(2)]])
    with pytest.raises(LayoutError, match="7 image tokens in a row"):
        layout_of(
            {**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": inputs["attention_mask"][:, 1:]}
        )
    with pytest.raises(LayoutError, match="bring 2 pictures"):
        layout_of({**inputs, "input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]})
    config = copy.deepcopy(model.config)
    config.text_config = T5Config()
    with pytest.raises(UnsupportedModel, match=r"language model \(t5\) is an encoder with a decoder"):
        ADAPTER.facts_of_config(config)
    reader = Probe(
        subscription=Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.READ), function=lambda event: None
    )
    with Stack([reader]).attach(model, processor) as handle:
        with pytest.raises(UnsupportedModel, match="leave prefill_chunk_size unset"):
            handle.generate(**inputs, prefill_chunk_size=5, max_new_tokens=2)
        with pytest.raises(LayoutError, match="pass input_ids to generate"):
            model(**inputs)
