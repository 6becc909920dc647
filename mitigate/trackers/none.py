"""No tracking: the records, the table and the report are all there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mitigate.trackers.base import TrackedRun, Tracker


class NoTracker(Tracker):
    """Does nothing and imports nothing."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "no tracking besides the run records"

    def start(self, run: TrackedRun) -> None:
        """Ignore the run."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Ignore the metrics."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Ignore the table."""

    def finish(self, *, failed: bool = False) -> str | None:
        """Have nothing to show."""
        return None
