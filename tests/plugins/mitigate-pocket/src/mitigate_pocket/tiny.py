"""A tiny random Pocket-VL with its processor, for the conformance checks of methods."""

from __future__ import annotations

from mitigate.testing.tiny_words import SPECIAL_IDS, randomise, tokenizer
from transformers import LlamaConfig, PreTrainedModel, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mitigate_pocket.modeling import PocketConfig, PocketForConditionalGeneration
from mitigate_pocket.processing import BEGIN, END, IMAGE, PocketProcessor

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    + IMAGE
    + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def build(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make a model of four layers with grouped heads, six queries a picture, and the processor that fits it."""
    words = tokenizer([IMAGE, BEGIN, END])
    side = {"height": 16, "width": 16}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SPECIAL_IDS,
    )
    model = PocketForConditionalGeneration(PocketConfig(text_config=text, image_token_id=4, **SPECIAL_IDS))
    randomise(model, seed, range(7))
    return model.float().eval(), PocketProcessor(pixels, words, TEMPLATE)
