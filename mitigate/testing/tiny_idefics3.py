"""Tiny Idefics3 and SmolVLM with their processors: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mitigate.adapters.processors import pictures_only
from mitigate.testing.tiny_words import SPECIAL_IDS, randomise, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_MARKS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
_IMAGE = 4 + _MARKS.index("<image>")
_NAMES = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))
#: Words of the sentences around the frames of a video, and line ends.
_FRAMES = ("\n\n", "\n", "Frame", "from", "00", "01", "02", "You", "provided", "following", "series", "frames", "video")
_CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>{% endif %}{% endfor %}{% endif %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PATCH, _MERGE, _TILE = 2, 2, 12
_TOKENS = (_TILE // _PATCH // _MERGE) ** 2
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make an Idefics3 of four layers with grouped heads, 3 x 3 tokens a tile, and the processor that fits it.

    A square picture becomes two by two tiles and its small version; the tokenizer spells the tiles' names.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    spelled = sorted({part for name in _NAMES for part in name[1:-1].split("-")})
    words = tokenizer(_MARKS, begins=False)
    words.add_tokens([*_FRAMES, "<", ">", "-", *spelled])
    processor = Idefics3Processor(
        image_processor=_pictures(Idefics3ImageProcessorPil),
        tokenizer=words,
        image_seq_len=_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )
    return _built(Idefics3ForConditionalGeneration, Idefics3Config, words, seed), processor


def build_smolvlm(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a SmolVLM like the Idefics3, and its processor, whose tokenizer knows the tiles' names as tokens.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    words = tokenizer([*_MARKS, *_NAMES], begins=False)
    words.add_tokens(list(_FRAMES))
    kind: Any = pictures_only(SmolVLMProcessor)
    kind.video_processor = SimpleNamespace(num_frames=4, fps=1)  # which its chat template asks for also without videos
    processor = kind(
        image_processor=_pictures(SmolVLMImageProcessorPil),
        tokenizer=words,
        video_processor=None,
        image_seq_len=_TOKENS,
        chat_template=_CHAT_TEMPLATE,
    )
    return _built(SmolVLMForConditionalGeneration, SmolVLMConfig, words, seed), processor


def _pictures(kind: Any) -> Any:
    return kind(size={"longest_edge": 2 * _TILE}, max_image_size={"longest_edge": _TILE})


def _built(kind: Any, config: Any, words: Any, seed: int) -> PreTrainedModel:
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _TILE,
        "patch_size": _PATCH,
    }
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **SPECIAL_IDS,
    )
    model = kind(
        config(
            vision_config=vision,
            text_config=text,
            image_token_id=_IMAGE,
            scale_factor=_MERGE,
            **SPECIAL_IDS,
        )
    )
    never = [index for word, index in words.get_added_vocab().items() if word not in ("<s>", "</s>")]
    randomise(model, seed, never)
    return model.to(torch.float32).eval()
