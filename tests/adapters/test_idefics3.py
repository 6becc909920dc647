"""Idefics3 and SmolVLM against the rules of their processors, written down again, and against their models."""

from __future__ import annotations

import copy
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.loading import adapter_for
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from mitigate.testing import tiny_idefics3

FAMILIES = ("idefics3", "smolvlm")
TILE, SIDE, CELL = 12, 3, 4  # pixels of a tile, tokens along it, pixels of a token
SIZE = st.tuples(st.integers(8, 120), st.integers(8, 120))
PROMPT = st.tuples(st.integers(0, 3), st.lists(st.tuples(SIZE, st.integers(0, 2)), max_size=2), st.integers(1, 3))


@cache
def tiny(family):
    return {"idefics3": tiny_idefics3.build, "smolvlm": tiny_idefics3.build_smolvlm}[family]()


def layout_of(family, inputs):
    model, processor = tiny(family)
    return adapter_for(model).layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


def picture(width, height, seed=0):
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed + 100 * width + height))
    return Image.fromarray((noise * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def rows_and_columns(width, height, longest):
    """Tiles of a picture: the long side becomes ``longest``, the short one even; then both whole tiles."""
    if width >= height:
        short = int(longest / (width / height))
        width, height = longest, max(short + short % 2, 1)
        wide = math.ceil(width / TILE)
        high = math.ceil(int(wide * TILE / (width / height)) / TILE)
    else:
        short = int(longest * (width / height))
        width, height = max(short + short % 2, 1), longest
        high = math.ceil(height / TILE)
        wide = math.ceil(int(high * TILE * (width / height)) / TILE)
    return (0, 0) if (high, wide) == (1, 1) else (high, wide)


def written(family, rows, columns):
    """Roles of a picture's tokens, and the rasters in it as ``(start, tile, thumbnail)``."""
    spelled = family == "idefics3"
    marks = {True: lambda name: 1 + len(name), False: lambda name: 2}[spelled]  # the mark around pictures, and a name
    roles, rasters = [], []

    def raster(name, tile, thumbnail):
        roles.extend([Role.SEPARATOR] * marks(name))
        rasters.append((len(roles), tile, thumbnail))
        roles.extend([Role.IMAGE] * SIDE * SIDE)

    for row in range(rows):
        for column in range(columns):
            raster(("<", "row_col", ">"), (row, column), False)
        roles.append(Role.SEPARATOR)  # a line end; after the last row it is one token with the next
    raster(("<", "global", "-", "img", ">"), None, rows > 0)
    return [*roles, Role.SEPARATOR], rasters


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=3), longest=st.sampled_from([12, 24, 36, 60]), cut=st.booleans())
def test_layout_of_any_batch(family, prompts, longest, cut):
    _, processor = tiny(family)
    texts = [
        "red " * before + "".join("<image>" + "tree " * between for _, between in pictures) + "dog " * after
        for before, pictures, after in prompts
    ]
    nested = [[picture(*size) for size, _ in pictures] for _, pictures, _ in prompts]
    options = {"size": {"longest_edge": longest}, "do_image_splitting": cut, "padding": True, "return_tensors": "pt"}
    inputs = processor(text=texts, images=nested if any(nested) else None, **options)
    layout = layout_of(family, inputs)
    image, width = 0, inputs["input_ids"].shape[1]
    for row, (before, pictures, after) in enumerate(prompts):
        roles, expected = [Role.SYSTEM if pictures else Role.PROMPT] * before, []
        stop = None
        for size, between in pictures:
            mine, rasters = written(family, *(rows_and_columns(*size, longest) if cut else (0, 0)))
            expected += [(image, len(roles) + start, tile, small) for start, tile, small in rasters]
            roles += mine
            stop = len(roles)
            roles += [Role.PROMPT] * between
            image += 1
        roles += [Role.PROMPT] * after
        padding = width - len(roles)
        assert layout.prompt_roles[row].tolist() == [Role.PAD] * padding + roles
        assert int(layout.after_image[row]) == padding + (stop or 0)
        found = [
            (span.image, int(span.positions[0]) - padding, span.tile, span.thumbnail) for span in layout.images[row]
        ]
        assert found == expected
        for span in layout.images[row]:
            assert span.grid == (SIDE, SIDE)
            assert span.frame is None
            assert torch.equal(span.positions, span.positions[0] + torch.arange(SIDE * SIDE))


