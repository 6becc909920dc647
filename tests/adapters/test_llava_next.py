"""LLaVA-NeXT: small raster and joined tiles, against a count from the rules and against the patches themselves."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    SiglipVisionConfig,
)

from mitigate.adapters.llava_next import LlavaNextAdapter, LlavaNextVideoAdapter
from mitigate.core.layout import Role
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing.tiny_llava_next import build
from tests.adapters.anyres import cut, embedded, picture, window

ADAPTER = LlavaNextAdapter()
TILE, SIDE = 12, 3
PINPOINTS = [[12, 24], [24, 12], [24, 24]]
SIZE = st.tuples(st.integers(12, 90), st.integers(12, 90))
#: Words before each picture, the picture's size; words at the end.
PROMPT = st.tuples(st.lists(st.tuples(st.integers(0, 3), SIZE), max_size=2), st.integers(1, 4))


@cache
def tiny():
    return build()


def made(prompts):
    """Inputs of prompts given as ([(words, size), ...], words), left-padded, and the pictures."""
    pictures = [picture(*size, seed) for spots, _ in prompts for seed, (_, size) in enumerate(spots)]
    texts = ["".join("red " * words + "<image>" for words, _ in spots) + "cat " * last for spots, last in prompts]
    inputs = tiny()[1](text=texts, images=pictures or None, return_tensors="pt", padding=True, padding_side="left")
    return dict(inputs), pictures


def layout_of(inputs, **changed):
    return ADAPTER.layout(tiny()[0], inputs["input_ids"], inputs["attention_mask"], {**inputs, **changed}, tiny()[1])


def kept(size):
    rows, columns = cut(size, PINPOINTS, TILE)
    return window(size, rows * SIDE, columns * SIDE)


@settings(max_examples=60, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=3))
@example([([(0, (49, 147))], 1)])  # 49 * (6 / 147) is a little less than 2
def test_layout_of_any_batch(prompts):
    inputs, _ = made(prompts)
    layout = layout_of(inputs)
    image = 0
    for row, (spots, last) in enumerate(prompts):
        lengths = [9 + len(rows) * (len(columns) + 1) for rows, columns in (kept(size) for _, size in spots)]
        column = layout.length - last - sum(lengths) - sum(words for words, _ in spots) - 1
        expected = [Role.PAD] * column + [Role.SYSTEM if spots else Role.PROMPT]
        column += 1
        spans = iter(layout.images[row])
        for number, ((words, size), length) in enumerate(zip(spots, lengths, strict=True)):
            expected += [Role.SYSTEM if number == 0 else Role.PROMPT] * words + [Role.IMAGE] * length
            start, (rows, columns) = column + words, kept(size)
            small, joined = next(spans), next(spans)
            assert (small.image, small.grid, small.thumbnail, small.tiles) == (image, (3, 3), True, None)
            assert small.positions.tolist() == list(range(start, start + 9))
            assert (joined.image, joined.grid, joined.thumbnail) == (image, (len(rows), len(columns)), False)
            assert joined.tiles == cut(size, PINPOINTS, TILE)
            lines = [start + 9 + line * (len(columns) + 1) for line in range(len(rows))]
            assert joined.positions.tolist() == [first + step for first in lines for step in range(len(columns))]
            assert (small.stop, joined.stop) == (start + 9, start + length)
            column, image = start + length, image + 1
        assert next(spans, None) is None
        assert layout.roles[row].tolist() == expected + [Role.PROMPT] * last
        if spots:
            assert int(layout.after_image[row]) == column


SIZES = [(40, 40), (20, 44), (70, 31), (33, 47)]
BATCH = [([(2, SIZES[0])], 3), ([], 4), ([(0, SIZES[1]), (1, SIZES[2])], 1), ([(3, SIZES[3])], 2)]


def test_every_position_holds_its_patch():
    model, _ = tiny()
    inputs, _ = made(BATCH)

    def mark(shape):
        tiles, patches = (torch.arange(count, dtype=torch.float32) for count in shape[:2])
        return torch.stack(torch.meshgrid(tiles, patches, indexing="ij"), -1)

    read = embedded(model, inputs, mark)
    first, seen = 0, 0
    for row, spans in enumerate(layout_of(inputs).images):
        for small, joined in zip(spans[::2], spans[1::2], strict=True):
            size = SIZES[small.image]
            tile_rows, tile_columns = cut(size, PINPOINTS, TILE)
            assert read[row, small.positions, :2].tolist() == [[first, patch] for patch in range(9)]
            rows, columns = kept(size)
            tiles = [first + 1 + y // SIDE * tile_columns + x // SIDE for y in rows for x in columns]
            patches = [y % SIDE * SIDE + x % SIDE for y in rows for x in columns]
            assert read[row, joined.positions, 0].tolist() == tiles
            assert read[row, joined.positions, 1].tolist() == patches
            breaks = sorted(set(range(small.stop, joined.stop)) - set(joined.positions.tolist()))
            assert len(breaks) == len(rows)
            assert read[row, breaks].eq(model.model.image_newline).all()
            first, seen = first + 1 + tile_rows * tile_columns, seen + 1
    assert seen == len(SIZES)


@pytest.mark.parametrize("side", [4, 5])
def test_frames_of_videos_are_pooled_rasters(side):
    old = build()[0].config
    model = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config={**old.vision_config.to_dict(), "image_size": 4 * side},
            text_config=old.text_config,
            image_token_index=4,
            video_token_index=5,
            image_grid_pinpoints=[[4 * side, 8 * side]],
        )
    )
    row = [1, 5, 5, 5, 5, 5, 5, 5, 5, 7, *[4] * (side * side + side * (2 * side + 1)), 8, *[5] * 8, 9]
    inputs = {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.zeros(1, 3, 3, 4 * side, 4 * side),
        "image_sizes": torch.tensor([[4 * side, 8 * side]]),
        "pixel_values_videos": torch.randn(2, 2, 3, 4 * side, 4 * side, generator=torch.Generator()),
    }
    adapter = LlavaNextVideoAdapter()
    layout = adapter.layout(model, inputs["input_ids"], None, inputs)
    read = embedded(model, inputs, lambda shape: torch.arange(float(shape[0] * shape[1])).view(*shape[:2], 1))[0, :, 0]
    spans = layout.images[0]
    assert [(span.image, span.frame, span.grid) for span in spans] == [
        *[(1, frame, (2, 2)) for frame in range(2)],
        *[(0, None, (side, columns)) for columns in (side, 2 * side)],
        *[(2, frame, (2, 2)) for frame in range(2)],
    ]
    for number, span in enumerate([*spans[:2], *spans[4:]]):
        assert read[span.positions].tolist() == list(range(4 * number, 4 * number + 4))
    for image, count in zip(adapter.images(inputs, layout), (3, 2, 2), strict=True):
        assert len(image) == count
    with pytest.raises(LayoutError, match="pixel_values_videos is missing"):
        adapter.layout(model, inputs["input_ids"], None, {**inputs, "pixel_values_videos": None})


def test_a_row_does_not_depend_on_its_batch():
    whole = layout_of(made(BATCH)[0])
    image = 0
    for row, prompt in enumerate(BATCH):
        alone = layout_of(made([prompt])[0])
        shift = whole.length - alone.length
        assert whole.roles[row, shift:].tolist() == alone.roles[0].tolist()
        for own, other in zip(alone.images[0], whole.images[row], strict=True):
            assert (own.positions + shift).tolist() == other.positions.tolist()
            assert (own.image + image, own.stop + shift, own.grid) == (other.image, other.stop, other.grid)
        image += len({span.image for span in alone.images[0]})


def test_pixels_are_those_of_the_picture_alone():
    inputs, pictures = made(BATCH)
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    process = tiny()[1].image_processor
    for own, image in zip(pictures, images, strict=True):
        assert torch.equal(image, process([own], return_tensors="pt")["pixel_values"][0])
    same = ADAPTER.with_images(inputs, images, layout)
    assert list(same) == list(inputs)
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    twice = layout.repeated(2)
    for wanted in ([3, 1, 1, 0], [2], [1, 2]):
        chosen = ADAPTER.chosen_images(inputs, wanted, twice)
        fresh = process([pictures[index] for index in wanted], return_tensors="pt")
        assert sorted(chosen) == sorted(fresh)
        assert all(torch.equal(chosen[name], fresh[name]) for name in fresh)
    assert ADAPTER.chosen_images(inputs, [], twice) == {}


def test_features_of_every_picture():
    model, _ = tiny()
    inputs, pictures = made(BATCH)
    outputs = []
    hook = ADAPTER.projector(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(**inputs)
        for own in pictures:
            model.get_image_features(**tiny()[1].image_processor([own], return_tensors="pt"))
    hook.remove()
    features = ADAPTER.features(outputs[0], layout_of(inputs).repeated(3))
    assert [len(one) for one in features] == [45, 27, 27, 45]
    for one, alone in zip(features, outputs[1:], strict=True):
        torch.testing.assert_close(one, alone.flatten(0, 1))
    assert torch.equal(ADAPTER.joined(features, outputs[0]), outputs[0])


def test_a_prompt_loses_all_tokens_of_its_pictures():
    inputs, _ = made(BATCH)
    row = ADAPTER.without_images(tiny()[0], inputs["input_ids"][2], tiny()[1])
    assert row.tolist() == [token for token in inputs["input_ids"][2].tolist() if token != 4]
    assert len(ADAPTER.vision_layers(tiny()[0])) == 2


def test_what_does_not_fit_is_refused():
    inputs, _ = made(BATCH)
    with pytest.raises(LayoutError, match="image_sizes is missing"):
        layout_of(inputs, image_sizes=None)
    with pytest.raises(LayoutError, match="takes 51 tokens, but 30 are there"):
        layout_of(made([([(0, (20, 44))], 1)])[0], image_sizes=torch.tensor([[40, 40]]))
    with pytest.raises(LayoutError, match="more pictures than the 3"):
        layout_of(inputs, image_sizes=inputs["image_sizes"][:3])
    with pytest.raises(LayoutError, match="5 pictures"):
        layout_of(inputs, image_sizes=inputs["image_sizes"][[0, 1, 2, 3, 3]])
    model, _ = build()
    model.config.image_grid_pinpoints = [[24, 24]]
    inputs["image_sizes"][0] = torch.tensor([1, 90])
    with pytest.raises(LayoutError, match="of a picture of 1 x 90 pixels only padding"):
        ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)


def test_towers_whose_tokens_are_no_raster_are_refused():
    model, _ = build()
    inputs, _ = made(BATCH)

    def layout():
        return ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)

    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModel, match=r"'full'.*no raster"):
        layout()
    model.config.vision_config = SiglipVisionConfig(image_size=12, patch_size=4)
    assert layout().images[0][1].grid == (6, 6)
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModel, match=r"'default'.*no raster"):
        layout()
    model.config.vision_config.model_type = "dinov2"
    with pytest.raises(UnsupportedModel, match="'dinov2'"):
        layout()


def test_the_processor_survives_a_folder(tmp_path):
    processor = tiny()[1]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    text = [ADAPTER.prompt_text(again, "what is in the image", 1)]
    images = [picture(40, 25)]
    for name, value in processor(text=text, images=images, return_tensors="pt").items():
        assert torch.equal(value, again(text=text, images=images, return_tensors="pt")[name])
