"""Video-LLaVA: LLaVA's rasters for pictures, and one raster led by its class token for each frame of a video."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, equal_spans, runs
from mitigate.core.facts import ModelFacts
from mitigate.core.layout import ImageSpan
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mitigate.adapters.spans import Batch
    from mitigate.core.layout import TokenLayout

_VIDEOS = "pixel_values_videos"
_OLD_NAME = "pixel_values_images"


class VideoLlavaAdapter(Adapter):
    """``VideoLlavaForConditionalGeneration``: a CLIP tower for pictures and one for videos, one projector for both.

    Pictures and videos have placeholders of their own. A picture's tokens follow ``vision_feature_select_strategy`` as
    in LLaVA; a video keeps the class token of every frame, which is an image token but no patch. The videos of a batch
    have the same number of frames, as many as the processor was given.

    The blocks of both towers count as one sequence (point ``vision``): those for pictures, then those for videos. At
    the projector a video has the features of its frames one after the other, ``[frames * (1 + N), D]``, class tokens
    included; its pixels are ``[frames, C, H, W]``.
    """

    family = "video_llava"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_video_llava:build"
    processor_options: ClassVar[Mapping[str, Any]] = {"return_legacy_image_output": False}

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the multimodal projector, which is called once for pictures and once for videos."""
        return cast(nn.Module, model.model.multi_modal_projector)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the tower for pictures and those of the tower for videos."""
        return [*model.model.image_tower.encoder.layers, *model.model.video_tower.encoder.layers]

    def facts_of_config(self, config: Any) -> ModelFacts:
        """Read the geometry off a configuration; it describes both towers at once."""
        facts = super().facts_of_config(config)
        return dataclasses.replace(facts, vision_layers=2 * config.vision_config.num_hidden_layers)

    # ----------------------------------------------------------------------------------------------------- the layout

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return the number of pictures, and of frames of every video."""
        pictures, videos = inputs.get(_picture_name(inputs)), inputs.get(_VIDEOS)
        return (
            None if pictures is None else [None] * len(pictures),
            None if videos is None else [len(frames) for frames in videos],
        )

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Cut the image tokens into rasters of ``(image_size / patch_size)²`` patches, those of videos into frames.

        Raises
        ------
        LayoutError
            If it is not known of how many frames a video is.
        """
        config = batch.model.config
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":  # the class token decides which tokens are patches
            raise UnsupportedModel(f"{self.family}: the image layout of a {vision.model_type!r} tower is not known")
        side = vision.image_size // vision.patch_size
        size, extra = side * side, int(config.vision_feature_select_strategy == "full")

        def span(image: int, stop: int, frame: int | None = None) -> ImageSpan:
            positions = torch.arange(stop - size, stop, device=row.device)
            return ImageSpan(image, positions, (side, side), stop, frame=frame)

        spans = [
            span(batch.picture()[0], stop)
            for _, stop in equal_spans(row, config.image_token_id, size + extra, self.family)
        ]
        for start, stop in runs(row == config.video_token_id):
            while start < stop:
                index, frames = batch.video()
                if frames is None:
                    raise LayoutError(f"{self.family}: {_VIDEOS} is missing; it says of how many frames a video is")
                length = frames * (size + 1)
                if length > stop - start:
                    raise LayoutError(
                        f"{stop - start} video tokens in a row, but {self.family} makes {length} of {frames} frames;"
                        " was the prompt made by this model's processor?"
                    )
                ends = range(start + size + 1, start + length + 1, size + 1)
                spans += [span(index, end, frame) for frame, end in enumerate(ends)]
                start += length
        return sorted(spans, key=lambda span: span.stop)

    # ---------------------------------------------------------------------------------------------------- the pictures

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide the projector's output into the features of every picture or video.

        Raises
        ------
        UnsupportedModel
            If a batch has pictures and videos: the projector sees them apart.
        """
        frames = {span.image: 0 for row in layout.images for span in row}
        for span in (span for row in layout.images for span in row):
            frames[span.image] = max(frames[span.image], 0 if span.frame is None else span.frame + 1)
        if len({count > 0 for count in frames.values()}) > 1:
            raise UnsupportedModel(f"{self.family}: visual_embeddings of pictures and videos in one batch; split it")
        return [part.flatten(0, 1) for part in torch.split(output, [frames[image] or 1 for image in sorted(frames)])]

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put the features of all pictures or videos back into the projector's form."""
        return torch.cat(list(features)).view_as(output)

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the pixels of every picture, ``[C, H, W]``, then the frames of every video, ``[frames, C, H, W]``."""
        kinds = [inputs.get(_picture_name(inputs)), inputs.get(_VIDEOS)]
        return [pixels for kind in kinds if kind is not None for pixels in kind] or super().images(inputs, layout)

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other pixels in place of every picture's and video's."""
        pictures = [pixels for pixels in images if pixels.dim() == 3]
        videos = [pixels for pixels in images if pixels.dim() == 4]
        kinds = {_picture_name(inputs): pictures, _VIDEOS: videos}
        return {**inputs, **{name: torch.stack(some) for name, some in kinds.items() if some}}


def _picture_name(inputs: Mapping[str, Any]) -> str:
    """Return under which name the pictures came: the processor has an old and a new one."""
    return _OLD_NAME if _OLD_NAME in inputs else "pixel_values"
