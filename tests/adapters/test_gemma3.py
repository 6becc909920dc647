"""Gemma 3: the layout against the rule of pan-and-scan and the processor's words, pooling, positions, pixels."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.gemma3 import Gemma3Adapter
from mitigate.core.layout import Role
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from mitigate.testing.tiny_gemma3 import build
from tests.adapters import merged

SIDE, TOKEN, SMALLEST = 4, 8, 16  # tokens and pixels a token is wide; pixels of the smallest crop
ADAPTER = Gemma3Adapter()
SIZE = st.tuples(st.integers(8, 90), st.integers(8, 90))
WORDS = st.lists(st.sampled_from(["red", "dog", "?", "street"]), max_size=3)


@cache
def tiny() -> Any:
    return build()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def processed(texts: list[str], images: list[list[Image.Image]], scan: bool = True) -> Any:
    _, processor = tiny()
    return processor(
        text=texts, images=images if any(images) else None, return_tensors="pt", padding=True, padding_side="left",
        do_pan_and_scan=scan, pan_and_scan_min_crop_size=SMALLEST,
    )  # fmt: skip


def layout_of(inputs: Any, processor: bool = True) -> Any:
    model = tiny()[0]
    return ADAPTER.layout(
        model, inputs["input_ids"], inputs["attention_mask"], inputs, tiny()[1] if processor else None
    )


def crops_of(width: int, height: int) -> int:
    """How many crops pan-and-scan adds: as many as the longer side holds the shorter one, two to four."""
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < 1.2:
        return 0
    count = min(4, max(2, min(longer // SMALLEST, math.floor(longer / shorter + 0.5))))
    return 0 if min(math.ceil(longer / count), shorter) < SMALLEST else count


def tokens(text: str) -> list[str]:
    """Divide a text into words, marks and runs of line breaks."""
    return re.findall(r"\n{1,4}|<[a-z_]+>|\w+|[^\w\s<]", text)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.one_of(SIZE, WORDS), min_size=1, max_size=4), min_size=1, max_size=3))
def test_layout_of_any_batch(prompts: Any) -> None:
    """Every raster: its begin token, 16 tokens, its end token, blank lines around; crops follow the whole picture."""
    raster = "\n\n<start_of_image>" + "<image_soft_token>" * SIDE**2 + "<end_of_image>\n\n"
    texts, images, written, expected = [], [], [], []
    for parts in prompts:
        texts.append(
            "".join("<start_of_image>" if isinstance(part, tuple) else "a ".join(part) + "a" for part in parts)
        )
        sizes = [part for part in parts if isinstance(part, tuple)]
        images.append([picture(*size) for size in sizes])
        counts = [crops_of(*size) for size in sizes]
        expected.append([[index > 0 for index in range(1 + count)] for count in counts])
        whole = [
            f"Here is the original image {raster} and here are some crops to help you see better "
            + " ".join([raster] * count)
            if count
            else raster
            for count in counts
        ]
        pieces = texts[-1].split("<start_of_image>")
        written.append("".join(a + b for a, b in zip(pieces, [*whole, ""], strict=True)))
    inputs, image = processed(texts, images), 0
    layout = layout_of(inputs)
    for row, text in enumerate(written):
        line = ["<s>", *tokens(text)]
        start = inputs["input_ids"].shape[1] - len(line)
        places = [start + index for index, token in enumerate(line) if token == "<image_soft_token>"]
        roles = [Role.SYSTEM if places and start + index < places[0] else Role.PROMPT for index in range(len(line))]
        spans = list(layout.images[row])
        assert len(spans) == sum(map(len, expected[row]))
        for rasters in expected[row]:
            held = [places.pop(0) for _ in range(SIDE**2 * len(rasters))]
            for column in range(held[0] - start, held[-1] - start):
                roles[column] = Role.SEPARATOR
            for crop in rasters:
                span, mine = spans.pop(0), [held.pop(0) for _ in range(SIDE**2)]
                assert (span.image, span.grid, span.tile) == (image, (SIDE, SIDE), None)
                assert span.thumbnail == (not crop and len(rasters) > 1)
                assert span.positions.tolist() == mine
                assert span.stop == mine[-1] + 2  # the end token
            image += 1
        for index, token in enumerate(line):
            if token.endswith("_of_image>"):
                roles[index] = Role.SEPARATOR
            elif token == "<image_soft_token>":
                roles[index] = Role.IMAGE
        assert layout.roles[row].tolist() == [Role.PAD] * start + roles


def test_adjacent_pictures_are_no_crops() -> None:
    inputs = processed(["<start_of_image><start_of_image><start_of_image>a"], [[picture(40, 40)] * 3], scan=False)
    layout = layout_of(inputs)
    assert [(span.image, span.thumbnail) for span in layout.images[0]] == [(0, False), (1, False), (2, False)]


def test_positions_hold_the_pooled_patches_in_raster_order() -> None:
    model, _ = build()
    inputs = processed(["dog <start_of_image>", "<start_of_image> cup"], [[picture(40, 40)], [picture(90, 30)]])
    layout = layout_of(inputs)
    merged.apart(model.model.vision_tower)
    plain = merged.embeddings(model, inputs)
    rasters = [(row, span) for row, spans in enumerate(layout.images) for span in spans]
    assert len(rasters) == len(inputs["pixel_values"]) == 5
    for index, (row, span) in enumerate(rasters):
        for down, across in ((0, 3), (2, 1), (3, 3)):
            pixels = inputs["pixel_values"].clone()
            place = (slice(TOKEN * down, TOKEN * (down + 1)), slice(TOKEN * across, TOKEN * (across + 1)))
            pixels[index, :, *place] += 1.0
            painted = merged.embeddings(model, {**inputs, "pixel_values": pixels})
            assert merged.changed(plain, painted) == [(row, int(span.positions[down * SIDE + across]))]


def batch() -> Any:
    """Rows with a picture and crops, without a picture, and with two pictures."""
    images = [[picture(90, 30)], [], [picture(40, 40, 1), picture(30, 50, 2)]]
    return processed(["<start_of_image> a dog ?", "red", "<start_of_image>and<start_of_image>"], images)


def test_a_prompt_run_by_hand_is_the_first_step_of_generate() -> None:
    model, _ = tiny()
    inputs, seen = batch(), []
    with model.model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True):
        first = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        ).logits[0]
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], {"pixel_values": inputs["pixel_values"]}
    more = ADAPTER.prompt_inputs(model, ids, mask, pixels)
    for name in more:
        assert torch.equal(more[name], seen[0][name])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **pixels, **more).logits[:, -1]
    torch.testing.assert_close(logits, first, rtol=1e-5, atol=1e-5)


def test_pixels_go_back_where_they_came_from() -> None:
    inputs = batch()
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert [len(image) for image in images] == [4, 1, 3]
    assert torch.equal(ADAPTER.with_images(inputs, images, layout)["pixel_values"], inputs["pixel_values"])
    swapped = processed(
        ["<start_of_image>", "<start_of_image>"], [[picture(30, 50, 2)], [picture(90, 30)]]
    )["pixel_values"]  # fmt: skip
    assert torch.equal(ADAPTER.chosen_images(inputs, [2, 0], layout)["pixel_values"], swapped)
    assert torch.equal(ADAPTER.images(inputs, layout.repeated(2))[2], images[2])


def test_features_are_divided_into_pictures_and_joined_again() -> None:
    model, _ = tiny()
    inputs = batch()
    layout = layout_of(inputs)
    with torch.no_grad():
        output = model.get_image_features(inputs["pixel_values"]).pooler_output
    features = ADAPTER.features(output, layout)
    assert [len(feature) for feature in features] == [4 * 16, 16, 3 * 16]
    columns = torch.cat([span.positions for span in layout.images[2] if span.image == 2])
    assert torch.equal(merged.embeddings(model, inputs)[2, columns], features[2])
    assert torch.equal(ADAPTER.joined(features, output), output)


def test_the_text_begins_once() -> None:
    model, processor = tiny()
    inputs = ADAPTER.inputs(model, processor, ["dog ?", "red"], [[picture(40, 40)], []])
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


def test_what_cannot_be_known_is_refused() -> None:
    model, processor = tiny()
    inputs = batch()
    with pytest.raises(ConfigError, match="attach with the processor"):
        layout_of(inputs, processor=False)
    one = processed(["<start_of_image> a", "dog"], [[picture(40, 40)], []])
    assert len(layout_of(one, processor=False).images[0]) == 1
    with pytest.raises(LayoutError, match="8 pictures and crops, but the prompts hold the tokens of 1"):
        layout_of({**one, "pixel_values": inputs["pixel_values"]})
    with pytest.raises(LayoutError, match="image tokens in a row"):
        layout_of({name: one[name][:, 4:] for name in ("input_ids", "attention_mask")})
    with pytest.raises(UnsupportedModel, match="crops"):
        ADAPTER.without_images(model, inputs["input_ids"][0], processor)
    kept = ADAPTER.without_images(model, one["input_ids"][0], processor)
    assert processor.tokenizer.convert_ids_to_tokens(kept) == ["<s>", "\n\n", "\n\n", "a"]
