"""A tiny Video-LLaVA with its processor for pictures: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

from mitigate.adapters.processors import pictures_only
from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_IMAGE, _VIDEO = 4, 5
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}<{{ part['type'] }}> {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PATCH, _GRID = 4, 4
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Video-LLaVA of four layers with grouped heads, 4 x 4 patches an image, and the processor that fits it.

    The processor takes pictures only; one for videos needs torchvision.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = VideoLlavaForConditionalGeneration(_config(len(processor.tokenizer)))
    randomise(model, seed, (PAD, _IMAGE, _VIDEO))
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> VideoLlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_GRID * _PATCH,
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
    return VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        image_seq_length=_GRID * _GRID,
        vision_feature_layer=-2,
        **SPECIAL_IDS,
    )


def _processor() -> ProcessorMixin:
    side = _GRID * _PATCH
    pictures = VideoLlavaImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    words = tokenizer(["<image>", "<video>"], names={"image_token": "<image>", "video_token": "<video>"})
    return pictures_only(VideoLlavaProcessor)(
        image_processor=pictures,
        video_processor=words,  # without videos the second part is the tokenizer
        tokenizer=words,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
