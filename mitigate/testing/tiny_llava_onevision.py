"""A tiny LLaVA-OneVision with its processor: tiles that are joined and interpolated, plain rasters, and videos."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from mitigate.adapters.processors import pictures_only
from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_NAMES = {"image_token": "<image>", "video_token": "<video>"}
_SPECIAL = ["<|im_start|>", "<|im_end|>", *_NAMES.values()]
_IMAGE, _VIDEO = 6, 7
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'].upper() + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>ASSISTANT' }}{% endif %}"
)
_PATCH, _GRID = 4, 3
_SIDE = _PATCH * _GRID
_PINPOINTS = [[rows * _SIDE, columns * _SIDE] for rows in (1, 2, 3) for columns in (1, 2, 3)]
#: The patches of so many tiles are kept as they are; larger rasters are interpolated.
_ASPECT = "anyres_max_2"
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a LLaVA-OneVision of four layers with grouped heads, 3 x 3 patches a tile, and the processor that fits it.

    A picture alone is cut into up to 3 x 3 tiles, whose raster is interpolated to at most about 18 patches.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = LlavaOnevisionForConditionalGeneration(_config(len(processor.tokenizer)))
    never = (PAD, *range(4, 4 + len(_SPECIAL)))
    randomise(model, seed + 2, never)  # with the weights of 0 it would say one word over and over
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> LlavaOnevisionConfig:
    vision = SiglipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_SIDE,
        patch_size=_PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SPECIAL_IDS,
    )
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio=_ASPECT,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **SPECIAL_IDS,
    )


def _processor() -> ProcessorMixin:
    pictures = LlavaOnevisionImageProcessorPil(size={"height": _SIDE, "width": _SIDE}, image_grid_pinpoints=_PINPOINTS)
    return pictures_only(LlavaOnevisionProcessor)(
        image_processor=pictures,
        tokenizer=tokenizer(_SPECIAL, names=_NAMES, begins=False),
        num_image_tokens=_GRID * _GRID,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=_ASPECT,
        chat_template=_CHAT_TEMPLATE,
    )
