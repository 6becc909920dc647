"""What the bus must know about a model family: its parts, its geometry, and the roles of its tokens."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.core.facts import ModelFacts
from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PretrainedConfig, PreTrainedModel, ProcessorMixin

    from mitigate.core.request import Request


class Adapter(ABC):
    """One model family. Subclasses bring the rule for image spans; the rest is transformers' common interface."""

    family: str
    """transformers' ``model_type``, and the name under which the adapter is registered."""
    spatial_grid: bool = True
    """Whether image tokens form a raster."""
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""
    tiny: ClassVar[str | None] = None
    """``module:function`` that builds a tiny random model and its processor, for the conformance checks of methods."""

    # ------------------------------------------------------------------------------------------------------ the model

    def decoder_layers(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the blocks of the text decoder, first to last."""
        return cast("Sequence[Any]", model.get_decoder().layers)

    def decoder_config(self, model: PreTrainedModel) -> PretrainedConfig:
        """Return the configuration object the decoder's attention modules share."""
        return cast("PretrainedConfig", model.config.get_text_config(decoder=True))

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return the norm between the last block and the unembedding: a scale without shift (RMSNorm)."""
        return cast(nn.Module, model.get_decoder().norm)

    def output_projection(self, layer: Any) -> nn.Module:
        """Return the linear map from the concatenated heads of a block to the residual stream."""
        return cast(nn.Module, layer.self_attn.o_proj)

    def mlp(self, layer: Any) -> nn.Module:
        """Return the MLP of a block; its input and output are ``[B, Q, D]``."""
        return cast(nn.Module, layer.mlp)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower, first to last.

        Raises
        ------
        UnsupportedModel
            If the family has none, or its adapter does not know them.
        """
        raise UnsupportedModel(f"{self.family}: the blocks of the vision tower are not known")

    @abstractmethod
    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the module whose output is the projected image features ``[images, N, D]``."""

    def facts(self, model: PreTrainedModel) -> ModelFacts:
        """Read the geometry off a loaded model."""
        return self.facts_of_config(model.config)

    def facts_of_config(self, config: Any) -> ModelFacts:
        """Read the geometry off a configuration."""
        text = config.get_text_config(decoder=True)
        return ModelFacts(
            family=config.model_type,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            spatial_grid=self.spatial_grid,
            vision_layers=getattr(getattr(config, "vision_config", None), "num_hidden_layers", None),
        )

    # ----------------------------------------------------------------------------------------------------- the layout

    @abstractmethod
    def image_spans(self, model: PreTrainedModel, row: Tensor, inputs: Mapping[str, Any]) -> list[ImageSpan]:
        """Return the images of one row of token ids ``[P]`` from left to right, ``image`` counted from 0.

        Raises
        ------
        LayoutError
            If the tokens do not fit the model's image geometry.
        """

    def layout(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any]
    ) -> TokenLayout:
        """Derive the roles of a batch of prompts.

        Parameters
        ----------
        ids
            ``[B, P]`` token ids as the processor made them (image placeholders expanded).
        mask
            ``[B, P]`` attention mask, or ``None`` when nothing is padded.
        inputs
            The other inputs of the forward (image sizes, grids).

        Raises
        ------
        LayoutError
            If prompts are padded on the right, the mask has another shape, or the image tokens fit no image.
        """
        if mask is None:
            mask = torch.ones_like(ids)
        if mask.shape != ids.shape:
            raise LayoutError(
                f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(ids.shape)} (batch, prompt)"
            )
        if not bool(mask[:, -1].all()):
            raise LayoutError("prompts are padded on the right; set processor.tokenizer.padding_side = 'left'")
        roles = torch.where(mask.bool(), int(Role.PROMPT), int(Role.PAD)).to(torch.int8)
        rows: list[tuple[ImageSpan, ...]] = []
        count = 0
        image_tokens = ids == model.config.image_token_id
        for index in range(ids.shape[0]):
            spans = self.image_spans(model, ids[index], inputs)
            if spans:
                first = int(image_tokens[index].int().argmax())
                before = torch.arange(ids.shape[1], device=ids.device) < first
                roles[index, before & mask[index].bool()] = int(Role.SYSTEM)
            rows.append(tuple(dataclasses.replace(span, image=span.image + count) for span in spans))
            count += len({span.image for span in spans})
        roles[image_tokens] = int(Role.IMAGE)
        return TokenLayout(roles, tuple(rows), ids.shape[1])

    def positions(self, mask: Tensor) -> Tensor:
        """Return the position ids ``[B, L]`` of a left-padded batch with mask ``[B, L]``: text and images in one line.

        A family whose positions depend on the images (rows and columns of a picture) overrides this.
        """
        return (mask.long().cumsum(1) - 1).clamp_min(0)

    def whole_prompt(self, inputs: Mapping[str, Any], request: Request) -> dict[str, Any]:
        """Turn the inputs of the first forward into those of a cacheless pass over the whole prompt.

        The first forward may lack the prompt's last token (split prefill); images are not encoded again
        when ``generate`` has encoded them already.

        Raises
        ------
        UnsupportedModel
            If the prompt arrives in chunks: then so do its images.
        """
        layout = request.layout
        length = layout.prompt_length
        if inputs["input_ids"].shape[1] < length - 1:
            raise UnsupportedModel(
                "a diagnostic pass needs the whole prompt at once; leave prefill_chunk_size and past_key_values unset"
            )
        mask = layout.valid[:, :length].long()
        dropped = {"past_key_values", "input_ids", "attention_mask", "position_ids", "logits_to_keep", "labels"}
        kept = {name: value for name, value in inputs.items() if name not in dropped}
        return {
            **kept,
            "input_ids": request.ids[:, :length],
            "attention_mask": mask,
            "position_ids": self.positions(mask),
            "use_cache": False,
            "logits_to_keep": 1,
            "return_dict": True,
        }

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the pixels of every image as the processor made them, from the inputs of a request.

        Raises
        ------
        UnsupportedModel
            If the images came encoded already.
        """
        pixels = inputs.get("pixel_values")
        if pixels is None and inputs.get("mm_encoder_outputs") is not None:
            raise UnsupportedModel("the images came encoded; give pixel_values, which the stack needs")
        return [] if pixels is None else list(pixels)

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        """Return the inputs with other pixels in place of every image's."""
        return {**inputs, "pixel_values": torch.stack(list(images))} if images else dict(inputs)

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int]) -> dict[str, Any]:
        """Return the image inputs of a batch whose images are the given ones, in this order, repeated or not."""
        images = self.images(inputs)
        return self.with_images({}, [images[index] for index in wanted])

    def image_pixels(self, inputs: Mapping[str, Any], image: int) -> Tensor:
        """Return one image's pixels as the processor made them, from the inputs of a request.

        Raises
        ------
        UnsupportedModel
            If the images came in another form.
        """
        images = self.images(inputs)
        if image >= len(images):
            raise UnsupportedModel("the request brings no pixel_values to tell its images apart")
        return images[image]

    def without_images(self, model: PreTrainedModel, row: Tensor) -> Tensor:
        """Return the token ids ``[n]`` of a prompt without its images; a family drops its separators here too."""
        return row[row != model.config.image_token_id]

    # ----------------------------------------------------------------------------------------------------- the inputs

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch: chat template, left padding, tensors on the model's device.

        Parameters
        ----------
        prompts
            User texts, without template or image placeholders.
        images
            Per prompt its pictures; they come before the text.
        """
        texts = []
        for prompt, pictures in zip(prompts, images, strict=True):
            content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
            texts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        flat = [picture for pictures in images for picture in pictures]
        batch = processor(text=texts, images=flat or None, return_tensors="pt", padding=True, padding_side="left")
        return cast("BatchFeature", batch.to(model.device, dtype=model.dtype))


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of the runs of True in ``[P]``."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    starts = (padded == 1).nonzero().flatten().tolist()
    stops = (padded == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))


def equal_spans(row: Tensor, image_token: int, size: int, family: str) -> Iterable[tuple[int, int]]:
    """Cut runs of image tokens into images of ``size`` tokens; adjacent images share a run.

    Raises
    ------
    LayoutError
        If a run is no multiple of the size.
    """
    for start, stop in runs(row == image_token):
        if (stop - start) % size:
            raise LayoutError(
                f"{stop - start} image tokens in a row, but {family} makes {size} of each image;"
                " was the prompt made by this model's processor?"
            )
        for first in range(start, stop, size):
            yield first, first + size
