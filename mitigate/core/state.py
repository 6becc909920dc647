"""Per-request memory of one method, and what it counts for the result tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class MethodState(SimpleNamespace):
    """What a method remembers during one request: free attributes, plus counters and traces per sample.

    Attributes are the method's own (``state.history = ...``). A new request starts with a new state.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._counters: dict[str, Tensor] = {}

    def count(self, counter: str, amount: Tensor | float, where: Tensor | None = None) -> None:
        """Add to a counter of every sample.

        Parameters
        ----------
        counter
            Name in the telemetry, such as ``rejections``.
        amount
            Number or ``[B]`` tensor.
        where
            ``[B]`` mask of the samples to count; all by default.
        """
        value = torch.as_tensor(amount, dtype=torch.float64).detach()
        value = value.expand(self._rows) if value.ndim == 0 else value
        if where is not None:
            value = value * where.to(value.device)
        total = self._counters.get(counter)
        self._counters[counter] = value.clone() if total is None else total + value.to(total.device)

    def counters(self, row: int) -> dict[str, float]:
        """Return the counters of one request row."""
        return {name: float(total[row]) for name, total in sorted(self._counters.items())}

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute, or the default while the method has not set it."""
        return getattr(self, attribute, default)
