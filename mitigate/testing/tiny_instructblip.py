"""A tiny InstructBLIP with its processor: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_IMAGE = 4
_PATCH, _SIDE, _QUERIES = 4, 20, 8
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make an InstructBLIP with a Vicuna of four layers with grouped heads, 8 queries a picture, and its processor.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    words, questions = tokenizer(["<image>"]), tokenizer([])
    questions.padding_side = "right"
    processor = InstructBlipProcessor(
        image_processor=BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE}),
        tokenizer=words,
        qformer_tokenizer=questions,
        num_query_tokens=_QUERIES,
    )
    model = InstructBlipForConditionalGeneration(_config(len(words), len(questions)))
    randomise(model, seed, (PAD, _IMAGE))
    return model.to(torch.float32).eval(), processor


def _config(words: int, questions: int) -> InstructBlipConfig:
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH}
    text = LlamaConfig(
        vocab_size=words,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **sizes,
        **SPECIAL_IDS,
    )
    vision = InstructBlipVisionConfig(
        num_hidden_layers=2, num_attention_heads=2, image_size=_SIDE, patch_size=_PATCH, **sizes
    )
    asking = InstructBlipQFormerConfig(
        vocab_size=questions, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64, **sizes
    )
    return InstructBlipConfig(
        vision_config=vision,
        qformer_config=asking,
        text_config=text,
        num_query_tokens=_QUERIES,
        image_token_index=_IMAGE,
        **SPECIAL_IDS,
    )
