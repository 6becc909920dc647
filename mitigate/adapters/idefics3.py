"""Idefics3 and SmolVLM: a picture in rows of tiles with its small version last, each named in the text before it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, runs
from mitigate.adapters.spans import Batch
from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# what the processors write, without white space: tokenizers differ in how they give it back
_WHOLE = "<global-img>"
_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")
_FRAME = re.compile(r"Framefrom\d\d+:\d\d:")
_FIRST_FRAME = re.compile(rf"Youareprovidedthefollowingseriesof.+framesfroma.+video\.{_FRAME.pattern}$")
_BARELY = 1e-4


@dataclass(frozen=True)
class _Raster:
    """One run of placeholders: columns ``start..stop-1``, opened by a mark in column ``opens``.

    ``tile`` is ``None`` for a whole picture; ``lead`` is the text since the raster before, without white space.
    """

    opens: int
    start: int
    stop: int
    tile: tuple[int, int] | None
    lead: str


class Idefics3Adapter(Adapter):
    """``Idefics3ForConditionalGeneration``, the first SmolVLM among them.

    A picture that is cut comes as ``<row_i_col_j>`` tiles, row by row, and ends with all of it as ``<global-img>``; one
    that is not cut is ``<global-img>`` alone. So every whole picture ends one picture of the prompt. Some tokenizers
    know these names as tokens, others spell them, so they are read as text.
    """

    family = "idefics3"
    needs_processor = True
    nested_images = True
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_idefics3:build"

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the connector: it merges neighbouring patches and projects them."""
        return cast(nn.Module, model.model.connector)

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide ``[tiles of all pictures, N, D]`` into the tiles of every picture, one after another.

        Raises
        ------
        UnsupportedModel
            If a video precedes a picture: then pictures are not numbered in the order of their features.
        """
        counts = _counts(layout)
        if list(counts) != sorted(counts):
            raise UnsupportedModel(f"{self.family}: features are not served where a video precedes a picture")
        return [tiles.flatten(0, 1) for tiles in torch.split(output, list(counts.values()))]

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put the pictures' features one after another again."""
        return torch.cat(list(features)).view_as(output)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the SigLIP tower; they see all tiles as one batch."""
        return cast("Sequence[nn.Module]", model.model.vision_model.encoder.layers)

    # ----------------------------------------------------------------------------------------------------- the layout

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the mark around pictures and the names of tiles, as far as the tokenizer knows them as tokens."""
        if processor is None:
            return frozenset()
        known = processor.tokenizer.get_added_vocab()
        names = {processor.fake_image_token, _WHOLE}
        return frozenset(token for name, token in known.items() if name in names or _TILE.fullmatch(name))

    def picture_facts(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[None, None]:
        """Say nothing: the processor delivers tiles, and does not tell which are of one picture."""
        return None, None

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Read tiles, whole pictures and frames off the names before each run of placeholders.

        A video is a series of whole pictures that the processor introduces by its own sentences.
        """
        spans: list[ImageSpan] = []
        video, frame = -1, -1
        for parts in _pictures(row, batch.model, batch.processor):
            lead = parts[0].lead
            if _FIRST_FRAME.search(lead):
                video, frame = batch.video()[0], 0
            elif frame >= 0 and _FRAME.fullmatch(lead):
                frame += 1
            else:
                frame = -1
            index = batch.picture()[0] if frame < 0 else video
            for part in parts:
                side = math.isqrt(part.stop - part.start)
                if side * side != part.stop - part.start:
                    raise LayoutError(
                        f"{part.stop - part.start} image tokens in a row are no square, as every tile of {self.family}"
                        " is; was the prompt made by this model's processor?"
                    )
                spans.append(
                    ImageSpan(
                        index,
                        torch.arange(part.start, part.stop, device=row.device),
                        (side, side),
                        part.stop,
                        tile=part.tile,
                        thumbnail=part.tile is None and len(parts) > 1,
                        frame=None if frame < 0 else frame,
                    )
                )
        return spans

    def completed(self, layout: TokenLayout, ids: Tensor, batch: Batch) -> TokenLayout:
        """Make a tile's name a separator also where it is spelled in several tokens."""
        if batch.inputs.get("pixel_values") is not None:
            _places(batch.inputs, layout)  # refuses tiles that the prompts have no tokens for
        roles = layout.prompt_roles.clone()
        for row, marked in zip(ids, roles, strict=True):
            for part in itertools.chain.from_iterable(_pictures(row, batch.model, batch.processor)):
                marked[part.opens : part.start] = int(Role.SEPARATOR)
        return dataclasses.replace(layout, prompt_roles=roles)

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the tiles ``[n, C, H, W]`` of every picture, the whole picture last."""
        if inputs.get("pixel_values") is None:
            return super().images(inputs, layout)
        pixels = inputs["pixel_values"].flatten(0, 1)
        return [pixels[places] for places in _places(inputs, layout)]

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other tiles in the same places."""
        if not images:
            return dict(inputs)
        pixels = inputs["pixel_values"]
        flat = pixels.flatten(0, 1).clone()
        for places, image in zip(_places(inputs, layout), images, strict=True):
            flat[places] = _visible(image).to(flat)
        return {**inputs, "pixel_values": flat.view_as(pixels)}

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return the tiles of these pictures as those of one prompt: the model flattens prompts and tiles anyway."""
        if not wanted or not self.images(inputs, layout):
            return {}
        places = _places(inputs, layout)
        chosen = torch.cat([places[image] for image in wanted])
        names = [name for name in ("pixel_values", "pixel_attention_mask") if inputs.get(name) is not None]
        return {name: inputs[name].flatten(0, 1)[chosen][None] for name in names}

    def without_images(self, model: PreTrainedModel, row: Tensor, processor: ProcessorMixin | None) -> Tensor:
        """Return the token ids of a prompt without its pictures, their marks and names, and the times of frames."""
        kept = torch.ones_like(row, dtype=torch.bool)
        for parts in _pictures(row, model, processor):
            begin, end = parts[0].opens, parts[-1].stop + 1  # the mark that closes a picture
            if _FRAME.search(parts[0].lead):
                begin = _before_time(row, begin, processor)
            kept[begin:end] = False
        return row[kept]


class SmolVLMAdapter(Idefics3Adapter):
    """``SmolVLMForConditionalGeneration``: SmolVLM2, which also sees videos, frame by frame."""

    family = "smolvlm"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_idefics3:build_smolvlm"


# --------------------------------------------------------------------------------------------------- reading a prompt


def _pictures(row: Tensor, model: PreTrainedModel, processor: Any) -> Iterator[list[_Raster]]:
    """Yield the rasters of every picture of a row of token ids, tiles first.

    Raises
    ------
    LayoutError
        If tiles are missing, or placeholders have no name before them.
    """
    parts: list[_Raster] = []
    for raster in _rasters(row, model, processor):
        parts.append(raster)
        if raster.tile is None:
            tiles = [part.tile for part in parts[:-1] if part.tile is not None]
            rows, columns = tiles[-1] if tiles else (-1, -1)
            if tiles != list(itertools.product(range(rows + 1), range(columns + 1))):
                raise LayoutError(f"a picture lacks some of its {rows + 1} x {columns + 1} tiles; is the prompt cut?")
            yield parts
            parts = []
    if parts:
        raise LayoutError("the tiles of a picture are not followed by the whole of it; is the prompt cut?")


def _rasters(row: Tensor, model: PreTrainedModel, processor: Any) -> Iterator[_Raster]:
    mark = processor.tokenizer.convert_tokens_to_ids(processor.fake_image_token)
    seen = 0
    for start, stop in runs(row == model.config.image_token_id):
        opens = seen + int((row[seen:start] == mark).nonzero().flatten().amax()) if mark in row[seen:start] else start
        name = _text(row[opens + 1 : start], processor)
        tile = _TILE.fullmatch(name)
        if tile is None and name != _WHOLE:
            raise LayoutError(
                f"image tokens follow {name[-40:]!r}, not the name of a picture or of a tile;"
                " was the prompt made by this model's processor?"
            )
        lead = _text(row[seen:opens], processor).removeprefix(processor.fake_image_token)
        yield _Raster(opens, start, stop, None if tile is None else (int(tile[1]) - 1, int(tile[2]) - 1), lead)
        seen = stop


def _text(ids: Tensor, processor: Any) -> str:
    """Return what tokens spell, without white space."""
    return "".join(processor.tokenizer.decode(ids.tolist()).split())


def _before_time(row: Tensor, column: int, processor: Any) -> int:
    """Return the column where the text begins that tells the time of a frame and ends before ``column``."""
    start = column
    while not _FRAME.fullmatch(_text(row[start:column], processor)):
        start -= 1
    return start


# --------------------------------------------------------------------------------------------------- tiles of pictures


def _counts(layout: TokenLayout) -> dict[int, int]:
    """Count the rasters of every picture, in reading order; rows may be repeated."""
    counts: dict[int, int] = {}
    for spans in layout.images:
        fresh = [span.image for span in spans if span.image not in counts]
        counts |= {image: fresh.count(image) for image in dict.fromkeys(fresh)}
    return counts


def _places(inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
    """Return where the tiles of every picture are among all tiles of the batch.

    Prompts with fewer tiles are filled up with zeros, and like the model this takes zeros for nothing else.
    """
    pixels, counts = inputs["pixel_values"], _counts(layout)
    places = (pixels.flatten(0, 1) != 0).flatten(1).any(1).nonzero().flatten()
    if len(places) != sum(counts.values()):
        raise LayoutError(
            f"the inputs bring {len(places)} tiles, but the prompts hold the tokens of {sum(counts.values())};"
            " make ids and pixels in one call of the processor"
        )
    by_image = dict(zip(counts, torch.split(places, list(counts.values())), strict=True))
    return [by_image[image] for image in sorted(by_image)]


def _visible(tiles: Tensor) -> Tensor:
    """Keep tiles that a method made all zero (the mean colour) from being taken for padding."""
    blank = ~(tiles != 0).flatten(1).any(1)
    return (
        torch.where(blank[:, None, None, None], torch.full_like(tiles, _BARELY), tiles) if bool(blank.any()) else tiles
    )
