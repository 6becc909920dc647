"""Progress on a terminal as bars, elsewhere as a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from rich.console import Console
    from rich.progress import TaskID

QUIET_SECONDS = 10.0


def silent() -> Console:
    """Return a console that shows nothing: of several processes, the first one speaks."""
    from rich.console import Console

    return Console(quiet=True)


class StackProgress:
    """One bar per stack and one for all of them.

    Parameters
    ----------
    console
        Where to draw.
    stacks
        Number of stacks; the overall bar appears from two on.

    Notes
    -----
    Without a terminal, one line per quarter of a stack or every ten seconds, whichever is rarer.
    """

    def __init__(self, console: Console, stacks: int = 1) -> None:
        self.console = console
        self._stacks = stacks
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._live = Live(Group(self._bars), console=console, refresh_per_second=4) if console.is_terminal else None
        self._overall: TaskID | None = None
        self._current: TaskID | None = None
        self._name = ""
        self._done = self._first = self._total = 0
        self._finished = 0
        self._started = self._printed = 0.0
        self._quarter = 0

    def __enter__(self) -> Self:
        """Show the bars."""
        if self._live is not None:
            self._live.start()
            if self._stacks > 1:
                self._overall = self._bars.add_task("all stacks", total=self._stacks, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they are and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """Start a stack's bar; ``done`` samples come from an earlier run."""
        self._name, self._total, self._done, self._first = name, total, done, done
        self._started = self._printed = time.monotonic()
        self._quarter = 4 * done // max(total, 1)
        if self._live is not None:
            self._current = self._bars.add_task(name, total=total, completed=done, rate="")

    def advance(self, samples: int) -> None:
        """Count finished samples; those of other processes are estimated and never exceed the whole."""
        self._done = min(self._done + samples, self._total)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        if self._current is not None:
            self._bars.update(self._current, completed=self._done, rate=f"{rate:.1f}/s")
            if self._overall is not None:
                self._bars.update(self._overall, completed=self._finished + self._done / max(self._total, 1))
            return
        quarter, now = 4 * self._done // max(self._total, 1), time.monotonic()
        if quarter > self._quarter and (now - self._printed >= QUIET_SECONDS or self._done == self._total):
            self._quarter, self._printed = quarter, now
            left = (self._total - self._done) / rate
            ending = f"{seconds:.0f} s" if self._done == self._total else f"{left:.0f} s left"
            line = f"{self._name}: {self._done}/{self._total} samples, {rate:.1f}/s, {ending}"
            self.console.print(line, markup=False, highlight=False)

    def end(self) -> None:
        """Close the stack's bar."""
        self._finished += 1
        if self._overall is not None:
            self._bars.update(self._overall, completed=self._finished)
        self._current = None

    def grading(self, name: str) -> Callable[[int, int], None]:
        """Return what a judge tells its progress to; the bar appears with the first verdict."""
        seen = 0

        def report(done: int, total: int) -> None:
            nonlocal seen
            if not seen:
                self.begin(f"{name}, judged", total)
            self.advance(done - seen)
            seen = done

        return report

    def skip(self) -> None:
        """Count a stack that needs no work."""
        self.end()
