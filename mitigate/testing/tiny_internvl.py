"""A tiny InternVL with its processor: pictures of several shapes become several tiles and a thumbnail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from mitigate.adapters.processors import pictures_only
from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_SPECIAL = ["<|im_start|>", "<|im_end|>", *_NAMES.values()]
_IMAGE = 4 + _SPECIAL.index("<IMG_CONTEXT>")
_FRAMES = [f"Frame{number}" for number in range(1, 5)]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PATCH, _SIDE = 4, 24
_TOKENS = (_SIDE // _PATCH // 2) ** 2
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make an InternVL of four layers with grouped heads, 3 x 3 tokens a tile, and the processor that fits it.

    A picture twice as wide as high becomes two tiles and a thumbnail; at most four tiles are cut.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = InternVLForConditionalGeneration(_config(len(processor.tokenizer)))
    randomise(model, seed, range(PAD, 4 + len(_SPECIAL)))
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> InternVLConfig:
    vision = InternVLVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[_SIDE, _SIDE],
        patch_size=[_PATCH, _PATCH],
    )
    text = Qwen2Config(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **SPECIAL_IDS,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_IMAGE,
        image_seq_length=_TOKENS,
        tie_word_embeddings=False,
        **SPECIAL_IDS,
    )


def _processor() -> ProcessorMixin:
    words = tokenizer(_SPECIAL, names=_NAMES, begins=False)
    words.add_tokens(_FRAMES)
    return pictures_only(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(size={"height": _SIDE, "width": _SIDE}, max_patches=4),
        tokenizer=words,
        image_seq_length=_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )
