"""Per-request memory of one method, and what it counts for the result tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mitigate.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mitigate.core.events import Event


@dataclass(frozen=True)
class Trace:
    """One thing a method reported.

    Parameters
    ----------
    method
        The method's key in the stack.
    phase, step, layer
        Where it happened; ``layer`` is ``None`` outside layers.
    values
        Name -> plain Python value; what was a tensor is a list whose first axis is the request row.
    """

    method: str
    phase: str
    step: int
    layer: int | None
    values: dict[str, Any]


class RowMemory(SimpleNamespace):
    """Tensors ``[B, ...]`` that stay with their request rows: beam search repeats rows and changes their places."""

    def __init__(self, rows: int) -> None:
        self.__dict__["_rows"] = rows

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or value.shape[:1] != (self._rows,):
            got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"state.per_row.{name} must be a tensor with {self._rows} request rows first, not {got}")
        self.__dict__[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """Return a tensor, or the default while the method has not set it."""
        return self.__dict__.get(name, default)

    def take(self, rows: Tensor) -> None:
        """Put the given rows in the places of the present ones."""
        kept = {name: value[rows.to(value.device)] for name, value in vars(self).items() if name != "_rows"}
        self.__dict__.update(kept, _rows=len(rows))


class MethodState(SimpleNamespace):
    """What a method remembers during one request: free attributes, plus counters per request row.

    Attributes are the method's own (``state.history = ...``). A new request starts with a new state. What is kept from
    step to step for every request row belongs to ``per_row`` (``state.per_row.average = ...``, a `RowMemory`): in a
    beam search a row's past is not always that of the same place. ``tracing`` says whether somebody wants to know what
    the method does step by step.
    """

    def __init__(self, key: str, rows: int, *, traces: list[Trace] | None = None) -> None:
        super().__init__()
        self.key = key
        self.tracing = traces is not None
        self.per_row = RowMemory(rows)
        self._traces = traces
        self._rows = rows
        self._counters: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._changes: list[Tensor] = []
        self._shared: dict[str, tuple[Any, Any]] = {}

    def once(self, name: str, source: Any, compute: Callable[[], Any]) -> Any:
        """Return a value that layers of a forward share; computed anew when it stems from another ``source`` object."""
        known = self._shared.get(name)
        if known is None or known[0] is not source:
            known = self._shared[name] = (source, compute())
        return known[1]

    def trace(self, event: Event, **values: Any) -> None:
        """Report what the method decided, if anybody listens (``handle.generate(trace=True)``).

        Parameters
        ----------
        event
            The event being handled.
        **values
            Tensors with the request rows first, or plain values.
        """
        if self._traces is not None:
            plain = {name: _plain(value) for name, value in values.items()}
            layer = getattr(event, "layer", None)
            self._traces.append(Trace(self.key, event.phase.value, event.step, layer, plain))

    def note_change(self, change: Tensor) -> None:
        """Note by how much an edit changed attention rows, ``[B, R]`` (L1); counted at the end of the forward."""
        self._changes.append(change.detach())

    def count_changes(self) -> None:
        """Count the attention rows changed in the forward that ends: ``rows_edited`` and ``l1_change``."""
        if self._changes:
            changes = torch.cat([change.to(self._changes[0].device) for change in self._changes], 1)
            self.count("rows_edited", (changes > 0).sum(1))
            self.count("l1_change", changes.sum(1))
            self._changes.clear()

    def spend(self, seconds: float) -> None:
        """Add to the time spent in the method's handlers, shared out among the rows."""
        self._seconds += seconds

    def count(self, counter: str, amount: Tensor | float, where: Tensor | None = None) -> None:
        """Add to a counter of every request row.

        Parameters
        ----------
        counter
            Name in the telemetry, such as ``rejections``.
        amount
            Number, or ``[B]`` tensor.
        where
            ``[B]`` mask of the rows to count; all by default.
        """
        value = torch.as_tensor(amount).detach()
        if where is not None:
            value = value * where.to(value.device)
        value = value.expand(self._rows).double()
        total = self._counters.get(counter)
        self._counters[counter] = value if total is None else total + value.to(total.device)

    def repeat(self, factor: int) -> None:
        """Follow a repetition of the request rows; a counter's total is shared out among the copies."""
        self.per_row.take(torch.arange(self._rows).repeat_interleave(factor))
        self._rows *= factor
        self._counters = {name: total.repeat_interleave(factor) / factor for name, total in self._counters.items()}

    def summed(self, rows: Iterable[int]) -> dict[str, float]:
        """Return the counters summed over request rows."""
        chosen = list(rows)
        counters = {name: float(total[chosen].sum()) for name, total in sorted(self._counters.items())}
        return {**counters, "seconds": self._seconds * len(chosen) / self._rows}

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute, or the default while the method has not set it."""
        return getattr(self, attribute, default)


def _plain(value: Any) -> Any:
    return value.detach().cpu().tolist() if isinstance(value, torch.Tensor) else value
