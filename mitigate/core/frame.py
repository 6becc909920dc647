"""One forward pass of the model as the bus sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mitigate.core.points import Phase

if TYPE_CHECKING:
    from mitigate.core.request import Request


@dataclass(frozen=True)
class RowSelection:
    """The query rows of one forward that a subscription asked for.

    Parameters
    ----------
    local
        ``[R]`` indices into the Q rows of the forward, ascending.
    mask
        ``[B, R]`` False where a sample has finished or did not ask for the row.
    full
        Whether the mask is True everywhere.
    """

    local: Tensor
    mask: Tensor
    full: bool


@dataclass
class Frame:
    """One forward pass of the model as the bus sees it.

    Parameters
    ----------
    start, stop
        Columns of the sequence this forward computes (``stop`` is the number of keys).
    owner
        Key of the only method served (diagnostic passes), or ``None`` for all.
    every_row
        Whether every row counts as asked for (rows run again), whatever a subscription's ``rows``.
    gradient
        Whether attention weights get a graph in this forward.
    tape
        Layer -> differentiable weights ``[B, H, R, K]``.
    direct
        Layer -> weights of the last row ``[B, H, K]`` and values ``[B, H_kv, K, d]``.
    """

    phase: Phase
    step: int
    start: int
    stop: int
    branch: str = "main"
    owner: str | None = None
    gradient: bool = False
    every_row: bool = False
    selections: dict[Any, RowSelection | None] = field(default_factory=dict)
    tape: dict[int, Tensor] = field(default_factory=dict)
    direct: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _positions: tuple[Tensor, Tensor] | None = None

    def positions(self, local: Tensor) -> Tensor:
        """Columns of local rows; the same tensor object for the same rows, so that methods can cache by it."""
        known = self._positions
        if known is None or known[0] is not local:
            known = self._positions = (local, local + self.start)
        return known[1]

    def event(self, request: Request) -> dict[str, Any]:
        """Return what every event of this forward says, as keyword arguments."""
        return {"phase": self.phase, "step": self.step, "branch": self.branch, "request": request}
