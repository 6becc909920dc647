"""InstructBLIP: a picture is 32 answers of a Q-Former to the question, put before it; they form no raster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.adapters.placing import input_device
from mitigate.adapters.spans import Batch
from mitigate.core.facts import ModelFacts
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

#: Inputs with one entry per picture.
_PER_PICTURE = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")


class InstructBlipAdapter(Adapter):
    """``InstructBlipForConditionalGeneration`` with a Vicuna.

    Its ``generate`` embeds the pictures itself and then has the language model generate, which is what the bus hooks.
    """

    family = "instructblip"
    spatial_grid = False
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_instructblip:build"

    def entry(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the language model."""
        return model.language_model

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the projection of the Q-Former's answers."""
        return cast(nn.Module, model.language_projection)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower; the Q-Former's are not among them."""
        return cast("Sequence[nn.Module]", model.vision_model.encoder.layers)

    def facts_of_config(self, config: Any) -> ModelFacts:
        """Read the geometry off a configuration.

        Raises
        ------
        UnsupportedModel
            If the language model is another one than Vicuna.
        """
        decoder = config.text_config.model_type
        if decoder != "llama":
            reason = "is an encoder with a decoder" if decoder == "t5" else "is not built like a Llama"
            raise UnsupportedModel(
                f"instructblip: its language model ({decoder}) {reason}, which no method can hook; "
                "use a checkpoint with Vicuna: Salesforce/instructblip-vicuna-7b or -13b"
            )
        return super().facts_of_config(config)

    # ----------------------------------------------------------------------------------------------------- the layout

    def picture_facts(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Sequence[Any] | None, None]:
        """Count the pictures; one of zeros only keeps ``generate`` content when no prompt has any."""
        pixels = inputs.get("pixel_values")
        return (None if pixels is None or not bool(pixels.any()) else [None] * len(pixels)), None

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into the answers of the Q-Former to each picture."""
        config = batch.model.config
        return [
            ImageSpan(batch.picture()[0], torch.arange(start, stop, device=row.device), None, stop)
            for start, stop in equal_spans(row, config.image_token_id, config.num_query_tokens, self.family)
        ]

    def completed(self, layout: TokenLayout, ids: Tensor, batch: Batch) -> TokenLayout:
        """Let spans end after the padding the processor puts between picture and text: there the text begins."""
        images = tuple(
            tuple(dataclasses.replace(span, stop=_next(valid, span.stop)) for span in spans)
            for spans, valid in zip(layout.images, layout.valid, strict=True)
        )
        return dataclasses.replace(layout, images=images)

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return position ids and, with pictures, the embedded prompt: the language model takes no pictures."""
        found = super().prompt_inputs(model, ids, mask, pictures)
        given = {name: pictures[name] for name in (*_PER_PICTURE, "interpolate_pos_encoding") if name in pictures}
        if given:
            embeds = model.get_input_embeddings()(ids)
            features = model.get_image_features(**given, return_dict=True).pooler_output.to(embeds)
            found["inputs_embeds"] = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features)
        return found

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the pixels of every picture that the prompts show."""
        return super().images(inputs, layout) if any(layout.images) else []

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return these pictures, each with the question that the Q-Former answers about it."""
        if not wanted:
            return {}
        given = {name: value for name, value in inputs.items() if name == "interpolate_pos_encoding"}
        return given | {name: inputs[name][list(wanted)] for name in _PER_PICTURE if inputs.get(name) is not None}

    # ----------------------------------------------------------------------------------------------------- the inputs

    def prompt_text(self, processor: ProcessorMixin, prompt: str, pictures: int) -> str:
        """Return the user's words: the family has no chat format, unless one was given; pictures stand before it."""
        return prompt if processor.chat_template is None else super().prompt_text(processor, prompt, 0)

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch, padded before the pictures.

        The processor itself takes one picture per prompt, and pads between it and the text.
        """
        from transformers import BatchFeature

        tokenizer = processor.tokenizer
        texts = [
            self.prompt_text(processor, prompt, len(pictures)) for prompt, pictures in zip(prompts, images, strict=True)
        ]
        answers = [model.config.image_token_id] * model.config.num_query_tokens
        rows = [
            answers * len(pictures) + tokenizer(text)["input_ids"] for text, pictures in zip(texts, images, strict=True)
        ]
        batch = dict(tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))
        asked = [text for text, pictures in zip(texts, images, strict=True) for _ in pictures]
        questions = processor.qformer_tokenizer(
            asked or texts[:1], padding=True, padding_side="right", return_tensors="pt"
        )
        flat = [picture for pictures in images for picture in pictures]
        side = model.config.vision_config.image_size
        batch |= {
            "qformer_input_ids": questions["input_ids"],
            "qformer_attention_mask": questions["attention_mask"],
            "pixel_values": processor.image_processor(flat, return_tensors="pt")["pixel_values"]
            if flat
            else torch.zeros(1, 3, side, side),  # generate wants a picture; no token stands for this one
        }
        return BatchFeature(batch).to(input_device(model), dtype=model.dtype)


def _next(valid: Tensor, column: int) -> int:
    """Return the first column from ``column`` on that is no padding."""
    rest = valid[column:]
    return column + int(rest.int().argmax()) if bool(rest.any()) else column
