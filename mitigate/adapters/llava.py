"""LLaVA-1.5: one square raster of CLIP patches per image, in place of its placeholder tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.adapters.spans import Batch
from mitigate.core.layout import ImageSpan
from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration`` with a CLIP tower."""

    family = "llava"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_llava:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the CLIP tower."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layers)

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``(image_size / patch_size)²`` patches.

        With ``vision_feature_select_strategy="full"`` the tower's class token leads every image and is no patch.
        """
        config = batch.model.config
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":  # the class token decides which tokens are patches
            raise UnsupportedModel(f"llava: the image layout of a {vision.model_type!r} tower is not known")
        side = vision.image_size // vision.patch_size
        extra = 0 if config.vision_feature_select_strategy == "default" else 1
        size = side * side + extra
        return [
            ImageSpan(batch.picture()[0], torch.arange(start + extra, stop, device=row.device), (side, side), stop)
            for start, stop in equal_spans(row, config.image_token_id, size, self.family)
        ]
