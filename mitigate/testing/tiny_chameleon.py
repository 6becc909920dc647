"""A tiny Chameleon with its processor: a convolutional encoder turns pictures into codes of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    ChameleonVQVAEConfig,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_NAMES = {
    "image_token": "<image>",
    "boi_token": "<racm3:break>",
    "eoi_token": "<eoss>",
    "sep_token": "<reserved08706>",
}
_CODES = 20
#: As the family writes a code's number: letters for digits, between ``IMGIMG`` and ``Z``.
_CODE_WORDS = ["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in range(_CODES)]
_SPECIAL = [*_NAMES.values(), *_CODE_WORDS]
_SIDE, _GRID = 10, 5
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Chameleon of four layers with grouped heads, 5 x 5 codes a picture, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    words = tokenizer(_SPECIAL, names=_NAMES)
    pictures = ChameleonImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
    processor = ChameleonProcessor(pictures, words, image_seq_length=_GRID * _GRID)
    model = ChameleonForConditionalGeneration(_config(words.get_vocab()))
    randomise(model, seed, range(PAD, 4 + len(_NAMES)))
    with torch.no_grad():
        for layer in model.model.layers:  # normalised queries and keys would attend almost uniformly
            layer.self_attn.q_norm.weight.mul_(6.0)
    return model.to(torch.float32).eval(), processor


def _config(vocabulary: dict[str, int]) -> ChameleonConfig:
    codes = ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=_CODES,
        latent_channels=8,
        resolution=_SIDE,
        base_channels=_WIDTH,  # group norms of 32 groups want no less
        channel_multiplier=[1, 1],  # halves the picture once
        num_res_blocks=1,
    )
    return ChameleonConfig(
        vocab_size=len(vocabulary),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        vq_config=codes,
        vocabulary_map=vocabulary,
        **SPECIAL_IDS,
    )
