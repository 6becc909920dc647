"""PaliGemma 1 and 2: the layout against the processor, positions and masks against what ``generate`` does."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.paligemma import PaliGemmaAdapter
from mitigate.core import Access, Point, Rows, Subscription
from mitigate.core.direct import DirectPath
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import LayoutError
from mitigate.testing.tiny_paligemma import build, build_2
from tests.adapters import merged
from tests.adapters.test_families import Lens
from tests.core.test_points import Probe

SIDE, PATCH = 5, 4
ADAPTER = PaliGemmaAdapter()
BUILDS = pytest.mark.parametrize("version", [build, build_2])
WORDS = st.lists(st.sampled_from(["red", "dog", "?", "street"]), max_size=4)


@cache
def tiny(version: Any = build) -> Any:
    return version()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 24, 3), dtype=np.uint8))


def batch(version: Any, *pictures: int) -> Any:
    model, processor = tiny(version)
    texts = ["dog", "is there a red cup on the table ?", "near the tree"]
    images = [[picture(10 * row + index) for index in range(count)] for row, count in enumerate(pictures)]
    return ADAPTER.inputs(model, processor, texts[: len(pictures)], images)


def layout_of(inputs: Any) -> Any:
    model, processor = tiny()
    return ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(WORDS, st.integers(1, 3), WORDS), min_size=1, max_size=3))
def test_layout_of_any_batch(prompts: Any) -> None:
    """Words, pictures (25 tokens each), <bos>, words, a line break: the processor's rule."""
    _, processor = tiny()
    texts = [" ".join([*before, "<image>" * count, *after]) for before, count, after in prompts]
    flat = [picture(seed) for seed in range(sum(count for _, count, _ in prompts))]
    inputs = processor(text=texts, images=flat, return_tensors="pt", padding=True, padding_side="left")
    layout, image = layout_of(inputs), 0
    for row, (before, count, after) in enumerate(prompts):
        roles = [Role.SYSTEM] * len(before) + [Role.IMAGE] * (25 * count) + [Role.PROMPT] * (len(after) + 2)
        start = inputs["input_ids"].shape[1] - len(roles)
        assert layout.roles[row].tolist() == [Role.PAD] * start + roles
        assert len(layout.images[row]) == count
        for place, span in enumerate(layout.images[row]):
            first = start + len(before) + 25 * place
            assert (span.image, span.grid, span.stop) == (image, (SIDE, SIDE), first + 25)
            assert span.positions.tolist() == list(range(first, first + 25))
            image += 1


@BUILDS
def test_inputs_are_those_of_the_processor(version: Any) -> None:
    _, processor = tiny(version)
    ours = batch(version, 1, 2)
    texts = ["<image>dog", "<image><image>is there a red cup on the table ?"]
    images = [picture(0), picture(10), picture(11)]
    theirs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
    for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
        assert torch.equal(ours[name], theirs[name])


@BUILDS
@pytest.mark.parametrize("pictures", [(1, 2), (1, 0), (0, 0)])
def test_a_prompt_run_by_hand_is_the_first_step_of_generate(version: Any, pictures: tuple[int, ...]) -> None:
    """Positions from 1, padding included, and a prompt that sees all of itself."""
    model, _ = tiny(version)
    inputs = batch(version, *pictures)
    seen: list[Any] = []
    with model.model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True):
        first = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        ).logits[0]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pixels = {"pixel_values": inputs["pixel_values"]} if any(pictures) else {}
    more = ADAPTER.prompt_inputs(model, ids, mask, pixels)
    for name in more:
        assert torch.equal(more[name], seen[0][name])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **pixels, **more).logits[:, -1]
    torch.testing.assert_close(logits, first, rtol=1e-5, atol=1e-5)


def test_positions_hold_the_patches_in_raster_order() -> None:
    model, _ = build()
    inputs = batch(build, 1, 2)
    merged.apart(model.model.vision_tower)
    layout, plain = layout_of(inputs), merged.embeddings(model, inputs)
    for row, spans in enumerate(layout.images):
        for span in spans:
            for down, across in ((0, 3), (2, 1), (4, 4)):
                pixels = inputs["pixel_values"].clone()
                place = (slice(PATCH * down, PATCH * (down + 1)), slice(PATCH * across, PATCH * (across + 1)))
                pixels[span.image, :, *place] += 1.0
                painted = merged.embeddings(model, {**inputs, "pixel_values": pixels})
                assert merged.changed(plain, painted) == [(row, int(span.positions[down * SIDE + across]))]


def test_pixels_go_back_where_they_came_from() -> None:
    inputs = batch(build, 1, 2)
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert torch.equal(ADAPTER.with_images(inputs, images, layout)["pixel_values"], inputs["pixel_values"])
    chosen = ADAPTER.chosen_images(inputs, [2, 0, 0], layout)
    assert torch.equal(chosen["pixel_values"], inputs["pixel_values"][[2, 0, 0]])


