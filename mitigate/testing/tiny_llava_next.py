"""A tiny LLaVA-NeXT with its processor: pictures become a small raster and up to four joined tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_IMAGE = 4
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PATCH, _GRID = 4, 3
_SIDE = _PATCH * _GRID
_PINPOINTS = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a LLaVA-NeXT of four layers with grouped heads, 3 x 3 patches a tile, and the processor that fits it.

    A square picture is cut into 2 x 2 tiles, one at least twice as wide or high into two.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = LlavaNextForConditionalGeneration(_config(len(processor.tokenizer)))
    randomise(model, seed, (PAD, _IMAGE))
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> LlavaNextConfig:
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    text = LlamaConfig(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SPECIAL_IDS,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=_GRID * _GRID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        **SPECIAL_IDS,
    )


def _processor() -> LlavaNextProcessor:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE},
        crop_size={"height": _SIDE, "width": _SIDE},
        image_grid_pinpoints=_PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(["<image>"], names={"image_token": "<image>"}),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
