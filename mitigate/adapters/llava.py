"""LLaVA-1.5: one square raster of CLIP patches per image, in place of its placeholder tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.core.layout import ImageSpan
from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

    family = "llava"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def image_spans(self, model: PreTrainedModel, row: Tensor, inputs: Mapping[str, Any]) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``(image_size / patch_size)²`` patches.

        With ``vision_feature_select_strategy="full"`` the tower's class token leads every image and is no patch.
        """
        vision = model.config.vision_config
        side, rest = divmod(vision.image_size, vision.patch_size)
        if rest:
            raise UnsupportedModel(f"llava: image size {vision.image_size} is no multiple of patch {vision.patch_size}")
        extra = 0 if model.config.vision_feature_select_strategy == "default" else 1
        size = side * side + extra
        return [
            ImageSpan(index, torch.arange(start + extra, stop, device=row.device), (side, side), stop)
            for index, (start, stop) in enumerate(equal_spans(row, model.config.image_token_id, size, self.family))
        ]
