"""InternVL: every picture becomes tiles of equal size, and a thumbnail of the whole when there are several.

A tile is a span of its own, its raster in reading order. Which row and column of the picture it is depends on the
picture's size, and the processor keeps that to itself: ``InternVLAdapter.inputs`` adds it as ``image_sizes``, which the
model takes. Where inputs come without it, ``ImageSpan.tile`` is ``None``: as many tiles can lie in one row or in one
column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from mitigate.adapters.base import Adapter, runs
from mitigate.adapters.placing import input_device
from mitigate.core.layout import ImageSpan
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch
    from mitigate.core.layout import TokenLayout


class InternVLAdapter(Adapter):
    """``InternVLForConditionalGeneration``: the checkpoints of InternVL2.5, 3 and 3.5 in transformers' own format."""

    family = "internvl"
    needs_processor = True
    layout_only = frozenset({"image_sizes"})  # the model takes them and makes nothing of them
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_internvl:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector, whose output is ``[tiles, N, D]``."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the tower; the class token comes first in what they put out."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layer)

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide ``[tiles, N, D]`` into pictures; one of ``t`` tiles has ``t * N`` features, the thumbnail's last.

        Raises
        ------
        UnsupportedModel
            If a video precedes a picture: then pictures are not numbered in the order of their features.
        """
        places = _tile_places(layout, len(output))
        if any(one.start > other.start for one, other in pairwise(places)):
            raise UnsupportedModel(f"{self.family}: features are not served where a video precedes a picture")
        return [output[place].flatten(0, 1) for place in places]

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put the features of all pictures back into tiles."""
        return torch.cat(list(features)).view_as(output)

    # ----------------------------------------------------------------------------------------------------- the layout

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the ids of ``<img>`` and ``</img>``."""
        return frozenset((cast(Any, processor).start_image_token_id, cast(Any, processor).end_image_token_id))

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return the height and width of every picture, where ``image_sizes`` tells them."""
        sizes = inputs.get("image_sizes")
        return None if sizes is None else [(int(height), int(width)) for height, width in sizes], None

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut what lies between ``<img>`` and ``</img>`` into tiles of ``(image_size / patch_size * ratio)²`` tokens.

        The frames of a video are pictures of one tile that the processor introduces as ``Frame1:``, ``Frame2:``, ...;
        pictures that a prompt introduces in the same way cannot be told from a video and are read as one.
        """
        side = _raster_side(batch)
        spans: list[ImageSpan] = []
        video, frame = -1, -1
        for start, stop, words in _pictures(row, batch):
            tiles, rest = divmod(stop - start, side * side)
            if rest or tiles == 2:  # a thumbnail goes with two tiles or more
                raise LayoutError(
                    f"{stop - start} image tokens between <img> and </img> are no tiles of {side * side};"
                    " was the prompt made by this model's processor?"
                )
            if tiles == 1 and frame >= 0 and words == f"Frame{frame + 2}:":
                frame += 1
            elif tiles == 1 and words.endswith("Frame1:"):
                (video, _), frame = batch.video(), 0
            else:
                frame = -1
            if frame >= 0:
                spans.append(ImageSpan(video, _columns(row, start, side), (side, side), stop, frame=frame))
            else:
                spans.extend(_tiles(row, batch, start, tiles, side))
        return spans

    def completed(self, layout: TokenLayout, ids: Tensor, batch: Batch) -> TokenLayout:
        """Compare the tiles of the prompts with the pixels."""
        if batch.inputs.get("pixel_values") is not None:
            _tile_places(layout, len(batch.inputs["pixel_values"]))
        return layout

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the pixels of every picture ``[tiles, 3, height, width]``, the thumbnail last; a video's are frames.

        Raises
        ------
        LayoutError
            If there are not as many tiles as the prompts have tokens for.
        UnsupportedModel
            If the pictures came encoded already.
        """
        tiles = super().images(inputs, layout)
        return [inputs["pixel_values"][place] for place in _tile_places(layout, len(tiles))] if tiles else []

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other pixels in place of every picture's."""
        if not images:
            return dict(inputs)
        places = _tile_places(layout, sum(len(image) for image in images))
        reading = sorted(range(len(images)), key=lambda image: places[image].start)
        return {**inputs, "pixel_values": torch.cat([images[image] for image in reading])}

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return the pixels and sizes of a batch whose pictures are the given ones."""
        if not wanted:
            return {}
        images = self.images(inputs, layout)
        chosen = {"pixel_values": torch.cat([images[index] for index in wanted])}
        sizes = inputs.get("image_sizes")
        if sizes is not None:
            chosen["image_sizes"] = torch.as_tensor(sizes)[[index for index in wanted if index < len(sizes)]]
        return chosen

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch, with the ``image_sizes`` that tell where tiles lie in their picture."""
        batch = super().inputs(model, processor, prompts, images)
        sizes = [(picture.height, picture.width) for pictures in images for picture in pictures]
        if sizes:
            batch["image_sizes"] = torch.tensor(sizes, device=input_device(model))
        return batch


