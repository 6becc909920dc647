"""Pocket-VL: learned queries look at the patches of a picture; a LLaMA decoder reads what they find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class PocketConfig(PretrainedConfig):
    """Configuration; ``text_config`` is the decoder's, and the very object its attention modules hold."""

    model_type = "pocket_vl"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 - as transformers writes it

    text_config: LlamaConfig | dict | None = None
    image_size: int = 16
    patch_size: int = 4
    queries: int = 6
    image_token_id: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        """Make the decoder's configuration from plain values."""
        if not isinstance(self.text_config, LlamaConfig):
            self.text_config = LlamaConfig(**(self.text_config or {}))
        super().__post_init__(**kwargs)


class Reader(nn.Module):
    """Queries that attend to a picture's patches: ``[images, 3, S, S]`` becomes ``[images, queries, D]``."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.queries = nn.Parameter(torch.randn(config.queries, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of every picture."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(pixels), -1, -1)
        return self.attention(queries, patches, patches, need_weights=False)[0]


class PocketForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model. Its decoder is transformers' own, so every point of mitigate is served."""

    config_class = PocketConfig
    config: PocketConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: PocketConfig) -> None:
        super().__init__(config)
        self.reader = Reader(config)
        self.language_model = LlamaModel(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> LlamaModel:
        """Return the decoder."""
        return self.language_model

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of words."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the unembedding."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Put the features of all pictures in place of the placeholders, in order, and run the decoder."""
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            here = (input_ids == self.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(here, self.reader(pixel_values).to(embeds))
        out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Give the pixels to the first forward only."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


AutoConfig.register("pocket_vl", PocketConfig)
AutoModelForImageTextToText.register(PocketConfig, PocketForConditionalGeneration)
