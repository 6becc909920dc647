"""TokenLayout: the role of every position of every sample, so that no method needs a hard-coded index."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

from mitigate.core.roles import Role as Role


@dataclass(frozen=True)
class ImageSpan:
    """Where one raster of an image lies in the sequence: a picture, one of its tiles, or one frame of a video.

    Parameters
    ----------
    image
        Index of the image among all images of the batch, in the order the processor delivered them; videos are counted
        after the pictures.
    positions
        ``[N]`` columns of its patches in raster order; separator and class tokens are not among them.
    grid
        ``(rows, columns)`` with ``rows * columns == N``, or ``None`` when the tokens form no raster.
    stop
        Column after the image's last token and the separators that directly follow it, which between two adjacent
        pictures may open the next one.
    tile
        ``(row, column)`` of this tile in its picture's raster of tiles, where a picture is encoded in several; tiles
        of a picture share ``image``.
    thumbnail
        Whether this is the small version of the whole picture that accompanies its tiles.
    frame
        Which step of a video this is, from 0; ``None`` for pictures.
    tiles
        ``(rows, columns)`` of the tiles this raster was joined from, where the vision tower saw it in several.
    """

    image: int
    positions: Tensor
    grid: tuple[int, int] | None
    stop: int
    tile: tuple[int, int] | None = None
    thumbnail: bool = False
    frame: int | None = None
    tiles: tuple[int, int] | None = None


@dataclass(frozen=True)
class TokenLayout:
    """Roles of a batch of left-padded prompts and what is generated after them.

    Parameters
    ----------
    prompt_roles
        ``[B, P]`` int8 of `Role` values for the padded prompt.
    images
        Per row: its images from left to right.
    length
        Columns so far: P plus the generated ones.
    question
        ``[B, P]`` bool, the user's own words without the chat template around them; ``None`` when the processor is not
        known.
    """

    prompt_roles: Tensor
    images: tuple[tuple[ImageSpan, ...], ...]
    length: int
    question: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of request rows B."""
        return self.prompt_roles.shape[0]

    @property
    def prompt_length(self) -> int:
        """Columns P of the padded prompt; the first generated token has position P."""
        return self.prompt_roles.shape[1]

    @cached_property
    def roles(self) -> Tensor:
        """``[B, L]`` int8 roles, generated columns included."""
        fresh = self.length - self.prompt_length
        return torch.nn.functional.pad(self.prompt_roles, (0, fresh), value=int(Role.GENERATED))

    @cached_property
    def valid(self) -> Tensor:
        """``[B, L]`` False at padding."""
        return self.roles != Role.PAD

    @cached_property
    def image_mask(self) -> Tensor:
        """``[B, L]`` True at image tokens."""
        return self.roles == Role.IMAGE

    @cached_property
    def after_image(self) -> Tensor:
        """``[B]`` first column after the row's last image token; the first text column when it has no image."""
        first = (self.prompt_roles != Role.PAD).int().argmax(1)
        stops = [max((span.stop for span in spans), default=-1) for spans in self.images]
        last = torch.tensor(stops, device=first.device)
        return torch.where(last >= 0, last, first)

    def grown(self, length: int) -> TokenLayout:
        """Return the layout with ``length`` columns; the new ones are generated."""
        return self if length == self.length else dataclasses.replace(self, length=length)

    def repeated(self, factor: int) -> TokenLayout:
        """Return the layout with every row repeated (beams, several sequences per prompt)."""
        images = tuple(spans for spans in self.images for _ in range(factor))
        question = None if self.question is None else self.question.repeat_interleave(factor, 0)
        return TokenLayout(self.prompt_roles.repeat_interleave(factor, 0), images, self.length, question)

    def text_queries(self, row: int, span: ImageSpan) -> Tensor:
        """Return the columns of a row's prompt text that follow an image, ``[n]``."""
        role = self.prompt_roles[row]
        columns = torch.arange(self.prompt_length, device=role.device)
        return columns[(columns >= span.stop) & (role == Role.PROMPT)]
