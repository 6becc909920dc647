"""PaliGemma (1 on Gemma, 2 on Gemma 2): rasters at the start of a prompt that sees all of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.adapters.placing import input_device
from mitigate.core.layout import ImageSpan

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch


class PaliGemmaAdapter(Adapter):
    """``PaliGemmaForConditionalGeneration``.

    Every prompt token attends to the whole prompt, pictures included; only what is generated is causal. In PaliGemma 2
    half of the blocks have a sliding window, which counts from the first generated token on: within the prompt it hides
    nothing.
    """

    family = "paligemma"
    causal_prompt = False
    text_only = False
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_paligemma:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the SigLIP tower."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layers)

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``(image_size / patch_size)²`` patches."""
        config = batch.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [
            ImageSpan(batch.picture()[0], torch.arange(start, stop, device=row.device), (side, side), stop)
            for start, stop in equal_spans(row, config.image_token_id, side * side, self.family)
        ]

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return positions counted from 1, and the token type of a prompt (0), which makes it see all of itself."""
        causal = super().prompt_inputs(model, ids, mask, pictures)
        return {"position_ids": causal["position_ids"] + 1, "token_type_ids": torch.zeros_like(ids)}

    def prompt_text(self, processor: ProcessorMixin, prompt: str, pictures: int) -> str:
        """Return the pictures' tokens, the token that begins a text, the prompt and the line break that ends it.

        A chat template that was given stands for the prompt and the line break.
        """
        image, begin = processor.image_token * processor.image_seq_length, processor.tokenizer.bos_token
        templated = processor.chat_template is not None
        text = super().prompt_text(processor, prompt, 0).removeprefix(begin) if templated else f"{prompt}\n"
        return f"{image * pictures}{begin}{text}"

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch as the processor does, which itself takes no prompt without a picture."""
        from transformers import BatchFeature

        texts = [
            self.prompt_text(processor, prompt, len(pictures)) for prompt, pictures in zip(prompts, images, strict=True)
        ]
        batch = processor.tokenizer(
            texts, return_token_type_ids=True, return_tensors="pt", padding=True, padding_side="left"
        )
        flat = [picture for pictures in images for picture in pictures]
        if flat:
            batch |= processor.image_processor(flat, return_tensors="pt")
        return BatchFeature(dict(batch)).to(input_device(model), dtype=model.dtype)
