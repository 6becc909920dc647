"""From token ids to roles: what is the same for every family once its adapter has found the images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mitigate.core.layout import ImageSpan, Role, TokenLayout
from mitigate.errors import LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.base import Adapter

#: How the inputs begin by which pictures reach transformers' models: as pixels, encoded, or in a cache already.
_PIXELS = "pixel_values"
_PICTURES = (_PIXELS, "mm_encoder_outputs", "image_hidden_states", "inputs_embeds", "past_key_values")


class Batch:
    """What a layout is made from, read picture by picture from the first row to the last.

    Parameters
    ----------
    model
        The whole vision-language model.
    processor
        Its processor, or ``None``.
    inputs
        The inputs of the forward besides ids and mask.
    pictures, videos
        What the processor said of each; ``None`` if not even their number is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | None,
        inputs: Mapping[str, Any],
        pictures: Sequence[Any] | None,
        videos: Sequence[Any] | None,
    ) -> None:
        self.model, self.processor, self.inputs = model, processor, inputs
        self._facts: dict[str, Sequence[Any] | None] = {"picture": pictures, "video": videos}
        self._taken = {"picture": 0, "video": 0}

    def picture(self) -> tuple[int, Any]:
        """Return the number of the next picture of the batch and what is known of it.

        Raises
        ------
        LayoutError
            If the processor delivered fewer pictures.
        """
        return self._next("picture")

    def video(self) -> tuple[int, Any]:
        """Return the number of the next video of the batch and what is known of it; raises as `picture`."""
        return self._next("video")

    @property
    def pictures(self) -> int:
        """How many pictures have been read."""
        return self._taken["picture"]

    def check_all_taken(self) -> None:
        """Raise `LayoutError` if pictures or videos came for which the prompts have no tokens."""
        for kind, facts in self._facts.items():
            if facts is not None and len(facts) != self._taken[kind]:
                raise LayoutError(
                    f"the inputs bring {len(facts)} {kind}s, but the prompts hold the tokens of {self._taken[kind]};"
                    " make ids and pixels in one call of the processor"
                )

    def _next(self, kind: str) -> tuple[int, Any]:
        index, facts = self._taken[kind], self._facts[kind]
        if facts is not None and index >= len(facts):
            raise LayoutError(
                f"the prompts hold the tokens of more {kind}s than the {len(facts)} the inputs bring;"
                " make ids and pixels in one call of the processor"
            )
        self._taken[kind] = index + 1
        return index, None if facts is None else facts[index]


def derive_layout(adapter: Adapter, batch: Batch, ids: Tensor, mask: Tensor | None) -> TokenLayout:
    """Give every position of a batch of prompts its role; arguments and errors as for `Adapter.layout`."""
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise LayoutError(f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(ids.shape)} (batch, prompt)")
    if not bool(mask[:, -1].all()):
        raise LayoutError("prompts are padded on the right; set processor.tokenizer.padding_side = 'left'")
    marks = sorted(adapter.separators(batch.model, batch.processor))
    separators = torch.isin(ids, torch.tensor(marks, device=ids.device, dtype=ids.dtype)) & mask.bool()
    tokens = torch.tensor(adapter.image_tokens(batch.model.config), device=ids.device, dtype=ids.dtype)
    placeholders = torch.isin(ids, tokens)
    roles = torch.where(mask.bool(), int(Role.PROMPT), int(Role.PAD)).to(torch.int8)
    columns = torch.arange(ids.shape[1], device=ids.device)
    rows: list[tuple[ImageSpan, ...]] = []
    for index, row in enumerate(ids):
        spans = [_framed(span, separators[index]) for span in adapter.image_spans(row, batch)]
        if bool(placeholders[index].any()):
            if not spans:
                raise LayoutError(f"{adapter.family}: a prompt holds image tokens that belong to no picture")
            before = columns < int(placeholders[index].int().argmax())
            roles[index, before & mask[index].bool()] = int(Role.SYSTEM)
            inside = _inside(spans, placeholders[index], columns) | separators[index]
            roles[index, inside & ~placeholders[index]] = int(Role.SEPARATOR)
        rows.append(tuple(spans))
    batch.check_all_taken()
    roles[placeholders] = int(Role.IMAGE)
    after = batch.pictures  # videos are counted after the pictures
    numbered = (
        tuple(dataclasses.replace(span, image=span.image + after) if span.frame is not None else span for span in spans)
        for spans in rows
    )
    return adapter.completed(TokenLayout(roles, tuple(numbered), ids.shape[1]), ids, batch)


def check_pictures(inputs: Mapping[str, Any], layout: TokenLayout, *, encodes: bool) -> None:
    """Refuse a request whose pictures do not come, or come encoded where a method acts on them before that.

    Raises
    ------
    LayoutError
        If there are image tokens, but nothing that puts pictures in their place.
    UnsupportedModel
        If ``encodes`` and the pictures are no pixels any more.
    """
    given = [name for name, value in inputs.items() if value is not None]
    if not bool(layout.image_mask.any()):
        return
    if not any(name.startswith(_PICTURES) for name in given):
        raise LayoutError(
            "the prompts hold image tokens, but the inputs bring no picture, so that the model would read words there;"
            " pass on all that the processor returns"
        )
    if encodes and not any(name.startswith(_PIXELS) for name in given):
        raise UnsupportedModel("the images came encoded; give pixel_values, which the stack needs")


def _framed(span: ImageSpan, separators: Tensor) -> ImageSpan:
    """Let a span end after the separators that directly follow it."""
    stop = span.stop
    while stop < len(separators) and bool(separators[stop]):
        stop += 1
    return span if stop == span.stop else dataclasses.replace(span, stop=stop)


def _inside(spans: Sequence[ImageSpan], placeholders: Tensor, columns: Tensor) -> Tensor:
    """Columns between the first and the last placeholder of one picture or video, ``[P]``."""
    inside = torch.zeros_like(placeholders)
    for key in {(span.image, span.frame is not None) for span in spans}:
        parts = [span for span in spans if (span.image, span.frame is not None) == key]
        first = min(int(span.positions.min()) for span in parts)
        inside |= (columns >= first) & (columns < max(span.stop for span in parts))
    return inside
