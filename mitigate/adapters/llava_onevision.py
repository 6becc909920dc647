"""LLaVA-OneVision: LLaVA-NeXT's tiles for a picture alone, one raster for each of several, pooled frames for videos."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mitigate.adapters.llava_next import LlavaNextAdapter, raster
from mitigate.adapters.spans import Batch
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """``LlavaOnevisionForConditionalGeneration`` with a SigLIP tower.

    * A picture that is its prompt's only one has the two spans of LLaVA-NeXT, ``thumbnail`` and joined tiles. Where the
      joined raster is larger than ``vision_aspect_ratio`` allows (``anyres_max_9``: the patches of nine tiles), the
      model interpolates it to fewer rows and columns: ``grid`` has those, and a position is then no longer one patch.
    * A picture among several of its prompt is one raster without tiles, with one placeholder for a line break after it.
      Which it was, the processor says in ``batch_num_images``; without it every picture was alone.
    * A video has one span per frame, pooled to half the rows and columns; one line break ends the last frame.
    """

    family = "llava_onevision"
    nested_images = True
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_llava_onevision:build"

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return of every picture its ``(height, width)`` and whether it is alone, of every video its frames."""
        sizes, videos = super().picture_facts(model, inputs)
        return None if sizes is None else list(zip(sizes, _alone(inputs, len(sizes)), strict=True)), videos

    def _readers(self, config: Any) -> dict[int, Callable[[Batch, int], list[ImageSpan]]]:
        return {**super()._readers(config), config.video_token_id: self._video}

    def _picture(self, batch: Batch, start: int) -> list[ImageSpan]:
        index, fact = batch.picture()
        if fact is None:
            raise LayoutError(f"{self.family}: image_sizes is missing; it says how many tokens a picture takes")
        size, alone = fact
        if alone:
            return self._small_and_tiled(batch.model.config, index, size, start)
        side = self._side(batch.model.config)
        return [_ended(raster(index, start, (side, side)))]

    def _joined(self, config: Any, side: int, grid: tuple[int, int]) -> tuple[int, int]:
        limit = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
        if limit is None:
            raise UnsupportedModel(f"{self.family}: vision_aspect_ratio={config.vision_aspect_ratio!r} is not known")
        rows, columns = grid
        ratio = math.sqrt(rows * columns / (int(limit[1]) * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else grid

    def _video(self, batch: Batch, start: int) -> list[ImageSpan]:
        spans = self._frames(batch, start, math.ceil(self._side(batch.model.config) / 2))
        return [*spans[:-1], _ended(spans[-1])]

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return pixels, sizes and groups of a batch of the given pictures and videos, in this order.

        Raises
        ------
        UnsupportedModel
            If one picture of a prompt with several is wanted by itself: alone it would be encoded otherwise.
        """
        chosen = super().chosen_images(inputs, wanted, layout)
        if "pixel_values" in chosen and inputs.get("batch_num_images") is not None:
            alone = _alone(inputs, len(inputs["image_sizes"]))
            groups: list[int] = []
            for single, some in groupby(alone[index] for index in wanted if index < len(alone)):
                count = len(list(some))
                if not single and count == 1:
                    raise UnsupportedModel(f"{self.family}: one of several pictures of a prompt cannot go without them")
                groups += [1] * count if single else [count]
            chosen["batch_num_images"] = torch.tensor(groups)
        return chosen


def _alone(inputs: Mapping[str, Any], pictures: int) -> list[bool]:
    """Say of every picture whether it is the only one of its prompt."""
    groups = inputs.get("batch_num_images")
    if groups is None:
        return [True] * pictures
    alone = [count == 1 for count in torch.as_tensor(groups).tolist() for _ in range(count)]
    if len(alone) != pictures:
        raise LayoutError(f"batch_num_images counts {len(alone)} pictures, but there are sizes of {pictures}")
    return alone


def _ended(span: ImageSpan) -> ImageSpan:
    """Let a span end after the line break that follows it."""
    return dataclasses.replace(span, stop=span.stop + 1)
