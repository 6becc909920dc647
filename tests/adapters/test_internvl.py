"""InternVL's layout and pixels against the tiling rule of its paper and against what its processor and model do."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.internvl import InternVLAdapter
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from mitigate.methods.locore import LocoRE
from mitigate.testing.tiny_internvl import build

TILE, SIDE, MOST = 24, 3, 4
ADAPTER = InternVLAdapter()
SIZE = st.tuples(st.integers(6, 130), st.integers(6, 130))
PROMPT = st.tuples(st.integers(0, 3), st.lists(SIZE, max_size=2), st.integers(0, 3)).filter(any)


@cache
def tiny():
    return build()


def tiles_of(width, height):
    """Columns and rows of tiles: the nearest aspect ratio; of equally near ones the larger, if pixels suffice."""
    arrangements = [(columns, rows) for columns in range(1, MOST + 1) for rows in range(1, MOST + 1)]
    arrangements = sorted((one for one in arrangements if one[0] * one[1] <= MOST), key=lambda one: one[0] * one[1])
    best, distance = (1, 1), float("inf")
    for columns, rows in arrangements:
        off = abs(width / height - columns / rows)
        if off < distance or (off == distance and width * height > 0.5 * TILE * TILE * columns * rows):
            best, distance = (columns, rows), off
    return best


def picture(width, height):
    """Red grows to the right, green downwards, so that a tile shows where it is from."""
    across = np.tile(np.linspace(0, 255, width), (height, 1))
    down = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([across, down, np.full_like(down, 90)], -1).astype(np.uint8))


def processed(prompts):
    """Process prompts of words, pictures one after another, and words."""
    _, processor = tiny()
    texts = ["red " * before + "<IMG_CONTEXT>" * len(sizes) + " tree" * after for before, sizes, after in prompts]
    images = [picture(*size) for _, sizes, _ in prompts for size in sizes]
    batch = processor(text=texts, images=images or None, return_tensors="pt", padding=True)
    sizes = [(height, width) for _, sizes, _ in prompts for width, height in sizes]
    return {**batch, "image_sizes": torch.tensor(sizes)} if sizes else dict(batch)


def layout_of(inputs):
    model, processor = tiny()
    return ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


@settings(max_examples=60, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=3))
def test_layout_of_any_batch(prompts):
    _, processor = tiny()
    inputs = processed(prompts)
    layout = layout_of(inputs)
    width = inputs["input_ids"].shape[1]
    image = 0
    for row, (before, sizes, after) in enumerate(prompts):
        expected, columns = [], []
        for size in sizes:
            across, down = tiles_of(*size)
            places = [(line, place) for line in range(down) for place in range(across)]
            tiles = [(place, False) for place in places] + [(None, True)] if len(places) > 1 else [(None, False)]
            expected.append(tiles)
            columns += [Role.SEPARATOR] + [Role.IMAGE] * (len(tiles) * SIDE * SIDE) + [Role.SEPARATOR]
        roles = [Role.SYSTEM if sizes else Role.PROMPT] * before + columns + [Role.PROMPT] * after
        start = width - len(roles)
        assert layout.roles[row].tolist() == [Role.PAD] * start + roles
        spans, first = list(layout.images[row]), start + before
        assert len(spans) == sum(map(len, expected))
        for tiles in expected:
            first += 1  # <img>
            for tile, thumbnail in tiles:
                span = spans.pop(0)
                assert (span.image, span.tile, span.thumbnail, span.frame) == (image, tile, thumbnail, None)
                assert span.grid == (SIDE, SIDE)
                assert span.positions.tolist() == list(range(first, first + SIDE * SIDE))
                first += SIDE * SIDE
            first, image = first + 1, image + 1
        assert int(layout.after_image[row]) == (width - after if sizes else start)
    assert image == len(inputs.get("image_sizes", ()))
    assert processor.tokenizer.padding_side == "left"


@settings(max_examples=60, deadline=None)
@given(SIZE, st.integers(2, 14), st.integers(1, 6))
def test_where_tiles_lie_follows_from_size_and_number_whatever_the_limits(size, most, least):
    _, processor = tiny()
    least = min(least, most)
    options = {"max_patches": most, "min_patches": least}
    image = picture(*size)
    inputs = dict(processor(text="<IMG_CONTEXT>", images=image, return_tensors="pt", **options))
    inputs["image_sizes"] = [(image.height, image.width)]
    layout = layout_of(inputs)
    (pixels,) = ADAPTER.images(inputs, layout)
    spans = layout.images[0]
    assert len(spans) == len(pixels)
    tiles = [span.tile for span in spans if span.tile is not None]
    if len(pixels) == 1:
        assert not tiles
        return
    red, green = (pixels[:-1, channel].mean((1, 2)).tolist() for channel in (0, 1))
    rows, columns = (max(place) + 1 for place in zip(*tiles, strict=True))
    assert rows * columns == len(tiles) == len(pixels) - 1
    shown = sorted(range(len(tiles)), key=lambda tile: (round(green[tile], 1), red[tile]))
    assert [tiles[tile] for tile in shown] == [(row, column) for row in range(rows) for column in range(columns)]
    assert len({round(value, 1) for value in green}) == rows
    assert len({round(value, 1) for value in red}) == columns


def test_without_sizes_rows_and_columns_are_not_guessed():
    inputs = processed([(1, [(96, 24), (30, 30)], 1)])
    del inputs["image_sizes"]
    spans = layout_of(inputs).images[0]
    assert [span.tile for span in spans] == [None] * len(spans)
    assert [span.thumbnail for span in spans[:5]] == [False] * 4 + [True]
    assert [span.image for span in spans] == [0] * 5 + [1]
    assert not spans[5].thumbnail


def test_adapters_own_inputs_bring_the_sizes_and_the_model_takes_them():
    model, processor = tiny()
    pictures = [[picture(96, 24)], [], [picture(20, 60), picture(24, 24)]]
    inputs = ADAPTER.inputs(model, processor, ["what is this", "who", "compare"], pictures)
    assert inputs["image_sizes"].tolist() == [[24, 96], [60, 20], [24, 24]]
    assert [span.tile for span in layout_of(inputs).images[0]] == [(0, 0), (0, 1), (0, 2), (0, 3), None]
    assert [span.tile for span in layout_of(inputs).images[2]][:3] == [(0, 0), (1, 0), (2, 0)]
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = {name: value for name, value in inputs.items() if name != "image_sizes"}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**plain, **options))
    assert "image_sizes" not in ADAPTER.inputs(model, processor, ["who"], [[]])
    with Stack([LocoRE(beta=0.5)]).attach(model, processor) as handle:
        whole = handle.generate(**inputs, **options)
        chunks = handle.generate(**inputs, **options, prefill_chunk_size=9)  # for which sizes would be in the way
    assert torch.equal(whole, chunks)


def test_features_at_a_span_are_its_patches_in_raster_order():
    model, processor = copy.deepcopy(tiny())
    for block in model.model.vision_tower.encoder.layer:
        block.lambda_1.data.zero_()  # no attention: a feature sees its own 2 x 2 patches of 4 pixels only
    inputs = ADAPTER.inputs(model, processor, ["who"], [[picture(48, 24), picture(24, 48)]])
    layout = layout_of(inputs)
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    for row, column, tile in [(0, 0, 0), (2, 1, 1), (1, 2, 2), (0, 2, 3), (2, 2, 5)]:
        changed = inputs["pixel_values"].clone()
        changed[tile, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0
        seen.clear()
        model(**inputs)
        model(**{**inputs, "pixel_values": changed})
        different = (seen[0] != seen[1]).any(-1).nonzero().flatten().tolist()
        assert different == [int(layout.images[0][tile].positions[SIDE * row + column])]
    hook.remove()


def test_pixels_come_back_as_they_went():
    model, processor = tiny()
    pictures = [picture(48, 24), picture(40, 40), picture(20, 75)]
    inputs = ADAPTER.inputs(model, processor, ["who", "what"], [pictures[:1], pictures[1:]])
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert [len(image) for image in images] == [3, 5, 5]
    same = ADAPTER.with_images(inputs, images, layout)
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    chosen = ADAPTER.chosen_images(inputs, [2, 0, 2], layout)
    alone = ADAPTER.inputs(model, processor, ["who"], [[pictures[2], pictures[0], pictures[2]]])
    assert torch.equal(chosen["pixel_values"], alone["pixel_values"])
    assert torch.equal(chosen["image_sizes"], alone["image_sizes"])
    assert ADAPTER.chosen_images(inputs, [], layout) == {}
    beams = ADAPTER.images(inputs, layout.repeated(2))
    assert all(torch.equal(one, other) for one, other in zip(images, beams, strict=True))
    with pytest.raises(LayoutError, match="13 tiles, the inputs bring 12"):
        ADAPTER.images({"pixel_values": inputs["pixel_values"][1:]}, layout)


def test_features_are_divided_by_picture():
    model, processor = tiny()
    inputs = ADAPTER.inputs(model, processor, ["who"], [[picture(48, 24), picture(24, 24)]])
    layout = layout_of(inputs)
    output = model.get_image_features(inputs["pixel_values"]).pooler_output
    features = ADAPTER.features(output, layout)
    assert [len(feature) for feature in features] == [
        sum(span.image == image for span in layout.images[0]) * 9 for image in (0, 1)
    ]
    first = model.get_image_features(ADAPTER.images(inputs, layout)[0]).pooler_output
    torch.testing.assert_close(features[0], first.flatten(0, 1))
    assert torch.equal(ADAPTER.joined(features, output), output)


# ------------------------------------------------------------------------------------------------------------- videos


def with_videos(text, frames, pictures=()):
    """Process a prompt whose videos are written out by the processor's own rule."""
    _, processor = tiny()
    pixels = [torch.full((count, 3, TILE, TILE), float(count)) for count in frames]
    for index in range(len(frames)):
        video = processor.replace_video_token({"pixel_values_videos": pixels}, index)
        text = text.replace("<video>", video, 1)
    images = processor.image_processor(list(pictures), crop_to_patches=True) if pictures else None
    for index in range(len(pictures)):
        text = text.replace("<picture>", processor.replace_image_token(images, index), 1)
    inputs = dict(processor.tokenizer([text], return_tensors="pt"))
    return inputs, pixels, None if images is None else torch.tensor(np.array(images["pixel_values"]))


