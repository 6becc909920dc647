"""Gemma 3: pooled rasters between begin and end tokens, on request with crops of wide and high pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans, runs
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch


class Gemma3Adapter(Adapter):
    """``Gemma3ForConditionalGeneration``.

    With ``do_pan_and_scan=True`` the processor adds crops to a wide or high picture. They are spans of their own that
    share its ``image``; the whole picture comes first, with ``thumbnail=True``. The crops lie in one row or in one
    column, and neither the tokens nor the inputs say which, so that their ``tile`` is ``None``. They are told from
    further pictures by the words the processor puts between them, for which a prompt with several rasters needs the
    processor; a picture that only a blank parts from the last crop before it reads like a crop and is taken for one.
    The processor's blank lines around a raster and its words before the whole picture are text of the prompt.

    At the projector the features of a picture are those of its rasters one after the other; its pixels are
    ``[rasters, C, H, W]``.
    """

    family = "gemma3"
    nested_images = True
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_gemma3:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector, which also pools the patches."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the SigLIP tower; its patches are not pooled yet."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layers)

    # ----------------------------------------------------------------------------------------------------- the layout

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the tokens around a raster."""
        return frozenset({model.config.boi_token_id, model.config.eoi_token_id})

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return nothing: pixels come raster by raster, so that not even the number of pictures is known."""
        return None, None

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``mm_tokens_per_image`` pooled patches, and tell crops from pictures."""
        config = batch.model.config
        side = math.isqrt(config.mm_tokens_per_image)
        found = list(equal_spans(row, config.image_token_id, side * side, self.family))
        crops = self._crops(row, found, batch.processor)
        spans: list[ImageSpan] = []
        for (start, stop), crop, next_crop in zip(found, crops, [*crops, False][1:], strict=True):
            image = spans[-1].image if crop else batch.picture()[0]
            positions = torch.arange(start, stop, device=row.device)
            spans.append(ImageSpan(image, positions, (side, side), stop, thumbnail=next_crop and not crop))
        return spans

    def _crops(self, row: Tensor, found: Sequence[tuple[int, int]], processor: ProcessorMixin | None) -> list[bool]:
        """Say of each raster whether it is a crop of the picture before it."""
        if len(found) < 2:
            return [False] * len(found)
        if processor is None:
            raise ConfigError(
                f"{self.family}: only the tokenizer can tell crops from pictures; attach with the processor:"
                " stack.attach(model, processor)"
            )
        text = processor.replace_image_token({"num_crops": [2]}, 0)  # a picture and two crops, as in a prompt
        model_row = torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids)
        image = runs(model_row == processor.tokenizer.image_token_id)
        opening, further = (model_row[one[1] : other[0]].tolist() for one, other in pairwise(image))
        crops = [False]
        for one, other in pairwise(found):
            crops.append(row[one[1] : other[0]].tolist() == (further if crops[-1] else opening))
        return crops

    def completed(self, layout: TokenLayout, ids: Tensor, batch: Batch) -> TokenLayout:
        """Compare the rasters of the prompts with the pixels."""
        pixels, rasters = batch.inputs.get("pixel_values"), sum(_rasters(layout))
        if pixels is not None and len(pixels) != rasters:
            raise LayoutError(
                f"the inputs bring {len(pixels)} pictures and crops, but the prompts hold the tokens of {rasters};"
                " make ids and pixels in one call of the processor"
            )
        return layout

    # ------------------------------------------------------------------------------------------- whole prompts, by hand

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return positions, and the token type of image tokens (1), which see all of their raster."""
        types = (ids == model.config.image_token_id).long()
        return {**super().prompt_inputs(model, ids, mask, pictures), "token_type_ids": types}

    # ---------------------------------------------------------------------------------------------------- the pictures

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide the projector's ``[rasters, N, D]`` into the features of every picture, ``[rasters * N, D]``."""
        return [part.flatten(0, 1) for part in torch.split(output, _rasters(layout))]

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put the features of all pictures back into the projector's form."""
        return torch.cat(list(features)).view_as(output)

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the rasters of every picture, ``[rasters, C, H, W]``."""
        pixels = super().images(inputs, layout)
        return list(torch.split(torch.stack(pixels), _rasters(layout))) if pixels else []

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other rasters in place of every picture's."""
        return {**inputs, "pixel_values": torch.cat(list(images))} if images else dict(inputs)

    def without_images(self, model: PreTrainedModel, row: Tensor, processor: ProcessorMixin | None) -> Tensor:
        """Return the prompt without its pictures.

        Raises
        ------
        UnsupportedModel
            If it holds crops: the words around them would stay.
        """
        if any(self._crops(row, runs(row == model.config.image_token_id), processor)):
            raise UnsupportedModel(
                f"{self.family}: a picture with crops cannot be left out of a prompt, the words around them would stay;"
                " leave do_pan_and_scan off"
            )
        return super().without_images(model, row, processor)


def _rasters(layout: TokenLayout) -> list[int]:
    """Return of how many rasters each picture of the batch consists."""
    counts: dict[int, int] = {}
    for spans in layout.images:  # a row may be repeated: each one that holds a picture holds all of it
        counts |= {span.image: sum(other.image == span.image for other in spans) for span in spans}
    return [counts[image] for image in sorted(counts)]