def _raster_side(batch: Batch) -> int:
    """Return how many tokens a row of a tile has.

    Raises
    ------
    LayoutError
        If tiles are not square or the pixels have another size: the model takes every raster for a square one.
    """
    config = batch.model.config
    height, width = config.vision_config.image_size
    pixels = batch.inputs.get("pixel_values")
    if height != width or (pixels is not None and tuple(pixels.shape[-2:]) != (height, width)):
        given = "" if pixels is None else f", given {tuple(pixels.shape[-2:])}"
        raise LayoutError(f"internvl: tiles must be square and of the model's size {(height, width)}{given}")
    return int(height // config.vision_config.patch_size[0] * config.downsample_ratio)


def _pictures(row: Tensor, batch: Batch) -> Iterator[tuple[int, int, str]]:
    """Yield first and last column + 1 of every picture's tokens, and the text before it since the last, blanks removed.

    Raises
    ------
    LayoutError
        If a run of image tokens is not framed: it may hold several pictures.
    """
    processor: Any = batch.processor
    closed = 0
    for start, stop in runs(row == batch.model.config.image_token_id):
        opening = int(row[start - 1]) if start else None
        closing = int(row[stop]) if stop < len(row) else None
        if (opening, closing) != (processor.start_image_token_id, processor.end_image_token_id):
            raise LayoutError(
                "image tokens must lie between <img> and </img>; was the prompt made by this model's processor?"
            )
        yield start, stop, "".join(processor.tokenizer.decode(row[closed : start - 1]).split())
        closed = stop + 1


def _tiles(row: Tensor, batch: Batch, start: int, tiles: int, side: int) -> Iterator[ImageSpan]:
    """Yield the rasters of the next picture: its tiles row by row, then the thumbnail if there are several."""
    image, size = batch.picture()
    across = 0
    if size is not None and tiles > 1:
        # how many tiles the processor may cut decides nothing but their number, which is known
        tile_size = tuple(batch.model.config.vision_config.image_size)
        across = get_optimal_tiled_canvas(size, tile_size, tiles - 1, tiles - 1)[0]
    for number in range(tiles):
        columns = _columns(row, start + number * side * side, side)
        thumbnail = tiles > 1 and number == tiles - 1
        tile = divmod(number, across) if across and not thumbnail else None
        yield ImageSpan(image, columns, (side, side), int(columns[-1]) + 1, tile=tile, thumbnail=thumbnail)


def _columns(row: Tensor, first: int, side: int) -> Tensor:
    return torch.arange(first, first + side * side, device=row.device)


def _tile_places(layout: TokenLayout, tiles: int) -> list[slice]:
    """Say which of all tiles, which lie in reading order, belong to each picture.

    Raises
    ------
    LayoutError
        If there are not as many tiles as spans.
    """
    places: dict[int, slice] = {}
    count = 0
    for spans in layout.images:
        fresh = [span.image for span in spans if span.image not in places]  # beams show a picture in several rows
        for image in dict.fromkeys(fresh):
            places[image] = slice(count, count + fresh.count(image))
            count += fresh.count(image)
    if count != tiles:
        raise LayoutError(f"internvl: the prompts hold the tokens of {count} tiles, the inputs bring {tiles}")
    return [places[image] for image in sorted(places)]