def test_frames_of_a_video_are_recognised():
    inputs, videos, tiles = with_videos(
        "who is <video> and <picture> or <video>\n<video> ?", [3, 1, 2], [picture(48, 24)]
    )
    inputs["pixel_values"] = torch.cat([videos[0], tiles, *videos[1:]])
    inputs["image_sizes"] = torch.tensor([[24, 48]])
    layout = layout_of(inputs)
    found = [(span.image, span.frame, span.tile, span.thumbnail) for span in layout.images[0]]
    assert found == [
        *[(1, frame, None, False) for frame in range(3)],
        *[(0, None, (0, column), False) for column in range(2)],
        (0, None, None, True),
        (2, 0, None, False),
        *[(3, frame, None, False) for frame in range(2)],
    ]
    ids, roles = inputs["input_ids"][0], layout.roles[0]
    frame = tiny()[1].tokenizer.convert_tokens_to_ids("Frame2")
    assert [Role(int(role)) for role in roles[ids == frame]] == [Role.SEPARATOR] * 2
    images = ADAPTER.images(inputs, layout)
    assert [len(image) for image in images] == [3, 3, 1, 2]
    assert torch.equal(images[0], tiles)
    assert torch.equal(ADAPTER.with_images(inputs, images, layout)["pixel_values"], inputs["pixel_values"])
    chosen = ADAPTER.chosen_images(inputs, [3, 0], layout)
    assert torch.equal(chosen["pixel_values"], torch.cat([videos[2], tiles]))
    assert chosen["image_sizes"].tolist() == [[24, 48]]
    with pytest.raises(UnsupportedModel, match="video precedes a picture"):
        ADAPTER.features(torch.zeros(9, 9, 32), layout)