def batch(family):
    """Pictures of several shapes, none, and two of them in one prompt."""
    model, processor = tiny(family)
    pictures = [[picture(40, 20)], [], [picture(30, 30), picture(20, 50)]]
    texts = ["describe this image", "what is in the street", "are there two red"]
    return adapter_for(model).inputs(model, processor, texts, pictures)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_hold_the_patches_of_their_tile_in_raster_order(family):
    """Without blocks in the tower a token's embedding depends on its own pixels alone: one changes, with them."""
    model, _ = tiny(family)
    model = copy.deepcopy(model)
    model.model.vision_model.encoder.layers = torch.nn.ModuleList()
    inputs, seen = batch(family), []
    layout = layout_of(family, inputs)
    model.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    for row, spans in enumerate(layout.images):
        for number, span in enumerate(spans):
            for place in (1, SIDE, SIDE * SIDE - 1):
                line, column = divmod(place, SIDE)
                pixels = inputs["pixel_values"].clone()
                window = (slice(line * CELL, (line + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
                pixels[(row, number, slice(None), *window)] += 1
                model(**{**inputs, "pixel_values": pixels})
                changed = (seen[-1] != seen[0]).any(-1).nonzero().tolist()
                assert changed == [[row, int(span.positions[place])]]


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_of_pictures(family):
    model, processor = tiny(family)
    adapter, inputs = adapter_for(model), batch(family)
    layout = layout_of(family, inputs)
    images = adapter.images(inputs, layout)
    assert [len(image) for image in images] == [3, 5, 3]  # 1 x 2, 2 x 2 and 2 x 1 tiles, and the whole
    same = adapter.with_images(inputs, images, layout)
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    other = adapter.with_images(inputs, [-image for image in images], layout)
    assert torch.equal(other["pixel_values"], -inputs["pixel_values"])

    texts = ["describe this image", "what is in the street"]
    swapped = adapter.inputs(model, processor, texts, [[picture(20, 50)], [picture(40, 20), picture(20, 50)]])
    chosen = adapter.chosen_images(inputs, [2, 0, 2], layout)
    real = swapped["pixel_values"].flatten(0, 1)
    real = real[real.flatten(1).any(1)]
    assert torch.equal(chosen["pixel_values"].flatten(0, 1), real)
    assert chosen["pixel_attention_mask"].all()
    given = {name: swapped[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**given, **chosen).logits, model(**swapped).logits)
    assert adapter.chosen_images(inputs, [], layout) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_made_all_grey_are_still_seen(family):
    """The model takes tiles of zeros, which are of the mean colour, for padding."""
    model, _ = tiny(family)
    adapter, inputs = adapter_for(model), batch(family)
    layout = layout_of(family, inputs)
    grey = adapter.with_images(inputs, [torch.zeros_like(image) for image in adapter.images(inputs, layout)], layout)
    assert [len(image) for image in adapter.images(grey, layout)] == [3, 5, 3]
    assert bool(model(**grey).logits.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_pictures(family):
    model, _ = tiny(family)
    adapter, inputs = adapter_for(model), batch(family)
    layout = layout_of(family, inputs)
    output = torch.randn(11, SIDE * SIDE, 8)
    features = adapter.features(output, layout.repeated(2))
    assert [len(feature) for feature in features] == [27, 45, 27]
    assert torch.equal(features[1][9:18], output[4])
    assert torch.equal(adapter.joined(features, output), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_its_pictures(family):
    model, processor = tiny(family)
    adapter, inputs = adapter_for(model), batch(family)
    bare = adapter.without_images(model, inputs["input_ids"][2], processor)
    text = adapter.prompt_text(processor, "are there two red", 0)
    assert bare[bare != processor.tokenizer.pad_token_id].tolist() == processor.tokenizer(text)["input_ids"]


def video(processor, frames, first=0):
    times = SimpleNamespace(fps=1, timestamps=list(range(first, first + frames)), duration=frames)
    return processor.replace_video_token({"pixel_values": torch.zeros(1, frames), "video_metadata": [times]}, 0)


def test_frames_of_videos():
    model, processor = tiny("smolvlm")
    adapter = adapter_for(model)
    whole = processor.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
    text = f"red {video(processor, 3)}tree {whole}{video(processor, 2)}dog?"
    inputs = processor.tokenizer([text, whole + "Frame from 00:01:" + whole], padding=True, return_tensors="pt")
    layout = layout_of("smolvlm", inputs)
    assert [(span.image, span.frame) for span in layout.images[0]] == [
        (3, 0),
        (3, 1),
        (3, 2),
        (0, None),
        (4, 0),
        (4, 1),
    ]
    assert [(span.image, span.frame) for span in layout.images[1]] == [(1, None), (2, None)]  # nobody announced a video
    between = layout.prompt_roles[0, layout.images[0][0].positions[-1] + 1 : layout.images[0][1].positions[0]]
    assert set(between.tolist()) == {Role.SEPARATOR}
    tiles = torch.rand(1, 8, 3, TILE, TILE)
    assert [len(image) for image in adapter.images({"pixel_values": tiles}, layout)] == [1, 1, 1, 3, 2]
    with pytest.raises(UnsupportedModel, match="video precedes a picture"):
        adapter.features(torch.zeros(8, SIDE * SIDE, 8), layout)
    bare = processor.tokenizer.decode(adapter.without_images(model, inputs["input_ids"][0], processor))
    assert "Frame" not in bare
    assert "video" in bare


def test_frames_of_a_video_of_two_hours():
    model, processor = tiny("smolvlm")
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["99", "59", "100"])
    inputs = processor.tokenizer(video(processor, 2, first=99 * 60 + 59), return_tensors="pt")
    layout = adapter_for(model).layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)
    assert [(span.image, span.frame) for span in layout.images[0]] == [(0, 0), (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_refused(family):
    model, processor = tiny(family)
    adapter, inputs = adapter_for(model), batch(family)
    ids, layout = inputs["input_ids"], layout_of(family, inputs)

    def given(ids):
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    spans = layout.images[2]
    with pytest.raises(LayoutError, match="lacks some of its 2 x 2 tiles"):
        layout_of(family, given(ids[2:, spans[0].positions[-1] + 1 :]))
    with pytest.raises(LayoutError, match="not followed by the whole of it"):
        layout_of(family, given(ids[2:, : spans[2].positions[-1] + 1]))
    with pytest.raises(LayoutError, match="8 image tokens in a row are no square"):
        layout_of(family, given(torch.cat([ids[2:, : spans[-1].positions[-1]], ids[2:, -1:]], 1)))
    with pytest.raises(LayoutError, match="not the name of a picture"):
        layout_of(family, given(processor.tokenizer("describe <image> dog", return_tensors="pt")["input_ids"]))
    with pytest.raises(LayoutError, match="bring 8 tiles, but the prompts hold the tokens of 11"):
        adapter.images({**inputs, "pixel_values": inputs["pixel_values"][1:]}, layout)
    with pytest.raises(LayoutError, match="bring 8 tiles, but the prompts hold the tokens of 11"):
        layout_of(family, {**inputs, "pixel_values": inputs["pixel_values"][1:]})
    with pytest.raises(UnsupportedModel, match="came encoded"):
        adapter.images({"mm_encoder_outputs": {}}, layout)
    with pytest.raises(ConfigError, match="attach with the processor"), Stack([]).attach(model) as handle:
        adapter.layout(handle.model, ids, inputs["attention_mask"], inputs)
