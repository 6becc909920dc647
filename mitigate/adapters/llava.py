"""LLaVA-1.5 and ViP-LLaVA: one square raster of patches per image, in place of its placeholder tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans
from mitigate.adapters.spans import Batch
from mitigate.core.layout import ImageSpan
from mitigate.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration`` with a CLIP or SigLIP tower."""

    family = "llava"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_llava:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layers)

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``(image_size / patch_size)²`` patches.

        A class token that the model keeps leads every image and is no patch.
        """
        config = batch.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        extra = self._class_tokens(config)
        size = side * side + extra
        return [
            ImageSpan(batch.picture()[0], torch.arange(start + extra, stop, device=row.device), (side, side), stop)
            for start, stop in equal_spans(row, config.image_token_id, size, self.family)
        ]

    def _class_tokens(self, config: Any) -> int:
        """Return how many class tokens the model keeps: it drops the first token, or nothing."""
        tower, dropped = config.vision_config.model_type, self._drops_first(config)
        if tower == "clip_vision_model":
            return 0 if dropped else 1
        if tower != "siglip_vision_model":
            raise UnsupportedModel(f"{self.family}: the image layout of a {tower!r} tower is not known")
        if dropped:
            raise UnsupportedModel(
                f"{self.family}: a {tower!r} tower has no class token, so its first patch is dropped, and the rest are"
                " no raster; set vision_feature_select_strategy='full' in the model's and the processor's configuration"
            )
        return 0

    def _drops_first(self, config: Any) -> bool:
        return bool(config.vision_feature_select_strategy == "default")


class VipLlavaAdapter(LlavaAdapter):
    """``VipLlavaForConditionalGeneration``: LLaVA-1.5 whose projector reads several blocks of the tower."""

    family = "vipllava"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_vipllava:build"

    def _drops_first(self, config: Any) -> bool:
        return True
