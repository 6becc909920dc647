"""A tiny LLaVA with its processor: random weights, made in code, nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_PAD, _BEGIN, _END, _UNKNOWN, _IMAGE = range(len(_SPECIAL))
_WORDS = """
USER ASSISTANT : . , ? Yes No yes no is are there a an the in on of and or image picture describe this detail please
just answer question true false what who where how many color dog cat man woman car table person chair bottle cup tree
sky street red blue green two three red near left right big small
""".split()  # noqa: SIM905 - one word after another reads better
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_PATCH, _GRID = 4, 5
_LAYERS, _WIDTH = 4, 32


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a LLaVA of four layers with grouped heads, 5 x 5 patches an image, and the processor that fits it.

    Parameters
    ----------
    seed
        Seed of the weights; the global random state is left alone.
    """
    processor = _processor()
    model = LlavaForConditionalGeneration(_config(len(processor.tokenizer)))
    _randomise(model, seed)
    return model.to(torch.float32).eval(), processor


def _config(words: int) -> LlavaConfig:
    special = {"pad_token_id": _PAD, "bos_token_id": _BEGIN, "eos_token_id": _END}
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
        **special,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE,
        image_seq_length=_GRID * _GRID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        **special,
    )


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw weights under which attention is far from uniform; padding and placeholders are never preferred."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                continue  # norms stay at one, biases at zero
            std = 1.0 if "embed" in name and "patch" not in name else 1.6 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        model.lm_head.weight[[_PAD, _IMAGE]] = 0.0


def _processor() -> LlavaProcessor:
    words = [*_SPECIAL, *dict.fromkeys(_WORDS)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", _BEGIN)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    side = _GRID * _PATCH
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
