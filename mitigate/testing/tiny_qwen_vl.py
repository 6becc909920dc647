"""Tiny Qwen-VL models (2, 2.5, 3, with experts) and their processors: random weights, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mitigate.adapters.processors import pictures_only
from mitigate.testing.tiny_words import PAD, SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TOKENS = {"vision_start_token_id": 6, "vision_end_token_id": 7, "image_token_id": 8, "video_token_id": 9}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>answer the question .<|im_end|>{% endif %}"
    "<|im_start|>{{ message['role'].upper() }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT {% endif %}"
)
_PATCH, _MERGE = 4, 2
_SIDE = 4 * _PATCH * _MERGE  # square pictures become 4 x 4 tokens
_LAYERS, _WIDTH, _HEADS = 4, 32, 4
_HALF = _WIDTH // _HEADS // 2  # rotary frequencies, shared out among time, rows and columns


def build_qwen2(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Qwen2-VL of four layers with grouped heads, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    vision = {**_vision(), "embed_dim": _WIDTH, "hidden_size": _WIDTH, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_text(), vision_config=vision, **_TOKENS, **SPECIAL_IDS)
    return _built(Qwen2VLForConditionalGeneration, config, seed), _processor(Qwen2VLProcessor)


def build_qwen2_5(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Qwen2.5-VL whose vision tower looks at windows of 2 x 2 tokens first, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    windows = {"window_size": 2 * _PATCH * _MERGE, "fullatt_block_indexes": [1], "out_hidden_size": _WIDTH}
    vision = {**_vision(), "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, **windows}
    config = Qwen2_5_VLConfig(text_config=_text(), vision_config=vision, **_TOKENS, **SPECIAL_IDS)
    return _built(Qwen2_5_VLForConditionalGeneration, config, seed), _processor(Qwen2_5_VLProcessor)


def build_qwen3(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Qwen3-VL whose first two decoder layers receive deeper visual features, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    config = Qwen3VLConfig(text_config=_text3(), vision_config=_vision3(), **_TOKENS, **SPECIAL_IDS)
    return _built(Qwen3VLForConditionalGeneration, config, seed), _processor(Qwen3VLProcessor)


def build_qwen3_moe(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a Qwen3-VL as `build_qwen3` does, with two of four experts for every token.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    text = {**_text3(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": _WIDTH}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_vision3(), **_TOKENS, **SPECIAL_IDS)
    model = _built(Qwen3VLMoeForConditionalGeneration, config, seed)
    model.set_experts_implementation("eager")  # the fused one knows no float64, in which gradients are checked
    return model, _processor(Qwen3VLProcessor)


def _built(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> PreTrainedModel:
    model = kind(config)
    randomise(model, seed, (PAD, *range(4, 4 + len(_SPECIAL))))
    return model.to(torch.float32).eval()


def _text() -> dict[str, Any]:
    return {
        "vocab_size": len(_tokenizer()),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [_HALF - 2, 1, 1]},
        **SPECIAL_IDS,
    }


def _vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": 2,
    }


def _text3() -> dict[str, Any]:
    text = _text()
    positions = {**text["rope_parameters"], "mrope_interleaved": True}
    return {**text, "head_dim": _WIDTH // _HEADS, "rope_parameters": positions}


def _vision3() -> dict[str, Any]:
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "out_hidden_size": _WIDTH}
    return {**_vision(), **sizes, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


def _tokenizer() -> Any:
    return tokenizer(_SPECIAL, begins=False)


def _processor(kind: Any) -> ProcessorMixin:
    pictures = Qwen2VLImageProcessorPil(
        size={"shortest_edge": _SIDE * _SIDE // 4, "longest_edge": _SIDE * _SIDE},
        patch_size=_PATCH,
        temporal_patch_size=2,
        merge_size=_MERGE,
    )
    return pictures_only(kind)(image_processor=pictures, tokenizer=_tokenizer(), chat_template=_CHAT_TEMPLATE)
