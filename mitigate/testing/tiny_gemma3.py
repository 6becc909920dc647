"""A tiny Gemma 3 with its processor: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mitigate.testing.tiny_words import BEGIN, PAD, SPECIAL_IDS, UNKNOWN, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

#: As in the family's vocabulary, several line breaks in a row are one token.
_BREAKS = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
_SPECIAL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
_BEGIN_IMAGE, _END_IMAGE, _IMAGE = 6, 7, 8
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PATCH, _SIDE, _POOLED = 2, 16, 4  # 16 x 16 patches, of which 4 x 4 share a token
_WINDOW = 24  # a picture is in sight of what directly follows it, and then no more
_LAYERS, _WIDTH, _HEADS = 4, 32, 4


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Gemma 3 of four layers, three of which keep the latest 24 keys only, and its processor.

    Every picture becomes 4 x 4 tokens. Called with ``do_pan_and_scan=True, pan_and_scan_min_crop_size=16`` the
    processor adds crops of wide and high ones.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = Gemma3ForConditionalGeneration(_config(len(processor.tokenizer)))
    marks = range(UNKNOWN, UNKNOWN + 1 + len(_SPECIAL) + len(_BREAKS))
    randomise(model, seed, (PAD, BEGIN, *marks))
    with torch.no_grad():
        model.get_input_embeddings().weight.div_(_WIDTH**0.5)  # by which the model multiplies
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> Gemma3Config:
    text = Gemma3TextConfig(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=2,
        head_dim=_WIDTH // _HEADS,
        query_pre_attn_scalar=2,  # queries and keys are normed: this is what sharpens attention
        max_position_embeddings=512,
        sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        tie_word_embeddings=False,
        **SPECIAL_IDS,
    )
    vision = SiglipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_SIDE * _PATCH,
        patch_size=_PATCH,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=_POOLED * _POOLED,
        boi_token_index=_BEGIN_IMAGE,
        eoi_token_index=_END_IMAGE,
        image_token_index=_IMAGE,
        tie_word_embeddings=False,  # a tied head would repeat the last word for ever
        **SPECIAL_IDS,
    )


def _processor() -> Gemma3Processor:
    side = _SIDE * _PATCH
    pictures = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    names = {"boi_token": _SPECIAL[2], "eoi_token": _SPECIAL[3], "image_token": _SPECIAL[4]}
    return Gemma3Processor(
        image_processor=pictures,
        tokenizer=tokenizer([*_SPECIAL, *_BREAKS], names=names),
        image_seq_length=_POOLED * _POOLED,
        chat_template=_CHAT_TEMPLATE,
    )
