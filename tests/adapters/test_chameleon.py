"""Chameleon's layout, code rasters and masked logits against its processor, its encoder and its own forward."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers.models.chameleon.modeling_chameleon import ChameleonSwinDecoderLayer

from mitigate.adapters.chameleon import ChameleonAdapter
from mitigate.core.direct import DirectPath
from mitigate.core.layout import Role
from mitigate.core.stack import Stack
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel
from mitigate.methods.sgrs import SGRS
from mitigate.testing.tiny import PROMPTS, tiny_model
from mitigate.testing.tiny_chameleon import build

SIDE, CODES = 5, 25
ADAPTER = ChameleonAdapter()
SIZE = st.tuples(st.integers(4, 40), st.integers(4, 40))
PROMPT = st.tuples(st.integers(0, 3), st.lists(SIZE, max_size=3), st.integers(0, 3))


@cache
def tiny():
    return build()


def picture(width, height, seed=0):
    return Image.frombytes(
        "RGB", (width, height), bytes((seed * 7 + place * 37) % 256 for place in range(3 * width * height))
    )


def layout_of(inputs):
    model, processor = tiny()
    return ADAPTER.layout(model, inputs["input_ids"], inputs["attention_mask"], inputs, processor)


@settings(max_examples=40, deadline=None)
@given(st.lists(PROMPT, min_size=1, max_size=3))
def test_layout_of_any_batch(prompts):
    _, processor = tiny()
    texts = ["red " * before + "<image>" * len(sizes) + " tree" * after for before, sizes, after in prompts]
    images = [picture(*size) for _, sizes, _ in prompts for size in sizes]
    inputs = dict(processor(text=texts, images=images or None, padding=True, padding_side="left"))
    layout = layout_of(inputs)
    width = inputs["input_ids"].shape[1]
    image = 0
    for row, (before, sizes, after) in enumerate(prompts):
        roles = [Role.SYSTEM if sizes else Role.PROMPT] * (1 + before)  # the tokenizer's own first token
        roles += ([Role.SEPARATOR] + [Role.IMAGE] * CODES + [Role.SEPARATOR]) * len(sizes)
        roles += [Role.PROMPT] * (after + 1)  # and the processor's end of turn
        start = width - len(roles)
        assert layout.roles[row].tolist() == [Role.PAD] * start + roles
        assert [span.image for span in layout.images[row]] == list(range(image, image + len(sizes)))
        for number, span in enumerate(layout.images[row]):
            first = start + 1 + before + number * (CODES + 2) + 1
            assert span.positions.tolist() == list(range(first, first + CODES))
            assert (span.grid, span.tile, span.thumbnail, span.frame) == ((SIDE, SIDE), None, False, None)
        image += len(sizes)
        assert int(layout.after_image[row]) == (width - after - 1 if sizes else start)


def test_codes_at_a_span_are_in_raster_order():
    model, processor = copy.deepcopy(tiny())
    model.model.vqmodel.encoder = Local()
    inputs = ADAPTER.inputs(model, processor, ["who"], [[picture(20, 12), picture(10, 10, 3)]])
    layout = layout_of(inputs)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row, column, image in [(0, 0, 0), (3, 1, 0), (1, 3, 1), (4, 4, 1)]:
        changed = inputs["pixel_values"].clone()
        changed[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] *= -9.0
        seen.clear()
        model(**inputs)
        model(**{**inputs, "pixel_values": changed})
        different = (seen[0] != seen[1]).any(-1).nonzero().flatten().tolist()
        assert different == [int(layout.images[0][image].positions[SIDE * row + column])]


class Local(nn.Module):
    """An encoder that sees 2 x 2 pixels at each place."""

    def forward(self, pixels):
        means = nn.functional.avg_pool2d(pixels, 2).mean(1, keepdim=True)
        return means * torch.linspace(-4, 4, 8)[None, :, None, None]


def test_lens_logits_are_masked_as_the_models_own():
    model, processor = tiny()
    inputs = ADAPTER.inputs(model, processor, ["who", "what is this"], [[picture(10, 10)], []])
    output = model(**inputs, output_hidden_states=True)
    raw = ADAPTER.unembedding(model)(output.hidden_states[-1])
    kept = raw.clone()
    assert not torch.equal(raw, output.logits)
    torch.testing.assert_close(ADAPTER.logits(model, raw), output.logits, rtol=0, atol=0)
    assert torch.equal(raw, kept)
    codes = [token for word, token in processor.tokenizer.get_vocab().items() if word.startswith("IMGIMG")]
    assert bool((ADAPTER.logits(model, raw[0, -1])[codes] == torch.finfo(raw.dtype).min).all())
    assert len(codes) == model.config.vq_config.num_embeddings


def test_the_direct_path_follows_no_masked_logit():
    model, _ = tiny()
    path = DirectPath(model, ADAPTER)
    head = model.lm_head.weight.detach()
    normed, cotangent = torch.randn(2, head.shape[1]), torch.randn(2, head.shape[0])
    raw = (normed @ head.t()).requires_grad_()
    (expected,) = torch.autograd.grad(ADAPTER.logits(model, raw), raw, cotangent)
    assert bool((expected == 0).any())
    torch.testing.assert_close(path._through_head(normed, cotangent, head), expected)


def test_pixels_come_back_as_they_went():
    model, processor = tiny()
    pictures = [picture(20, 12), picture(12, 30, 1), picture(10, 10, 2)]
    inputs = ADAPTER.inputs(model, processor, ["who", "what"], [pictures[:1], pictures[1:]])
    layout = layout_of(inputs)
    images = ADAPTER.images(inputs, layout)
    assert torch.equal(ADAPTER.with_images(inputs, images, layout)["pixel_values"], inputs["pixel_values"])
    swapped = ADAPTER.inputs(model, processor, ["who", "what"], [pictures[2:], pictures[1::-1]])
    chosen = ADAPTER.chosen_images(inputs, [2, 1, 0], layout)
    assert torch.equal(chosen["pixel_values"], swapped["pixel_values"])


def test_prompts_are_written_as_the_processor_takes_them():
    model, processor = tiny()
    inputs = ADAPTER.inputs(model, processor, ["who is this"], [[picture(10, 10), picture(12, 12)]])
    begin, image, end, turn = (
        processor.tokenizer.convert_tokens_to_ids(word)
        for word in ("<racm3:break>", "<image>", "<eoss>", "<reserved08706>")
    )
    words = processor.tokenizer("who is this", add_special_tokens=False)["input_ids"]
    expected = [1, *[begin, *[image] * CODES, end] * 2, *words, turn]
    assert inputs["input_ids"].tolist() == [expected]
    assert ADAPTER.without_images(model, inputs["input_ids"][0], processor).tolist() == [1, *words, turn]
    templated = copy.copy(processor)
    templated.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part.get('text', '<image>') }}{% endfor %}"
        "{% endfor %}!"
    )
    assert ADAPTER.prompt_text(templated, "who", 1) == "<image>who!"


def test_what_it_has_not_is_refused():
    model, processor = tiny()
    with pytest.raises(UnsupportedModel, match="no tower of blocks"):
        ADAPTER.vision_layers(model)
    with pytest.raises(UnsupportedModel, match="no image features"):
        ADAPTER.projector(model)
    ids = torch.tensor([[5, *[4] * CODES, 6, 40]])
    with pytest.raises(ConfigError, match="processor"):
        ADAPTER.layout(model, ids, None, {})
    with pytest.raises(LayoutError, match="24 image tokens"):
        ADAPTER.layout(model, ids[:, 2:], None, {}, processor)
    with pytest.raises(LayoutError, match="of \\(5, 20\\) pixels"):
        ADAPTER.layout(model, ids, None, {"pixel_values": torch.zeros(1, 3, 5, 20)}, processor)
    assert ADAPTER.facts(model).vision_layers is None
    assert ADAPTER.decoder_config(model) is model.config


def test_geometry_of_the_published_model():
    model, processor = copy.deepcopy(tiny())
    config = type(model.config.vq_config)()
    assert (config.resolution, len(config.channel_multiplier)) == (512, 5)
    model.config.vq_config = config
    ids = torch.tensor([[5, *[4] * 1024, 6, 40]])
    span = ADAPTER.layout(model, ids, None, {}, processor).images[0][0]
    assert (span.grid, len(span.positions), span.stop) == ((32, 32), 1024, 1026)


def test_blocks_that_norm_what_attention_adds_say_so():
    """With ``swin_norm`` the first norm follows attention; otherwise it comes before it, off the direct path."""
    model, _ = tiny()
    plain = model.model.layers[0]
    swin = ChameleonSwinDecoderLayer(model.config, 0)
    assert ADAPTER.output_norm(plain) is None
    assert ADAPTER.output_norm(swin) is swin.input_layernorm


def test_history_from_prompts_of_unequal_length_in_float64() -> None:
    """Codes have the lowest logit there is, which is minus infinity where scores are kept in float32."""
    tiny = tiny_model("chameleon").cast(torch.float64)
    method = SGRS(history_init="prompt_tail", proposal="greedy_order", window=3, layers="all")
    inputs = tiny.inputs(PROMPTS[2:])  # one question is so short that it has a pass of its own
    with Stack([method]).attach(tiny.model, tiny.processor) as handle:
        handle.generate(**inputs, max_new_tokens=1, do_sample=False)
        counted = [sample["sgrs"] for sample in handle.telemetry()]
    assert [each["extra_forwards"] for each in counted] == [1.0, 1.0]
    assert all(math.isfinite(each["saliency"]) for each in counted)
