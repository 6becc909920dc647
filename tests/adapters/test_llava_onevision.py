"""LLaVA-OneVision: interpolated tiles, pictures among others, and videos, counted from the rules and patch by patch."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mitigate.adapters.llava_onevision import LlavaOnevisionAdapter
from mitigate.core.layout import Role
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing.tiny_llava_onevision import build
from tests.adapters.anyres import cut, embedded, picture, window

ADAPTER = LlavaOnevisionAdapter()
TILE, SIDE, LIMIT = 12, 3, 2
PINPOINTS = [[rows * TILE, columns * TILE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
SIZE = st.tuples(st.integers(12, 90), st.integers(12, 90))
#: Words before each picture, the picture's size; words at the end.
PROMPT = st.tuples(st.lists(st.tuples(st.integers(0, 3), SIZE), max_size=3), st.integers(1, 4))


@cache
def tiny():
    return build()


def made(prompts, *, nested=True):
    """Inputs of prompts given as ([(words, size), ...], words), left-padded, and the pictures of each."""
    pictures = [[picture(*size, seed) for seed, (_, size) in enumerate(spots)] for spots, _ in prompts]
    flat = [one for some in pictures for one in some]
    texts = ["".join("red " * words + "<image>" for words, _ in spots) + "cat " * last for spots, last in prompts]
    given_as = (pictures if nested else flat) if flat else None
    inputs = tiny()[1](text=texts, images=given_as, return_tensors="pt", padding=True, padding_side="left")
    return dict(inputs), pictures


def filmed(text, videos, frames):
    """Inputs of one prompt of words, ``<image>`` (40 x 40 pixels, at most one) and ``<video>`` of so many frames."""
    tokens = {"<video>": frames * 4 + 1}  # 3 x 3 patches are pooled to 2 x 2, and one line break comes at the end
    inputs = {"pixel_values_videos": torch.randn(videos, frames, 3, TILE, TILE, generator=torch.Generator())}
    if "<image>" in text:
        once = tiny()[1](text=["<image>"], images=[[picture(40, 40)]], return_tensors="pt")
        tokens["<image>"] = once["input_ids"].shape[1]
        inputs |= {name: once[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    for token, count in tokens.items():
        text = text.replace(token, token * count)
    return {**tiny()[1].tokenizer([text], return_tensors="pt"), **inputs}


def layout_of(inputs, **changed):
    return ADAPTER.layout(tiny()[0], inputs["input_ids"], inputs["attention_mask"], {**inputs, **changed}, tiny()[1])


def kept(size):
    """The window of the joined raster that shows the picture, and its rows and columns in the prompt."""
    tile_rows, tile_columns = cut(size, PINPOINTS, TILE)
    rows, columns = window(size, tile_rows * SIDE, tile_columns * SIDE)
    ratio = math.sqrt(len(rows) * len(columns) / (LIMIT * SIDE * SIDE))
    if ratio <= 1.1:
        return (rows, columns), (len(rows), len(columns))
    return (rows, columns), (math.floor(len(rows) / ratio + 1e-9), math.floor(len(columns) / ratio + 1e-9))


@settings(max_examples=60, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=3), st.booleans())
def test_layout_of_any_batch(prompts, nested):
    layout = layout_of(made(prompts, nested=nested)[0])
    image = 0
    for row, (spots, last) in enumerate(prompts):
        alone = len(spots) == 1 or not nested
        grids = [kept(size)[1] for _, size in spots]
        lengths = [9 + rows * (columns + 1) if alone else 10 for rows, columns in grids]
        column = layout.length - last - sum(lengths) - sum(words for words, _ in spots)
        expected = [Role.PAD] * column
        spans = iter(layout.images[row])
        for number, ((words, size), length, grid) in enumerate(zip(spots, lengths, grids, strict=True)):
            expected += [Role.SYSTEM if number == 0 else Role.PROMPT] * words + [Role.IMAGE] * length
            start, small = column + words, next(spans)
            assert (small.image, small.grid, small.thumbnail, small.frame) == (image, (3, 3), alone, None)
            assert small.positions.tolist() == list(range(start, start + 9))
            assert small.stop == start + (9 if alone else 10)
            if alone:
                joined = next(spans)
                assert (joined.image, joined.grid, joined.thumbnail) == (image, grid, False)
                assert joined.tiles == cut(size, PINPOINTS, TILE)
                lines = [start + 9 + line * (grid[1] + 1) for line in range(grid[0])]
                assert joined.positions.tolist() == [first + step for first in lines for step in range(grid[1])]
                assert joined.stop == start + length
            column, image = start + length, image + 1
        assert next(spans, None) is None
        assert layout.roles[row].tolist() == expected + [Role.PROMPT] * last


SIZES = [(40, 40), (20, 44), (70, 31), (33, 47), (12, 30)]
BATCH = [([(2, SIZES[0])], 3), ([], 4), ([(0, SIZES[1]), (1, SIZES[2])], 1), ([(3, SIZES[3])], 2), ([(0, SIZES[4])], 1)]


def mark(shape):
    """Number of the tile, row and column of the patch."""
    tiles, rows, columns = (torch.arange(float(count)) for count in (shape[0], SIDE, SIDE))
    return torch.stack(torch.meshgrid(tiles, rows, columns, indexing="ij"), -1).flatten(1, 2)


def resampled(length, fewer):
    """Where the middle of each of fewer samples lies in a line of this length."""
    return [(index + 0.5) * length / fewer - 0.5 for index in range(fewer)]


def test_every_position_holds_its_place():
    model, _ = tiny()
    inputs, _ = made(BATCH)
    layout = layout_of(inputs)
    grids = [cut(SIZES[number], PINPOINTS, TILE) if number not in (1, 2) else (0, 0) for number in range(5)]
    # tile after tile its place in its raster; first of each picture the small version
    places = [place for rows, columns in grids for place in [(0, 0), *product(range(rows), range(columns))]]

    def joined_mark(shape):
        assert shape[0] == len(places)
        return mark(shape) + torch.tensor([(0, SIDE * row, SIDE * column) for row, column in places])[:, None]

    read = embedded(model, inputs, joined_mark)
    interpolated = 0
    for row, spans in enumerate(layout.images):
        for span in spans:
            found = read[row, span.positions, 1:3]
            (rows, columns), grid = ((range(3), range(3)), (3, 3)) if not span.tiles else kept(SIZES[span.image])
            interpolated += grid != (len(rows), len(columns))
            ys = [rows[0] + y for y in resampled(len(rows), grid[0])]
            xs = [columns[0] + x for x in resampled(len(columns), grid[1])]
            torch.testing.assert_close(found, torch.tensor([[y, x] for y in ys for x in xs]))
            breaks = sorted(set(range(int(span.positions[0]), span.stop)) - set(span.positions.tolist()))
            assert len(breaks) == (0 if span.thumbnail else grid[0] if span.tiles else 1)
            assert read[row, breaks].eq(model.model.image_newline).all()
    assert interpolated == 2


def test_frames_of_videos():
    model, _ = tiny()
    inputs = filmed("red <video> cat <image> <video> dog", 2, 3)
    layout = layout_of(inputs)
    read = embedded(model, inputs, mark)[0]
    spans = layout.images[0]
    picture_length = 9 + 4 * 5
    starts = [1, 15 + picture_length]
    assert [span.image for span in spans] == [1] * 3 + [0] * 2 + [2] * 3
    assert [span.frame for span in spans] == [0, 1, 2, None, None, 0, 1, 2]
    videos = [spans[:3], spans[5:]]
    for number, (start, frames) in enumerate(zip(starts, videos, strict=True)):
        for step, span in enumerate(frames):
            assert span.grid == (2, 2)
            assert span.positions.tolist() == list(range(start + 4 * step, start + 4 * step + 4))
            middles = [[3 * number + step, y, x] for y in resampled(3, 2) for x in resampled(3, 2)]
            torch.testing.assert_close(read[span.positions, :3], torch.tensor(middles))
        assert frames[-1].stop == start + 13
        assert read[start + 12].eq(model.model.image_newline).all()
    assert layout.roles[0].tolist() == (
        [Role.SYSTEM] + [Role.IMAGE] * 13 + [Role.PROMPT] + [Role.IMAGE] * (picture_length + 13) + [Role.PROMPT]
    )


def test_pixels_are_those_of_the_prompt_alone():
    inputs, pictures = made(BATCH)
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    process = tiny()[1].image_processor
    fresh = [process([some], return_tensors="pt")["pixel_values"] for some in pictures if some]
    for image, own in zip(images, [one for some in fresh for one in some], strict=True):
        assert torch.equal(image, own)
    same = ADAPTER.with_images(inputs, images, layout)
    assert list(same) == list(inputs)
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    for wanted, rows in (([0, 1, 2, 1, 2, 4], [0, 2, 2, 4]), ([4, 3, 3], [4, 3, 3]), ([1, 2], [2])):
        chosen = ADAPTER.chosen_images(inputs, wanted, layout)
        again = process([pictures[row] for row in rows], return_tensors="pt")
        assert torch.equal(chosen["pixel_values"], again["pixel_values"])
        assert torch.equal(chosen["image_sizes"], again["image_sizes"])
        first, second = (tiny()[0].get_image_features(**some).pooler_output for some in (chosen, again))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(UnsupportedModel, match="cannot go without"):
        ADAPTER.chosen_images(inputs, [0, 2], layout)


def test_pixels_of_videos_come_after_those_of_pictures():
    inputs = filmed("<video> <image> cat", 1, 2)
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert [tuple(image.shape) for image in images] == [(10, 3, 12, 12), (2, 3, 12, 12)]
    same = ADAPTER.with_images(inputs, images, layout)
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    chosen = ADAPTER.chosen_images(inputs, [1, 0, 1], layout)
    assert torch.equal(chosen["pixel_values_videos"], inputs["pixel_values_videos"][[0, 0]])
    assert torch.equal(chosen["pixel_values"], inputs["pixel_values"])
    assert chosen["batch_num_images"].tolist() == [1]
    with pytest.raises(UnsupportedModel, match="pictures and videos in one batch"):
        ADAPTER.features(torch.zeros(10, 9, 32), layout)
    alone = layout_of(filmed("<video> red", 1, 2))
    assert [len(one) for one in ADAPTER.features(torch.zeros(2, 9, 32), alone)] == [18]


def test_what_is_not_known_is_refused():
    model, _ = build()
    inputs, _ = made(BATCH)
    with pytest.raises(LayoutError, match="image_sizes is missing"):
        layout_of(inputs, image_sizes=None)
    with pytest.raises(LayoutError, match="pixel_values_videos is missing"):
        layout_of(filmed("<video>", 1, 2), pixel_values_videos=None)
    with pytest.raises(LayoutError, match="takes 13 tokens, but 9 are there"):
        layout_of(filmed("<video>", 1, 2), pixel_values_videos=torch.zeros(1, 3, 3, 12, 12))
    with pytest.raises(LayoutError, match="takes 27 tokens, but 9 are there"):
        layout_of(inputs, batch_num_images=torch.tensor([2, 1, 1, 1]))
    with pytest.raises(LayoutError, match="batch_num_images counts 4 pictures, but there are sizes of 5"):
        layout_of(inputs, batch_num_images=torch.tensor([1, 1, 2]))
    model.config.vision_aspect_ratio = "pad"
    with pytest.raises(UnsupportedModel, match="'pad'"):
        ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)


def test_several_pictures_of_a_question_are_among_others():
    pictures = [[picture(40, 40)], [], [picture(30, 50), picture(50, 30)]]
    inputs = ADAPTER.inputs(*tiny(), ["what is this", "no", "which is red"], pictures)
    assert [[span.thumbnail for span in spans] for spans in layout_of(inputs).images] == [
        [True, False],
        [],
        [False] * 2,
    ]
