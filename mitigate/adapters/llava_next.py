"""LLaVA-NeXT: every picture twice, once small and once cut into tiles whose patches are joined into one raster."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mitigate.adapters.base import Adapter, runs
from mitigate.adapters.spans import Batch
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Towers whose patches form a raster -> how the model must select them, so that no class token is among them.
_SELECTED = {"clip_vision_model": "default", "siglip_vision_model": "full"}


class LlavaNextAdapter(Adapter):
    """``LlavaNextForConditionalGeneration`` with a CLIP or SigLIP tower.

    A picture has two spans with the same ``image``. First the whole picture brought to the tower's size, with
    ``thumbnail=True``. Then one span for the tiled picture: the patches of all its tiles as a single raster with its
    true rows and columns (``tiles`` says of how many), after the model has cut away what shows only the padding around
    the picture. A placeholder for a line break follows each of its rows; it is an image token, but no patch.

    At the projector the features of a picture are those of its tiles before they are joined: the small picture, then
    the tiles row by row, the patches of each in raster order, padding included and without line breaks. Its pixels
    are its tiles in the same order, ``[tiles, C, H, W]``.
    """

    family = "llava_next"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_llava_next:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower."""
        return cast("Sequence[nn.Module]", model.model.vision_tower.encoder.layers)

    # ----------------------------------------------------------------------------------------------------- the layout

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return the ``(height, width)`` of every picture before it was processed, and the frames of every video."""
        sizes, videos = inputs.get("image_sizes"), inputs.get("pixel_values_videos")
        heights_and_widths = None if sizes is None else torch.as_tensor(sizes).tolist()
        return heights_and_widths, None if videos is None else [len(video) for video in videos]

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into pictures, whose numbers of tokens follow from their sizes.

        Raises
        ------
        LayoutError
            If the sizes are not known or do not fit the tokens.
        UnsupportedModel
            If the tower's tokens are no raster of patches.
        """
        spans: list[ImageSpan] = []
        for token, read in self._readers(batch.model.config).items():
            for start, stop in runs(row == token):
                while start < stop:
                    found = read(batch, start)
                    length = found[-1].stop - start
                    if length > stop - start:
                        raise LayoutError(
                            f"{self.family}: a picture or video takes {length} tokens, but {stop - start} are there;"
                            " was the prompt made by this model's processor?"
                        )
                    spans, start = spans + found, start + length
        spans.sort(key=lambda span: span.stop)
        return [dataclasses.replace(span, positions=span.positions.to(row.device)) for span in spans]

    def _readers(self, config: Any) -> dict[int, Callable[[Batch, int], list[ImageSpan]]]:
        """Return for each placeholder what reads the spans of the next picture or video off the facts."""
        return {config.image_token_id: self._picture}

    def _picture(self, batch: Batch, start: int) -> list[ImageSpan]:
        index, size = batch.picture()
        if size is None:
            raise LayoutError(f"{self.family}: image_sizes is missing; it says how many tokens a picture takes")
        return self._small_and_tiled(batch.model.config, index, size, start)

    def _small_and_tiled(self, config: Any, index: int, size: Sequence[int], start: int) -> list[ImageSpan]:
        side = self._side(config)
        small = raster(index, start, (side, side), thumbnail=True)
        tiles = _tiles(size, config)
        rows, columns = self._joined(config, side, unpadded(size, (tiles[0] * side, tiles[1] * side)))
        if not rows * columns:
            raise LayoutError(f"{self.family}: of a picture of {size[0]} x {size[1]} pixels only padding would be left")
        return [small, raster(index, small.stop, (rows, columns), breaks=True, tiles=tiles)]

    def _frames(self, batch: Batch, start: int, side: int) -> list[ImageSpan]:
        index, frames = batch.video()
        if frames is None:
            raise LayoutError(f"{self.family}: pixel_values_videos is missing; it says how many frames a video has")
        return [raster(index, start + step * side**2, (side, side), frame=step) for step in range(frames)]

    def _joined(self, config: Any, side: int, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns the model keeps of the joined tiles; a tile has ``side`` of them."""
        return grid

    def _side(self, config: Any) -> int:
        """Return how many patches a tile is wide and high."""
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
        if vision.model_type not in _SELECTED:
            raise UnsupportedModel(f"{self.family}: the image layout of a {vision.model_type!r} tower is not known")
        if strategy != _SELECTED[vision.model_type]:
            raise UnsupportedModel(
                f"{self.family}: with vision_feature_select_strategy={strategy!r} the tokens of a"
                f" {vision.model_type!r} tower are no raster of patches"
            )
        return int(vision.image_size // vision.patch_size)

    # ---------------------------------------------------------------------------------------------------- the pictures

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide the projector's ``[tiles, N, D]`` into the features of every picture, ``[tiles * N, D]`` each.

        Raises
        ------
        UnsupportedModel
            If a batch has pictures and videos: the projector sees them apart.
        """
        pictures, videos = parts(layout)
        if pictures and videos:
            raise UnsupportedModel(f"{self.family}: visual_embeddings of pictures and videos in one batch; split it")
        return [part.flatten(0, 1) for part in torch.split(output, pictures or videos)]

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put the features of all pictures back into the projector's form."""
        return torch.cat(list(features)).view_as(output)

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the tiles of every picture, without those that fill up the batch, then the frames of every video."""
        pictures, videos = parts(layout)
        found: list[Tensor] = []
        if pictures:
            tiled = super().images(inputs, layout)
            found += [tiles[:count] for tiles, count in zip(tiled, pictures, strict=True)]
        if videos:
            found += super().images({**inputs, "pixel_values": inputs.get("pixel_values_videos")}, layout)
        return found

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other tiles and frames; pictures of fewer tiles are filled up."""
        count = len(parts(layout)[0])
        kinds = {"pixel_values": images[:count], "pixel_values_videos": images[count:]}
        return {**inputs, **{name: pad_sequence(list(some), batch_first=True) for name, some in kinds.items() if some}}

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return pixels and sizes of a batch of the given pictures and videos, in this order, repeated or not."""
        images, count = self.images(inputs, layout), len(parts(layout)[0])
        pictures = [index for index in wanted if index < count]
        videos = [index for index in wanted if index >= count]
        chosen: dict[str, Any] = {}
        if pictures:
            chosen["pixel_values"] = pad_sequence([images[index] for index in pictures], batch_first=True)
            chosen["image_sizes"] = torch.as_tensor(inputs["image_sizes"])[pictures]
        if videos:
            chosen["pixel_values_videos"] = torch.stack([images[index] for index in videos])
        return chosen


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """``LlavaNextVideoForConditionalGeneration``: LLaVA-NeXT's pictures, and videos of one pooled raster per frame.

    At the projector the features of a video are those of its pooled frames.
    """

    family = "llava_next_video"
    tiny: ClassVar[str | None] = None

    def _readers(self, config: Any) -> dict[int, Callable[[Batch, int], list[ImageSpan]]]:
        return {**super()._readers(config), config.video_token_id: self._video}

    def _video(self, batch: Batch, start: int) -> list[ImageSpan]:
        config = batch.model.config
        return self._frames(batch, start, self._side(config) // config.spatial_pool_stride)


def raster(
    image: int,
    start: int,
    grid: tuple[int, int],
    *,
    breaks: bool = False,
    thumbnail: bool = False,
    frame: int | None = None,
    tiles: tuple[int, int] | None = None,
) -> ImageSpan:
    """Return the span of a raster whose first token is at ``start``; ``breaks``: a line break ends each of its rows."""
    rows, columns = grid
    width = columns + breaks
    positions = start + torch.arange(rows * width).view(rows, width)[:, :columns].flatten()
    return ImageSpan(image, positions, grid, start + rows * width, thumbnail=thumbnail, frame=frame, tiles=tiles)


def unpadded(size: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a raster that show a picture of this height and width, not the padding around it.

    The picture fills the raster in one direction; in the other one the same number of rows (or columns) is cut away on
    both sides. Rounding is that of the model, to the seventh digit and then down.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return rows - (rows - shown) // 2 * 2, columns
    shown = int(round(width * (rows / height), 7))
    return rows, columns - (columns - shown) // 2 * 2


def parts(layout: TokenLayout) -> tuple[list[int], list[int]]:
    """Return of how many tiles the vision tower sees every picture, and of how many frames every video."""
    counts: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for spans in layout.images:
        for image, group in groupby(spans, key=lambda span: span.image):
            own = list(group)
            seen = sum(math.prod(span.tiles or (1, 1)) for span in own)
            counts[own[0].frame is not None][image] = seen
    pictures, videos = ([seen for _, seen in sorted(count.items())] for count in counts)
    return pictures, videos


def _tiles(size: Sequence[int], config: Any) -> tuple[int, int]:
    """Return the rows and columns of tiles a picture is cut into: those of the resolution that fits it best."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    side = config.vision_config.image_size
    return height // side, width // side
