"""A method's own query rows where other methods of the stack asked for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.events import AttentionProbs, AttentionScores
    from mitigate.core.state import MethodState


@dataclass(frozen=True)
class OwnRows:
    """Query rows a method asked for, among those of an attention event.

    Parameters
    ----------
    index
        ``[r]`` into the event's rows; ``None`` for all of them.
    rows
        ``[r]`` their columns in the sequence.
    asked
        ``[B, r]`` as the event's ``row_mask``.
    """

    index: Tensor | None
    rows: Tensor
    asked: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """Cut the own rows out of ``[B, H, R, K]``."""
        return matrix if self.index is None else matrix[:, :, self.index]

    def put(self, matrix: Tensor, rows: Tensor) -> Tensor:
        """Put ``[B, H, r, K]`` back into a copy of ``[B, H, R, K]``."""
        return rows if self.index is None else matrix.index_copy(2, self.index, rows)


def own_rows(event: AttentionProbs | AttentionScores, state: MethodState) -> OwnRows:
    """Return the method's rows; found once for all layers that hand over the same rows."""

    def find() -> OwnRows:
        anyone = event.row_mask.any(0)
        if bool(anyone.all()):
            return OwnRows(None, event.rows, event.row_mask)
        index = anyone.nonzero().flatten()
        return OwnRows(index, event.rows[index], event.row_mask[:, index])

    own: OwnRows = state.once("own_rows", event.rows, find)
    return own
