"""Chameleon: a picture is a raster of codes of the vocabulary, in place of its placeholder tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.core.layout import ImageSpan
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch


class ChameleonAdapter(Adapter):
    """``ChameleonForConditionalGeneration``. Pictures enter as codes: there is no tower and there are no features."""

    family = "chameleon"
    needs_processor = True
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_chameleon:build"

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Refuse: pictures are encoded by convolutions.

        Raises
        ------
        UnsupportedModel
            Always.
        """
        raise UnsupportedModel(f"{self.family}: convolutions encode the pictures; there is no tower of blocks")

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Refuse: a picture's codes are embedded like words.

        Raises
        ------
        UnsupportedModel
            Always.
        """
        raise UnsupportedModel(f"{self.family}: pictures become codes of the vocabulary; there are no image features")

    def output_norm(self, layer: Any) -> nn.Module | None:
        """Return the norm on what attention adds: with ``swin_norm`` a block's first norm stands there."""
        return cast(nn.Module, layer.input_layernorm) if "Swin" in type(layer).__name__ else None

    def logits(self, model: PreTrainedModel, logits: Tensor) -> Tensor:
        """Return logits under which no picture code is ever chosen, as the model's forward does."""
        codes = torch.tensor(model.model.vocabulary_mapping.image_tokens, device=logits.device)
        return logits.index_fill(-1, codes, torch.finfo(logits.dtype).min)

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the ids of the tokens that begin and end a picture."""
        return frozenset((cast(Any, processor).image_start_token_id, cast(Any, processor).image_end_token_id))

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into square rasters; every level of the encoder but the last halves the picture."""
        codes = batch.model.config.vq_config
        side = codes.resolution // 2 ** (len(codes.channel_multiplier) - 1)
        pixels = batch.inputs.get("pixel_values")
        if pixels is not None and tuple(pixels.shape[-2:]) != (codes.resolution,) * 2:
            raise LayoutError(
                f"{self.family}: pictures of {tuple(pixels.shape[-2:])} pixels, the model's are {codes.resolution} a"
                " side; was the prompt made by this model's processor?"
            )
        return [
            ImageSpan(batch.picture()[0], torch.arange(start, stop, device=row.device), (side, side), stop)
            for start, stop in equal_spans(row, batch.model.config.image_token_id, side * side, self.family)
        ]

    def prompt_text(self, processor: ProcessorMixin, prompt: str, pictures: int) -> str:
        """Return the pictures' placeholders and the prompt; the processor itself appends the end of the user's turn."""
        if getattr(processor, "chat_template", None) is not None:
            return super().prompt_text(processor, prompt, pictures)
        return str(cast(Any, processor).image_token) * pictures + prompt
