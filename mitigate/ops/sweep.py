"""What a method remembers on its way up through the layers of one forward, and which rows and keys it looks at.

Shapes: B rows of the batch, H heads, R query rows, K keys, L columns, P prompt columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mitigate.core.roles import Role
from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.layout import TokenLayout


@dataclass
class Sweep:
    """One forward's memory.

    Parameters
    ----------
    rows
        ``[R]`` query rows the other tensors speak of.
    groups
        ``[B, K]`` which of its pictures a key is a patch of, -1 for other keys.
    seen
        ``[3, B, R]`` memory of a threshold (`mitigate.ops.entropy.Threshold`).
    scores
        ``[B, H, R, K]`` of the running layer, before softmax.
    best
        Row ``[B, 1, R, K]`` with the highest score so far, that score ``[B, R]``, its layer and head ``[2, B, R]``.
    totals
        Counter -> ``[B]``.
    """

    rows: Tensor
    groups: Tensor
    seen: Tensor
    scores: Tensor | None = None
    best: tuple[Tensor, Tensor, Tensor] | None = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    _patches: Tensor | None = None

    def follow(self, rows: Tensor) -> None:
        """Speak of these query rows from now on: another method of the stack may ask for more rows in some layers."""
        if rows is self.rows:
            return
        place = torch.searchsorted(self.rows.to(rows.device), rows).clamp_max(len(self.rows) - 1)
        self.rows, self.groups, self._patches = rows, self.groups.to(rows.device), None
        self.seen = self.seen.to(rows.device)[:, :, place]
        if self.best is not None:
            row, score, origin = (part.to(rows.device) for part in self.best)
            self.best = row[:, :, place], score[:, place], origin[:, :, place]

    def patches(self, unseen: Tensor | None = None) -> Tensor:
        """Return the patches each row can see, ``[B, R, K]`` bool; ``unseen`` ones ``[B, 1, R, K]`` are left out."""
        if self._patches is None:
            columns = torch.arange(self.groups.shape[1], device=self.groups.device)
            self._patches = (self.groups >= 0)[:, None] & (columns <= self.rows[:, None])
        return self._patches if unseen is None else self._patches & ~unseen[:, 0]

    def keep_best(self, row: Tensor, score: Tensor, origin: Tensor, *, earlier: bool) -> Tensor:
        """Offer this layer's row; return the one to use: it, or with ``earlier`` the best so far."""
        if earlier and self.best is not None:
            known, its_score, its_origin = self.best
            better = score > its_score
            row = torch.where(better[:, None, :, None], row, known)
            score, origin = torch.where(better, score, its_score), torch.where(better, origin, its_origin)
        self.best = row, score.detach(), origin
        return row

    def add(self, **amounts: Tensor) -> None:
        """Add ``[B, R]`` amounts to the totals."""
        for name, amount in amounts.items():
            total = amount.detach().sum(1).double()
            known = self.totals.get(name)
            self.totals[name] = total if known is None else known.to(total.device) + total

    def close(self) -> dict[str, Tensor]:
        """Return the totals; let go of weights, whose graph would outlive the forward where gradients are taken."""
        self.scores = self.best = None
        return self.totals


def picture_groups(layout: TokenLayout) -> Tensor:
    """Which of its row's pictures every prompt column is a patch of, -1 for none, ``[B, P]``.

    Tiles of one picture are one picture. Separators and class tokens are no patches.
    """
    groups = torch.full_like(layout.prompt_roles, -1, dtype=torch.long)
    for row, spans in enumerate(layout.images):
        number = {image: index for index, image in enumerate(dict.fromkeys(span.image for span in spans))}
        for span in spans:
            groups[row, span.positions.to(groups.device)] = number[span.image]
    return groups


def generated_rows(layout: TokenLayout) -> Tensor:
    """Rows of generated tokens, ``[B, L]`` bool."""
    columns = torch.arange(layout.length, device=layout.valid.device)
    return layout.valid & (columns >= layout.prompt_length)


def text_rows(layout: TokenLayout) -> Tensor:
    """Rows of text from the first picture on, ``[B, L]`` bool; text before it sees no picture."""
    text = (layout.roles == Role.PROMPT) | (layout.roles == Role.GENERATED)
    return text & (layout.image_mask.cumsum(1) > 0)