def test_a_prompt_without_its_picture_keeps_its_words() -> None:
    model, processor = tiny()
    row = ADAPTER.without_images(model, batch(build, 2)["input_ids"][0], processor)
    assert processor.tokenizer.convert_ids_to_tokens(row) == ["<s>", "dog", "\n"]


@pytest.mark.parametrize("damage", ["tokens", "pixels"])
def test_tokens_and_pixels_that_do_not_fit_are_refused(damage: str) -> None:
    inputs = dict(batch(build, 2))
    if damage == "tokens":
        inputs |= {name: inputs[name][:, 1:] for name in ("input_ids", "attention_mask")}
    else:
        inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(LayoutError):
        layout_of(inputs)


def served(model: Any, processor: Any, probe: Probe, inputs: Any, **more: Any) -> Any:
    with Stack([probe]).attach(model, processor) as handle:
        return handle.generate(**inputs, **options(**more))


def options(**more: Any) -> dict[str, Any]:
    return {
        "max_new_tokens": 16, "do_sample": False, "eos_token_id": [], "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True, **more,
    }  # fmt: skip


def probe(access: Access, function: Any = lambda event: None, **more: Any) -> Probe:
    chosen: dict[str, Any] = {"layers": (0, 1, 2, 3), "rows": Rows.LAST, **more}
    return Probe(subscription=Subscription(point=Point.ATTENTION_PROBS, access=access, **chosen), function=function)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1, 2, 3)])
def test_capped_attention_in_sliding_layers_is_left_as_it_is(layers: tuple[int, ...]) -> None:
    """PaliGemma 2 runs eager attention: capped scores, and windows that lose keys while an answer is written."""
    model, processor = tiny(build_2)
    inputs = batch(build_2, 1, 2)
    plain = model.generate(**inputs, **options())
    reader = probe(Access.READ, layers=layers)
    read = served(model, processor, reader, inputs)
    assert torch.equal(torch.stack(read.logits), torch.stack(plain.logits))
    same = served(model, processor, probe(Access.WRITE, lambda event: event.probs.clone(), layers=layers), inputs)
    torch.testing.assert_close(torch.stack(same.logits), torch.stack(plain.logits), rtol=1e-5, atol=1e-5)
    assert torch.equal(same.sequences, plain.sequences)
    slid = [event for event in reader.seen if event.layer == 0 and event.step == 15]
    for event in slid:  # 12 keys: of the prompt, the pictures are long out of sight
        assert int((event.probs[0, 0] > 0).sum(-1).max()) == 12


def test_weights_are_those_of_capped_scores() -> None:
    model, processor = tiny(build_2)
    inputs = batch(build_2, 1, 2)
    reader = probe(Access.READ, rows=Rows.ALL)
    served(model, processor, reader, inputs, max_new_tokens=1)
    given: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out: given.append(out[1]))
        for layer in model.model.language_model.layers
    ]
    model.generate(**inputs, **options(max_new_tokens=1))
    for hook in hooks:
        hook.remove()
    for event in reader.seen:
        rows = event.row_mask
        expected = given[event.layer].transpose(1, 2)[rows]
        torch.testing.assert_close(event.probs.transpose(1, 2)[rows], expected, rtol=0, atol=1e-6)
        ahead = event.probs[0].triu(1)
        assert bool((ahead > 0).any())  # prompt tokens see what follows them


def test_the_cap_of_logits_is_theirs_for_the_lens_and_on_the_direct_path() -> None:
    model, processor = tiny(build_2)
    seen: list[torch.Tensor] = []
    lens = Lens(
        subscription=Subscription(point=Point.LOGIT_LENS, layers=(3,)), function=lambda event: seen.append(event.logits)
    )
    found = served(model, processor, lens, batch(build_2, 1, 2), max_new_tokens=2)
    torch.testing.assert_close(torch.stack(seen), torch.stack(found.logits), rtol=1e-5, atol=1e-5)
    path, norm = DirectPath(model, ADAPTER), ADAPTER.final_norm(model)
    with ExitStack() as undo:
        path.install(undo)
        for layer, block in enumerate(model.model.language_model.layers):
            ADAPTER.output_norm(block)(torch.randn(1, 1, 32))
            assert layer in path._normed
        raw = model.lm_head(norm(torch.randn(1, 1, 32)))[0].requires_grad_()
    rows = {0: (torch.rand(1, 4, 3), torch.rand(1, 2, 3, 8))}
    cotangent, cap = torch.randn(raw.shape), 4.0
    (through,) = torch.autograd.grad(cap * torch.tanh(raw / cap), raw, cotangent)
    capped = path.gradients(rows, cotangent)[0]
    model.config.text_config.final_logit_softcapping = None
    try:
        torch.testing.assert_close(capped, path.gradients(rows, through)[0], rtol=1e-4, atol=1e-5)
    finally:
        model.config.text_config.final_logit_softcapping = cap
    assert not torch.allclose(cotangent, through, rtol=0.1)
