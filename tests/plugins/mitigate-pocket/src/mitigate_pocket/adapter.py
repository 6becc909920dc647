"""Where pictures stand in a prompt of Pocket-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from mitigate.adapters.base import Adapter, equal_spans
from mitigate.core.layout import ImageSpan

# importing these registers configuration, model and processor with transformers
from mitigate_pocket import modeling, processing  # noqa: F401

if TYPE_CHECKING:
    from mitigate.adapters.spans import Batch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin


class PocketAdapter(Adapter):
    """``PocketForConditionalGeneration``."""

    family = "pocket_vl"
    api: ClassVar[int] = 1
    tiny: ClassVar[str | None] = "mitigate_pocket.tiny:build"
    spatial_grid = False  # queries see the whole picture: they have no rows and columns
    needs_processor = True  # only the tokenizer knows the ids of the two marks

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the module whose output ``[images, queries, D]`` the decoder reads."""
        return model.reader

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the ids of ``<Img>`` and ``</Img>``."""
        return frozenset(processor.tokenizer.convert_tokens_to_ids([processing.BEGIN, processing.END]))

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Return one span per picture, without a grid."""
        config = batch.model.config
        return [
            ImageSpan(batch.picture()[0], torch.arange(start, stop, device=row.device), None, stop)
            for start, stop in equal_spans(row, config.image_token_id, config.queries, self.family)
        ]
