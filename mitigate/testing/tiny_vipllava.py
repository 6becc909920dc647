"""A tiny ViP-LLaVA with its processor, which is LLaVA's: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from mitigate.testing import tiny_llava
from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a ViP-LLaVA of four layers with grouped heads, 5 x 5 patches an image, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    simple, processor = tiny_llava.build(seed)
    config = VipLlavaConfig(
        vision_config=simple.config.vision_config,
        text_config=simple.config.text_config,
        image_token_index=simple.config.image_token_id,
        image_seq_length=simple.config.image_seq_length,
        vision_feature_layer=[-2, -1],
        **SPECIAL_IDS,
    )
    model = VipLlavaForConditionalGeneration(config)
    randomise(model, seed, (PAD, simple.config.image_token_id))
    return model.to(torch.float32).eval(), processor
