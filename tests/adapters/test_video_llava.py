"""Video-LLaVA: pictures and videos in one prompt; what needs torchvision (videos) is made by the processor's rule."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mitigate.adapters.video_llava import VideoLlavaAdapter
from mitigate.core import Access, Point, Rows, Subscription
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import LayoutError, UnsupportedModel
from mitigate.testing.tiny_video_llava import build
from tests.adapters import merged
from tests.core.test_points import Probe

SIDE, PATCH, SIZE = 4, 4, 16
ADAPTER = VideoLlavaAdapter()
PART = st.sampled_from(["<image>", "<video>", "red", "dog ?"])


@cache
def tiny() -> Any:
    return build()


def video(seed: int, frames: int) -> torch.Tensor:
    return torch.randn(frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def processed(texts: list[str], frames: int = 2) -> dict[str, Any]:
    """Pictures by the processor; a video is its frames' patches and one more token each, in place of its mark."""
    _, processor = tiny()
    whole = "<video>" * (frames * (SIDE * SIDE + 1))
    pictures = [picture(seed) for seed in range(sum(text.count("<image>") for text in texts))]
    videos = [video(seed, frames) for seed in range(sum(text.count("<video>") for text in texts))]
    inputs = dict(processor.image_processor(pictures, return_tensors="pt")) if pictures else {}
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos)
    expanded = [text.replace("<image>", "<image>" * SIDE**2).replace("<video>", whole) for text in texts]
    tokens = processor.tokenizer(expanded, return_tensors="pt", padding=True, padding_side="left")
    return {**inputs, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def layout_of(inputs: Any) -> Any:
    model, processor = tiny()
    return ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


def test_pictures_take_the_tokens_the_processor_gives_them() -> None:
    _, processor = tiny()
    texts = ["is <image> a dog ?", "<image> red <image>"]
    theirs = processor(text=texts, images=[picture(seed) for seed in range(3)], padding=True, padding_side="left")
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in processed(texts).items()
    }
    assert torch.equal(theirs["input_ids"], processed(texts)["input_ids"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(PART, min_size=1, max_size=5), min_size=1, max_size=3), st.integers(1, 3))
def test_layout_of_any_batch(prompts: Any, frames: int) -> None:
    texts = [" ".join(parts) for parts in prompts]
    inputs = processed(texts, frames)
    layout = layout_of(inputs)
    pictures = sum(text.count("<image>") for text in texts)
    image, clip = 0, pictures
    for row, text in enumerate(texts):
        roles, spans = [Role.SYSTEM if "<" in text else Role.PROMPT], []
        for mark in re.findall(r"<image>|<video>|\w+|\?", text):
            if mark == "<image>":
                spans.append((image, None, len(roles)))
                roles += [Role.IMAGE] * SIDE**2
                image += 1
            elif mark == "<video>":
                spans += [(clip, frame, len(roles) + frame * (SIDE**2 + 1) + 1) for frame in range(frames)]
                roles += [Role.IMAGE] * (frames * (SIDE**2 + 1))
                clip += 1
            else:
                roles.append(Role.PROMPT if spans or "<" not in text else Role.SYSTEM)
        start = inputs["input_ids"].shape[1] - len(roles)
        assert layout.roles[row].tolist() == [Role.PAD] * start + roles
        found = [(span.image, span.frame, int(span.positions[0]) - start) for span in layout.images[row]]
        assert found == spans
        for span in layout.images[row]:
            first = int(span.positions[0])
            assert span.positions.tolist() == list(range(first, first + SIDE**2))
            assert (span.grid, span.stop) == ((SIDE, SIDE), first + SIDE**2)


def test_positions_hold_the_patches_in_raster_order() -> None:
    """Pictures and frames alike; the class token before a frame's patches holds none of them."""
    model, _ = build()
    inputs = processed(["red <video> and <image>", "<image> <video> dog <image>"])
    layout = layout_of(inputs)
    inputs["pixel_values"] = inputs.pop("pixel_values_images")
    model.config.vision_feature_layer = -3  # before the first block every patch stands alone
    plain = merged.embeddings(model, inputs)
    for row, spans in enumerate(layout.images):
        for span in spans:
            name = "pixel_values" if span.frame is None else "pixel_values_videos"
            which = (span.image,) if span.frame is None else (span.image - 3, span.frame)
            for down, across in ((0, 3), (2, 1), (3, 3)):
                pixels = inputs[name].clone()
                place = (slice(PATCH * down, PATCH * (down + 1)), slice(PATCH * across, PATCH * (across + 1)))
                pixels[(*which, slice(None), *place)] += 1.0
                painted = merged.embeddings(model, {**inputs, name: pixels})
                assert merged.changed(plain, painted) == [(row, int(span.positions[down * SIDE + across]))]


