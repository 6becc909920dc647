"""The Qwen-VL family (2, 2.5, 3): every picture in its own resolution, positions in time, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.base import Adapter, runs
from mitigate.core.layout import ImageSpan
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch
    from mitigate.core.layout import TokenLayout

#: Names of the pixels, their grids (time, rows, columns in patches), and what else there is one of for each.
_PICTURES = ("pixel_values", "image_grid_thw")
_VIDEOS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


class Qwen2VLAdapter(Adapter):
    """``Qwen2VLForConditionalGeneration``.

    The tower encodes the patches of all pictures of a batch as one sequence ``[patches, D_v]``, the four patches of a
    later token next to each other; that is what the point ``vision`` shows. Pictures and videos take separate passes.
    """

    family = "qwen2_vl"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_qwen_vl:build_qwen2"
    frames_apart: ClassVar[bool] = False
    """Whether text stands between the frames of a video."""

    # ------------------------------------------------------------------------------------------------------ the model

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the tower."""
        return cast("Sequence[nn.Module]", model.base_model.visual.blocks)

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the tower: only its own output is in raster order, its merger's may be in the order of windows."""
        return cast(nn.Module, model.base_model.visual)

    def features(self, output: Any, layout: TokenLayout) -> list[Tensor]:
        """Divide the merged features, which follow each other, by the number of tokens of each picture.

        Raises
        ------
        UnsupportedModel
            If there are videos too: they are encoded in a second pass, which cannot be told from the first.
        """
        spans = [span for row in layout.images for span in row]
        if len({span.frame is None for span in spans}) > 1:
            raise UnsupportedModel(f"{self.family}: visual_embeddings of pictures and videos in one batch; part them")
        sizes: dict[int, dict[int, int]] = {}
        for span in spans:  # a row may be repeated, then so are its spans
            sizes.setdefault(span.image, {})[span.frame or 0] = len(span.positions)
        return list(output.pooler_output.split([sum(sizes[image].values()) for image in sorted(sizes)]))

    def joined(self, features: Sequence[Tensor], output: Any) -> Any:
        """Return the tower's output with other merged features."""
        return type(output)(**{**output, "pooler_output": torch.cat(list(features))})

    # ----------------------------------------------------------------------------------------------------- the layout

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the tokens around a picture, a video, or a frame."""
        return frozenset({model.config.vision_start_token_id, model.config.vision_end_token_id})

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return the grids in patches."""
        pictures, videos = (inputs.get(names[1]) for names in (_PICTURES, _VIDEOS))
        return (None if pictures is None else pictures.tolist()), (None if videos is None else videos.tolist())

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Match runs of placeholders with grids; ``spatial_merge_size``² patches share a token."""
        config = batch.model.config
        pieces: list[tuple[tuple[int, int], tuple[int, int], int, int | None]] = []
        for run in runs(row == config.image_token_id):
            index, fact = batch.picture()
            _, grid = self._grid(config, fact, _PICTURES[1])
            pieces.append((run, grid, index, None))
        remaining = iter(runs(row == config.video_token_id))
        for start, stop in remaining:
            index, fact = batch.video()
            steps, grid = self._grid(config, fact, _VIDEOS[1])
            if self.frames_apart:
                frames = [(start, stop), *islice(remaining, steps - 1)]
            else:
                frames = list(pairwise([*range(start, stop, grid[0] * grid[1]), stop]))
            if len(frames) != steps:
                raise LayoutError(f"{self.family}: a video of {steps} steps, but tokens of {len(frames)} frames")
            pieces += [(run, grid, index, frame) for frame, run in enumerate(frames)]
        spans = []
        for (start, stop), grid, index, frame in sorted(pieces, key=lambda piece: piece[0]):
            if stop - start != grid[0] * grid[1]:
                raise LayoutError(
                    f"{stop - start} image tokens in a row, but {self.family} makes {grid[0]} x {grid[1]} of this"
                    " picture; was the prompt made by this model's processor?"
                )
            columns = torch.arange(start, stop, device=row.device)
            spans.append(ImageSpan(index, columns, grid, stop, frame=frame))
        return spans

    def _grid(self, config: Any, fact: Any, name: str) -> tuple[int, tuple[int, int]]:
        """Return the steps of a picture or video, and its rows and columns in tokens."""
        if fact is None:
            raise LayoutError(f"{self.family}: the prompt holds image tokens, but the inputs lack {name}")
        steps, rows, columns = fact
        merge = config.vision_config.spatial_merge_size
        return steps, (rows // merge, columns // merge)

    # ------------------------------------------------------------------------------------------- whole prompts, by hand

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return token types and positions ``[4, B, P]``: in the text, in time, row and column.

        They are those of the model's own ``generate``. A forward that is given positions neither reads nor writes
        the offsets the model keeps for its running request (``rope_deltas``).
        """
        text = (mask.long().cumsum(1) - 1).clamp_min(0)
        types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
        grids = {name: pictures[name] for name in (*_PICTURES[1:], *_VIDEOS[1:]) if pictures.get(name) is not None}
        places, _ = model.base_model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=mask, **grids)
        return {"position_ids": torch.cat([text[None], places]), "mm_token_type_ids": types}

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the flattened patches ``[n, values]`` of every picture, then of every video."""
        found: list[Tensor] = []
        for pixels, grids, *_ in (_PICTURES, _VIDEOS):
            if inputs.get(pixels) is not None:
                found += inputs[pixels].split(inputs[grids].prod(-1).tolist())
        return found or super().images(inputs, layout)

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other patches in place of every picture's and video's."""
        result, rest = dict(inputs), iter(images)
        for pixels, grids, *_ in (_PICTURES, _VIDEOS):
            if inputs.get(pixels) is not None:
                result[pixels] = torch.cat(list(islice(rest, len(inputs[grids]))))
        return result

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return patches and grids of the given pictures and videos; the videos, counted after the pictures, follow."""
        images, result, first = self.images(inputs, layout), {}, 0
        for pixels, *others in (_PICTURES, _VIDEOS):
            if inputs.get(pixels) is None:
                continue
            count = len(inputs[others[0]])
            mine = [index - first for index in wanted if first <= index < first + count]
            if mine:
                result[pixels] = torch.cat([images[first + index] for index in mine])
                for name in others:
                    if inputs.get(name) is not None:
                        result[name] = torch.as_tensor(inputs[name])[mine]
            first += count
        return result

    def without_images(self, model: PreTrainedModel, row: Tensor, processor: ProcessorMixin | None) -> Tensor:
        """Return the prompt without its pictures and videos.

        Raises
        ------
        UnsupportedModel
            If the frames of a video stand apart: their time stamps cannot be told from the user's words.
        """
        if self.frames_apart and bool((row == model.config.video_token_id).any()):
            raise UnsupportedModel(f"{self.family}: a video cannot be left out of a prompt, its time stamps would stay")
        return super().without_images(model, row, processor)


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """``Qwen2_5_VLForConditionalGeneration``: in its tower (point ``vision``) patches stand in the order of windows."""

    family = "qwen2_5_vl"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_qwen_vl:build_qwen2_5"


class Qwen3VLAdapter(Qwen2VLAdapter):
    """``Qwen3VLForConditionalGeneration``: earlier tower features are added after the first decoder layers.

    The block output of such a layer (``hidden_states``, ``logit_lens``) is what it is before that addition; an edit of
    it stays, and the next layer receives the edited output plus the features. ``visual_embeddings`` are the features at
    the decoder's entry; those added later are not among them.
    """

    family = "qwen3_vl"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_qwen_vl:build_qwen3"
    frames_apart: ClassVar[bool] = True


class Qwen3VLMoeAdapter(Qwen2VLAdapter):
    """``Qwen3VLMoeForConditionalGeneration``: as Qwen3-VL, with experts; ``mlp_output`` is their weighted sum."""

    family = "qwen3_vl_moe"
    tiny: ClassVar[str | None] = "mitigate.testing.tiny_qwen_vl:build_qwen3_moe"
    frames_apart: ClassVar[bool] = True
