"""Tiny PaliGemmas (1 on Gemma, 2 on Gemma 2) with their processor: random weights, made in code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mitigate.testing.tiny_words import BEGIN, PAD, SPECIAL_IDS, UNKNOWN, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

_IMAGE = 4
_PATCH, _GRID = 4, 5
_LAYERS, _WIDTH, _HEADS = 4, 32, 4
_WINDOW = 12  # less than a picture


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a PaliGemma of four layers with grouped heads, 5 x 5 patches an image, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    return _built(GemmaConfig, {}, seed)


def build_2(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a PaliGemma 2: scores and logits are softly capped, every other layer keeps the latest 12 keys only.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    capped = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
    return _built(Gemma2Config, {**capped, "sliding_window": _WINDOW, "query_pre_attn_scalar": _WIDTH // _HEADS}, seed)


def _built(text: type[PretrainedConfig], options: dict[str, Any], seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = _processor()
    words = len(processor.tokenizer)
    decoder = text(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=2,
        head_dim=_WIDTH // _HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **options,
        **SPECIAL_IDS,
    )
    vision = SiglipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_GRID * _PATCH,
        patch_size=_PATCH,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config=decoder,
        image_token_index=_IMAGE,
        vocab_size=words,
        projection_dim=_WIDTH,
        hidden_size=_WIDTH,
        tie_word_embeddings=False,  # a tied head would repeat the last word for ever
        **SPECIAL_IDS,
    )
    model = PaliGemmaForConditionalGeneration(config)
    places = processor.tokenizer.convert_tokens_to_ids("<loc0000>")  # from here on: places and shapes, no words
    randomise(model, seed, (PAD, BEGIN, UNKNOWN, _IMAGE, _IMAGE + 1, *range(places, words)))
    with torch.no_grad():
        model.get_input_embeddings().weight.div_(_WIDTH**0.5)  # by which the model multiplies
    return model.to(torch.float32).eval(), processor


def _processor() -> PaliGemmaProcessor:
    side = _GRID * _PATCH
    pictures = SiglipImageProcessorPil(size={"height": side, "width": side}, image_seq_length=_GRID * _GRID)
    # the processor itself puts <s> after the pictures and ends the prompt with a line break
    words = tokenizer(["<image>", "\n"], names={"image_token": "<image>"}, begins=False)
    return PaliGemmaProcessor(image_processor=pictures, tokenizer=words)