def test_other_words_before_a_picture_make_no_video():
    inputs, _, _ = with_videos("Frame2: <picture> Frame3: <picture>", [], [picture(20, 20)] * 2)
    with_small = {**inputs, "image_sizes": None}
    spans = layout_of({name: value for name, value in with_small.items() if value is not None}).images[0]
    assert all(span.frame is None for span in spans)
    assert {span.image for span in spans} == {0, 1}
    after, _, _ = with_videos("<video> now Frame2: <picture>", [1], [picture(20, 20)])
    assert [(span.image, span.frame) for span in layout_of(after).images[0]] == [(1, 0), (0, None)]


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_known_is_refused():
    model, processor = tiny()
    image, begin, end = processor.image_token_id, processor.start_image_token_id, processor.end_image_token_id

    def layout(*ids, **inputs):
        return ADAPTER.layout(model, torch.tensor([ids]), None, inputs, processor)

    assert len(layout(begin, *[image] * 27, end, 7).images[0]) == 3
    with pytest.raises(LayoutError, match="between <img> and </img>"):
        layout(7, *[image] * 9, end, 7)
    with pytest.raises(LayoutError, match="between <img> and </img>"):
        layout(begin, *[image] * 9)
    with pytest.raises(LayoutError, match="18 image tokens"):
        layout(begin, *[image] * 18, end, 7)
    with pytest.raises(LayoutError, match="10 image tokens"):
        layout(begin, *[image] * 10, end, 7)
    with pytest.raises(LayoutError, match=r"given \(12, 48\)"):
        layout(begin, *[image] * 9, end, 7, pixel_values=torch.zeros(1, 3, 12, 48))
    with pytest.raises(LayoutError, match="more pictures than the 1"):
        layout(*[begin, *[image] * 9, end] * 2, 7, image_sizes=[(24, 24)])
    with pytest.raises(LayoutError, match="tokens of 1 tiles, the inputs bring 2"):
        layout(begin, *[image] * 9, end, 7, pixel_values=torch.zeros(2, 3, 24, 24))
    with pytest.raises(ConfigError, match="processor"):
        ADAPTER.layout(model, torch.tensor([[begin, *[image] * 9, end]]), None, {})


def test_a_prompt_without_its_pictures_keeps_the_words():
    model, processor = tiny()
    inputs = processed([(2, [(48, 24), (24, 24)], 3)])
    words = ADAPTER.without_images(model, inputs["input_ids"][0], processor)
    assert processor.tokenizer.decode(words) == "red red tree tree tree"
