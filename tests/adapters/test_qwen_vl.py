"""Qwen-VL: layouts against the resizing rule, positions against the model's own, pixels, features, extra forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.qwen_vl import Qwen2_5VLAdapter, Qwen2VLAdapter, Qwen3VLAdapter, Qwen3VLMoeAdapter
from mitigate.core import Access, Branch, Fidelity, Method, Point, Role, Subscription, Tags
from mitigate.core.stack import Stack
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing import snapshots, tiny_qwen_vl

FAMILIES = {
    "qwen2_vl": (Qwen2VLAdapter(), tiny_qwen_vl.build_qwen2),
    "qwen2_5_vl": (Qwen2_5VLAdapter(), tiny_qwen_vl.build_qwen2_5),
    "qwen3_vl": (Qwen3VLAdapter(), tiny_qwen_vl.build_qwen3),
    "qwen3_vl_moe": (Qwen3VLMoeAdapter(), tiny_qwen_vl.build_qwen3_moe),
}
CELL, LEAST, MOST = 8, 16 * 16, 32 * 32  # pixels along a token's side, and of a whole picture
PICTURE, VIDEO = "<|image_pad|>", "<|video_pad|>"
ENDS = ("<|vision_start|>", "<|vision_end|>")
WORDS = st.integers(1, 4)
SIZE = st.tuples(st.integers(8, 120), st.integers(8, 120))
PROMPT = st.tuples(st.integers(0, 3), st.lists(st.tuples(SIZE, WORDS), max_size=3)).filter(any)
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
each_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Runs a function at one point; with ``branch`` it also asks for that stream's logits, and leaves them aside."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "runs a function"
    fidelity: ClassVar[Fidelity] = Fidelity.CONTROL
    tags: ClassVar[Tags] = Tags(reads=frozenset(Point), writes=frozenset(Point), forwards_per_token=1)
    point: Point = Point.NEXT_TOKEN_LOGITS
    function: Callable[[Any], Any] = lambda event: None
    layers: tuple[int, ...] = ()
    branch: Branch | None = None
    seen: list[Any] = field(default_factory=list, compare=False)

    def branches(self):
        return [] if self.branch is None else [self.branch]

    def subscriptions(self, model):
        there = frozenset({"main" if self.branch is None else self.branch.name})
        wish = Subscription(point=self.point, access=Access.WRITE, layers=self.layers, branches=there)
        choice = Subscription(point=Point.NEXT_TOKEN_LOGITS, access=Access.WRITE)
        return [choice] if self.point is Point.NEXT_TOKEN_LOGITS else [wish, choice]

    def _handle(self, event, state):
        self.seen.append(event)
        return self.function(event)

    def on_next_token_logits(self, event, state):
        if self.branch is not None:
            self.seen.append((event.logits.clone(), event.branch_logits(self.branch.name).clone()))

    on_vision = on_visual_embeddings = on_hidden_states = on_image_input = _handle


class Frames:
    """Stands in for the video processor, whose library is not needed: patches drawn at random, grids as it makes them.

    Pictures of a video come in cells already; two of them make a step.
    """

    merge_size = temporal_patch_size = 2

    def __call__(self, videos, **options):
        grids = torch.tensor([[len(video) // 2, video[0].shape[0] // 4, video[0].shape[1] // 4] for video in videos])
        facts = [SimpleNamespace(fps=2.0, sampled_fps=1.0, frames_indices=[*range(len(video))]) for video in videos]
        patches = torch.randn(int(grids.prod(-1).sum()), 96)
        return {"pixel_values_videos": patches, "video_grid_thw": grids, "video_metadata": facts}


@cache
def tiny(family):
    model, processor = FAMILIES[family][1]()
    processor.video_processor = Frames()
    return model.requires_grad_(False), processor


def grid_of(width, height):
    """Rows and columns of tokens: sides to the nearest cell; too many or few pixels: scaled, then whole cells."""
    rows, columns = round(height / CELL), round(width / CELL)
    if rows * columns * CELL * CELL > MOST:
        scale = math.sqrt(height * width / MOST)
        return max(1, math.floor(height / scale / CELL)), max(1, math.floor(width / scale / CELL))
    if rows * columns * CELL * CELL < LEAST:
        scale = math.sqrt(LEAST / (height * width))
        return math.ceil(height * scale / CELL), math.ceil(width * scale / CELL)
    return rows, columns


def picture(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * width + height)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def framed(token):
    return ENDS[0] + token + ENDS[1]


def processed(family, prompts):
    """Process prompts: words, then pictures each with words after it."""
    processor = tiny(family)[1]
    texts = ["red " * before + "".join(framed(PICTURE) + "tree " * n for _, n in parts) for before, parts in prompts]
    images = [picture(*size) for _, parts in prompts for size, _ in parts]
    return dict(processor(text=texts, images=images or None, return_tensors="pt", padding=True))


def with_video(family, text, grids, pictures=()):
    """Process a prompt with videos of these grids (steps, rows and columns of patches), and pictures."""
    videos = [np.zeros((2 * steps, 4 * rows, 4 * columns, 3), np.uint8) for steps, rows, columns in grids]
    processor = tiny(family)[1]
    return dict(processor(text=[text], images=list(pictures) or None, videos=videos, return_tensors="pt"))


def layout_of(family, inputs):
    model, processor = tiny(family)
    return FAMILIES[family][0].layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


# --------------------------------------------------------------------------------------------------------- the layout


@each_family
@settings(max_examples=15)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=3))
def test_the_layout_is_that_of_the_resizing_rule(family, prompts):
    layout, number = layout_of(family, processed(family, prompts)), 0
    for row, (before, parts) in enumerate(prompts):
        roles, expected = [Role.SYSTEM if parts else Role.PROMPT] * before, []
        for size, after in parts:
            grid = grid_of(*size)
            expected.append((number, grid, len(roles) + 1))
            roles += [Role.SEPARATOR, *[Role.IMAGE] * math.prod(grid), Role.SEPARATOR, *[Role.PROMPT] * after]
            number += 1
        pad = layout.prompt_length - len(roles)
        assert layout.prompt_roles[row].tolist() == [Role.PAD] * pad + roles
        for span, (image, grid, first) in zip(layout.images[row], expected, strict=True):
            columns = range(pad + first, pad + first + math.prod(grid))
            assert (span.image, span.grid, span.stop) == (image, grid, columns.stop + 1)
            assert span.positions.tolist() == list(columns)
            assert (span.tile, span.frame, span.thumbnail) == (None, None, False)


@each_family
def test_videos_are_frames_and_counted_after_the_pictures(family):
    grids = [[2, 4, 8], [3, 4, 4]]
    text = f"red {framed(VIDEO)} car {framed(PICTURE)} tree {framed(VIDEO)} table"
    inputs = with_video(family, text, grids, [picture(32, 16)])
    ids, layout = inputs["input_ids"][0], layout_of(family, inputs)
    frames = (ids == 9).nonzero().flatten().split([8, 8, 4, 4, 4])
    first, second, still, *last = layout.images[0]
    assert [span.image for span in layout.images[0]] == [1, 1, 0, 2, 2, 2]
    assert [span.frame for span in layout.images[0]] == [0, 1, None, 0, 1, 2]
    assert [span.grid for span in layout.images[0]] == [(2, 4), (2, 4), (2, 4), (2, 2), (2, 2), (2, 2)]
    for span, columns in zip([first, second, *last], frames, strict=True):
        assert torch.equal(span.positions, columns)
    roles = layout.prompt_roles[0]
    for parts in ([first, second], last):  # time stamps between frames, where the family has them
        begin, end = int(parts[0].positions[0]), int(parts[-1].positions[-1])
        inside = roles[begin : end + 1]
        assert ((inside == Role.IMAGE) | (inside == Role.SEPARATOR)).all()
        assert bool((inside == Role.SEPARATOR).any()) == family.startswith("qwen3")
    assert [roles[0], roles[int(still.positions[-1]) + 2], roles[-1]] == [Role.SYSTEM, Role.PROMPT, Role.PROMPT]
    assert layout.after_image[0] == len(ids) - 1


@each_family
def test_what_does_not_fit_is_refused(family):
    adapter, (model, processor) = FAMILIES[family][0], tiny(family)
    inputs = processed(family, [(1, [((32, 16), 1)])])
    ids = inputs["input_ids"]

    def refused(match, ids=ids, **others):
        with pytest.raises(LayoutError, match=match):
            adapter.layout(model, ids, None, others, processor)

    refused("lack image_grid_thw")
    refused("makes 2 x 2 of this", image_grid_thw=torch.tensor([[1, 4, 4]]))
    refused("bring 2 pictures", image_grid_thw=torch.tensor([[1, 4, 8], [1, 4, 8]]))
    refused("more pictures", torch.cat([ids, ids]), image_grid_thw=inputs["image_grid_thw"])
    video = with_video(family, framed(VIDEO), [[2, 4, 4]])["input_ids"]
    refused("lack video_grid_thw", video)
    refused("2 frames", video, video_grid_thw=torch.tensor([[3, 4, 4]]))
    refused("makes 2 x 4 of this|1 frames", video, video_grid_thw=torch.tensor([[2, 4, 8]]))


# ------------------------------------------------------------------------------------------------------ the positions


def rule(kinds, grids):
    """Positions of the paper: text goes on in all axes, a picture spreads over rows and columns from there."""
    found, grids = torch.zeros(3, 0, dtype=torch.long), iter(grids)
    index = 0
    while index < len(kinds):
        start = int(found.max()) + 1 if found.numel() else 0
        if kinds[index]:
            rows, columns = next(grids)
            places = [(0, row, column) for row in range(rows) for column in range(columns)]
        else:
            places = [(0, 0, 0)]
        found = torch.cat([found, start + torch.tensor(places).T], 1)
        index += len(places)
    return found


@each_family
@settings(max_examples=6)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=3))
def test_positions_are_those_of_the_paper_and_of_the_models_own_generate(family, prompts):
    adapter, (model, _) = FAMILIES[family][0], tiny(family)
    inputs = processed(family, prompts)
    own = adapter.prompt_inputs(model, inputs["input_ids"], inputs["attention_mask"], inputs)
    taken = first_forward(model, inputs)
    assert torch.equal(own["position_ids"], taken["position_ids"])
    assert torch.equal(own["mm_token_type_ids"], inputs["mm_token_type_ids"])
    for row, (_, parts) in enumerate(prompts):
        seen = inputs["attention_mask"][row].bool()
        kinds = (inputs["input_ids"][row][seen] == 8).tolist()
        expected = rule(kinds, [grid_of(*size) for size, _ in parts])
        assert torch.equal(own["position_ids"][1:, row][:, seen], expected)


@each_family
def test_positions_of_videos_are_those_of_the_models_own_generate(family):
    adapter, (model, _) = FAMILIES[family][0], tiny(family)
    inputs = with_video(family, f"red {framed(VIDEO)} tree {framed(PICTURE)} car", [[3, 4, 8]], [picture(32, 16)])
    own = adapter.prompt_inputs(model, inputs["input_ids"], inputs["attention_mask"], inputs)
    assert torch.equal(own["position_ids"], first_forward(model, inputs)["position_ids"])


def first_forward(model, inputs):
    """What ``generate`` gives to the model first."""
    seen: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    hook.remove()
    return seen[0]


def by_hand(model, inputs, steps, between=lambda: None):
    """Decode one prompt greedily with a cache; later positions come from what the model keeps of the prompt."""
    output, tokens = model(**inputs, use_cache=True), []
    for _ in range(steps):
        tokens.append(output.logits[:, -1:].argmax(-1))
        between()
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(tokens, 1)


@each_family
def test_a_side_forward_leaves_the_running_decode_alone(family):
    adapter, (model, _) = FAMILIES[family][0], tiny(family)
    main = processed(family, [(1, [((60, 20), 2), ((20, 40), 1)])])
    side = processed(family, [(0, [((24, 40), 1)]), (3, [])])
    images = {name: side[name] for name in ("pixel_values", "image_grid_thw")}
    own = adapter.prompt_inputs(model, side["input_ids"], side["attention_mask"], images)
    plain = by_hand(model, main, 8)
    kept = model.model.rope_deltas.clone()

    def forward(extra):
        model(input_ids=side["input_ids"], attention_mask=side["attention_mask"], **images, **extra)

    assert torch.equal(by_hand(model, main, 8, lambda: forward(own)), plain)
    assert torch.equal(model.model.rope_deltas, kept)
    forward({"mm_token_type_ids": own["mm_token_type_ids"]})  # without positions: what this test is about
    assert model.model.rope_deltas.shape != kept.shape


def test_the_conformance_checks_look_at_what_the_model_keeps_of_its_prompt():
    model = tiny("qwen2_vl")[0]
    prompts = [processed("qwen2_vl", [(1, [(size, 2)])]) for size in ((60, 20), (32, 32))]
    for inputs in prompts:
        model.generate(**inputs, **OPTIONS)
    before = snapshots.of_model(model)
    model.generate(**prompts[1], **OPTIONS)
    assert not snapshots.differences(before, snapshots.of_model(model))
    model.generate(**prompts[0], **OPTIONS)
    assert "rope_deltas" in str(snapshots.differences(before, snapshots.of_model(model)))


@each_family
@pytest.mark.parametrize("images", [True, False])
def test_branches_follow_the_main_stream_without_disturbing_it(family, images):
    model, processor = tiny(family)
    inputs = processed(family, [(2, [((32, 32), 3)]), (1, [((60, 20), 2), ((20, 40), 1)])])
    plain = model.generate(**inputs, **OPTIONS)[:, -6:]
    point = Point.IMAGE_INPUT if images else Point.NEXT_TOKEN_LOGITS
    probe = Probe(
        point=point, function=lambda event: [-one for one in event.images], branch=Branch(name="other", images=images)
    )
    with Stack([probe]).attach(model, processor) as handle:
        assert torch.equal(handle.generate(**inputs, **OPTIONS)[:, -6:], plain)
    logits = [pair[1] for pair in probe.seen if isinstance(pair, tuple)]
    assert len(logits) == 6
    for row in range(2):  # the other stream, one sample at a time and without a cache
        seen = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row][seen]
        first, last = ((0, 1), (1, 3))[row]
        patches = inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()
        pixels = -inputs["pixel_values"][0 if first == 0 else patches[first - 1] : patches[last - 1]]
        given = {"pixel_values": pixels, "image_grid_thw": inputs["image_grid_thw"][first:last]} if images else {}
        ids = ids if images else ids[(ids < 6) | (ids > 9)]
        for step, found in enumerate(logits):
            whole = torch.cat([ids, plain[row, :step]])[None]
            types = {"mm_token_type_ids": (whole == 8).long()} if images else {}
            torch.testing.assert_close(found[row], model(input_ids=whole, **given, **types).logits[0, -1])


@each_family
def test_a_branch_of_the_same_video_goes_on_as_the_main_stream_does(family):
    model, processor = tiny(family)
    inputs = with_video(family, f"red {framed(VIDEO)} tree", [[4, 4, 8]])
    probe = Probe(branch=Branch(name="other", images=True))
    with Stack([probe]).attach(model, processor) as handle:
        handle.generate(**inputs, **OPTIONS)
    for own, other in probe.seen:
        torch.testing.assert_close(own, other)


# --------------------------------------------------------------------------------------------------------- the pixels


@each_family
def test_pixels_are_divided_by_the_grids(family):
    adapter = FAMILIES[family][0]
    inputs = processed(family, [(0, [((32, 16), 1), ((60, 20), 1)]), (2, [((40, 40), 2)])])
    layout = layout_of(family, inputs)
    images = adapter.images(inputs, layout)
    assert [len(image) for image in images] == [4 * math.prod(span.grid) for row in layout.images for span in row]
    same = adapter.with_images(inputs, images, layout)
    assert same.keys() == inputs.keys()
    assert all(torch.equal(same[name], inputs[name]) for name in inputs)
    swapped = processed(family, [(0, [((60, 20), 1), ((32, 16), 1)]), (2, [((60, 20), 2)])])
    chosen = adapter.chosen_images(inputs, [1, 0, 1], layout)
    assert chosen.keys() == {"pixel_values", "image_grid_thw"}
    assert all(torch.equal(chosen[name], swapped[name]) for name in chosen)


@each_family
def test_pixels_of_videos_follow_those_of_pictures(family):
    adapter = FAMILIES[family][0]
    text = f"{framed(VIDEO)} red {framed(PICTURE)} car {framed(VIDEO)}"
    inputs = with_video(family, text, [[2, 4, 4], [1, 4, 8]], [picture(32, 16)])
    layout = layout_of(family, inputs)
    images = adapter.images(inputs, layout)
    assert [len(image) for image in images] == [32, 32, 32]
    assert torch.equal(torch.cat(images[1:]), inputs["pixel_values_videos"])
    changed = adapter.with_images(inputs, [-image for image in images], layout)
    assert torch.equal(changed["pixel_values"], -inputs["pixel_values"])
    assert torch.equal(changed["pixel_values_videos"], -inputs["pixel_values_videos"])
    chosen = adapter.chosen_images(inputs, [2, 0, 1], layout)
    assert torch.equal(chosen["pixel_values"], inputs["pixel_values"])
    assert torch.equal(chosen["pixel_values_videos"], inputs["pixel_values_videos"].roll(32, 0))
    assert chosen["video_grid_thw"].tolist() == [[1, 4, 8], [2, 4, 4]]
    assert ("second_per_grid_ts" in chosen) == (family == "qwen2_5_vl")
    assert adapter.chosen_images(inputs, [0], layout).keys() == {"pixel_values", "image_grid_thw"}


def test_encoded_pictures_and_time_stamps_are_refused():
    adapter, model = FAMILIES["qwen3_vl"][0], tiny("qwen3_vl")[0]
    inputs = with_video("qwen3_vl", f"red {framed(VIDEO)} car", [[2, 4, 4]])
    video, layout = inputs["input_ids"][0], layout_of("qwen3_vl", inputs)
    with pytest.raises(UnsupportedModel, match="came encoded"):
        adapter.images({"mm_encoder_outputs": {}}, layout)
    with pytest.raises(UnsupportedModel, match="time stamps"):
        adapter.without_images(model, video, None)


# ------------------------------------------------------------------------------------------------------- the features


@each_family
def test_each_column_holds_its_patch_in_raster_order(family):
    model, processor = FAMILIES[family][1]()
    for block in model.model.visual.blocks:  # no token of the tower sees another
        for parameter in block.attn.proj.parameters():
            torch.nn.init.zeros_(parameter)
    plain = picture(40, 24)  # 3 x 5 cells, as it is
    text = f"red {framed(PICTURE)} tree {framed(PICTURE)}"
    inputs = dict(processor(text=[text], images=[picture(16, 32), plain], return_tensors="pt"))
    span = layout_of(family, inputs).images[0][1]
    assert span.grid == (3, 5)
    before = decoder_inputs(model, inputs)
    for row in range(3):
        for column in range(5):
            marked = plain.copy()
            marked.paste((255, 0, 0), (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
            changed = dict(processor(text=[text], images=[picture(16, 32), marked], return_tensors="pt"))
            where = (decoder_inputs(model, changed) != before).any(-1)[0].nonzero().flatten().tolist()
            assert where == [int(span.positions[row * 5 + column])]


def decoder_inputs(model, inputs):
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


@each_family
def test_features_of_one_picture_can_be_read_and_written(family):
    model, processor = tiny(family)
    inputs = processed(family, [(0, [((32, 16), 1), ((60, 20), 1)]), (2, [((40, 40), 2)])])
    layout = layout_of(family, inputs)
    alone = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    plain = model(**inputs).logits

    def edited(function):
        probe = Probe(point=Point.VISUAL_EMBEDDINGS, function=function)
        with Stack([probe]).attach(model, processor):
            return model(**inputs).logits, probe.seen[0].features

    same, features = edited(lambda event: [feature.clone() for feature in event.features])
    assert torch.equal(same, plain)
    assert all(torch.equal(one, other) for one, other in zip(features, alone, strict=True))
    other, _ = edited(lambda event: [event.features[0], -event.features[1], event.features[2]])
    first = int(layout.images[0][1].positions[0])
    assert torch.equal(other[0, :first], plain[0, :first])
    assert torch.equal(other[1], plain[1])
    assert not torch.allclose(other[0, first:], plain[0, first:])


def test_features_of_pictures_beside_videos_are_refused():
    adapter = FAMILIES["qwen2_vl"][0]
    text = f"{framed(VIDEO)} red {framed(PICTURE)}"
    inputs = with_video("qwen2_vl", text, [[2, 4, 4]], [picture(32, 16)])
    with pytest.raises(UnsupportedModel, match="part them"):
        adapter.features(None, layout_of("qwen2_vl", inputs))
    inputs = with_video("qwen2_vl", text[: text.index(" red")], [[2, 4, 4]])
    output = tiny("qwen2_vl")[0].model.visual(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert [len(video) for video in adapter.features(output, layout_of("qwen2_vl", inputs))] == [8]


@each_family
def test_the_tower_can_be_read_and_written(family):
    model, processor = tiny(family)
    inputs = processed(family, [(0, [((32, 16), 1), ((60, 20), 1)])])
    plain = model(**inputs).logits
    probe = Probe(point=Point.VISION, function=lambda event: 0.5 * event.hidden if event.layer == 1 else None)
    with Stack([probe]).attach(model, processor):
        other = model(**inputs).logits
    assert [(event.layer, event.hidden.shape) for event in probe.seen] == [
        (layer, (len(inputs["pixel_values"]), 32)) for layer in (0, 1)
    ]
    assert not torch.allclose(other, plain)


def test_an_edit_of_an_early_layer_stays_below_the_features_added_after_it():
    model, processor = tiny("qwen3_vl")
    inputs = processed("qwen3_vl", [(1, [((32, 16), 1)])])
    positions = layout_of("qwen3_vl", inputs).images[0][0].positions
    deeper = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).deepstack_features
    for layer in (0, 1):
        received: list[torch.Tensor] = []
        hook = (
            model.get_decoder()
            .layers[layer + 1]
            .register_forward_pre_hook(lambda module, args, received=received: received.append(args[0]))
        )
        probe = Probe(
            point=Point.HIDDEN_STATES, layers=(layer,), function=lambda event: torch.full_like(event.hidden, 2.0)
        )
        with Stack([probe]).attach(model, processor):
            model(**inputs)
        hook.remove()
        expected = torch.full_like(received[0], 2.0)
        expected[0, positions] += deeper[layer][0]
        torch.testing.assert_close(received[0], expected)