def test_the_old_name_of_pictures_is_not_asked_for() -> None:
    model, processor = tiny()
    assert "pixel_values" in ADAPTER.inputs(model, processor, ["what is there"], [[picture(0)]])


@pytest.mark.parametrize("name", ["pixel_values_images", "pixel_values"])
def test_pixels_go_back_where_they_came_from(name: str) -> None:
    inputs = processed(["<video> <image>", "<image> <video>"])
    inputs[name] = inputs.pop("pixel_values_images")
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert [image.dim() for image in images] == [3, 3, 4, 4]
    again = ADAPTER.with_images(inputs, images, layout)
    assert again.keys() == inputs.keys()
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    chosen = ADAPTER.chosen_images(inputs, [3, 1, 1], layout)
    assert torch.equal(chosen["pixel_values_videos"], inputs["pixel_values_videos"][1:])
    assert torch.equal(chosen["pixel_values"], inputs[name][[1, 1]])


@pytest.mark.parametrize("texts", [["red <image>", "<image> <image>"], ["<video> dog <video>", "<video>"]])
def test_features_are_divided_and_joined_again(texts: list[str]) -> None:
    model, _ = tiny()
    inputs = processed(texts)
    layout = layout_of(inputs)
    outputs: list[torch.Tensor] = []
    with ADAPTER.projector(model).register_forward_hook(lambda _, __, output: outputs.append(output)):
        embeddings = merged.embeddings(model, inputs)
    features = ADAPTER.features(outputs[0], layout)
    assert len(features) == 3
    assert torch.equal(ADAPTER.joined(features, outputs[0]), outputs[0])
    extra = layout.images[0][0].frame is not None
    for row, spans in enumerate(layout.images):
        for span in spans:
            patches = features[span.image].view(-1, SIDE**2 + extra, 32)[span.frame or 0, int(extra) :]
            assert torch.equal(embeddings[row, span.positions], patches)


def test_a_stack_reads_and_edits_prompts_with_videos() -> None:
    model, processor = tiny()
    inputs = processed(["is <video> a dog and <image> ?", "<image> <video> red ?"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    plain = model.generate(**inputs, **options)

    def clips(event: Any) -> torch.Tensor:
        """Move all weight to the patches of the last frame."""
        chosen = torch.zeros(event.probs.shape[0], event.probs.shape[-1])
        for row, spans in enumerate(event.layout.images):
            chosen[row, next(span.positions for span in spans if span.frame == 1)] = 1 / SIDE**2
        return chosen[:, None, None].expand_as(event.probs)

    for access, function, same in ((Access.READ, lambda event: None, True), (Access.WRITE, clips, False)):
        point = Subscription(point=Point.ATTENTION_PROBS, access=access, layers=(0, 1, 2, 3), rows=Rows.LAST)
        with Stack([Probe(subscription=point, function=function)]).attach(model, processor) as handle:
            assert torch.equal(handle.generate(**inputs, **options), plain) == same


def test_both_towers_are_there() -> None:
    model, _ = tiny()
    blocks = ADAPTER.vision_layers(model)
    assert len(blocks) == ADAPTER.facts(model).vision_layers == 4
    assert blocks[0] is model.model.image_tower.encoder.layers[0]
    assert blocks[2] is model.model.video_tower.encoder.layers[0]


def test_what_cannot_be_known_is_refused() -> None:
    model, _ = build()
    inputs = processed(["<video> and <image>", "<image>"])
    layout = layout_of(inputs)
    with pytest.raises(UnsupportedModel, match="pictures and videos in one batch"):
        ADAPTER.features(torch.zeros(2, SIDE**2, 32), layout)
    without = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    with pytest.raises(LayoutError, match="pixel_values_videos is missing"):
        layout_of(without)
    with pytest.raises(LayoutError, match="34 video tokens in a row, but video_llava makes 51 of 3 frames"):
        layout_of({**without, "pixel_values_videos": video(0, 3)[None]})
    with pytest.raises(LayoutError, match="bring 3 pictures"):
        layout_of({**inputs, "pixel_values_images": inputs["pixel_values_images"].repeat(2, 1, 1, 1)[:3]})
    model.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(UnsupportedModel, match="siglip"):
        ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs)


def test_a_picture_keeps_its_class_token_where_the_model_does() -> None:
    model, _ = build()
    model.config.vision_feature_select_strategy = "full"
    ids = torch.tensor([[1, *[model.config.image_token_id] * (2 * (SIDE**2 + 1)), 9]])
    first, second = ADAPTER.layout(model, ids, None, {}).images[0]
    assert first.positions.tolist() == list(range(2, 18))
    assert second.positions.tolist() == list(range(19, 35))
