"""What a tracker is: a few calls per stack, made after the stack's records are safe on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One stack of a comparison, as a tracker sees it.

    Parameters
    ----------
    id
        Letters and digits that name this run for good: tracked again, it is the same run and not one more.
    name, group
        Stack and comparison.
    config
        The run's complete configuration.
    tags
        Labels the user asked for.
    notes
        One sentence on what the numbers are and are not.
    """

    name: str
    group: str
    config: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    notes: str = ""
    id: str = ""


class Tracker:
    """Base class of trackers: override `start`, `log`, `table` and `finish`, and what else the place can take.

    Parameters
    ----------
    config
        The ``tracker`` section of the run's configuration.
    directory
        Folder of the comparison; local files go below it.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    modes: ClassVar[tuple[str, ...]] = ()
    """Values of ``tracker.mode`` besides ``None``; empty if the tracker has no modes."""
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        self.config = config
        self.directory = directory

    @property
    def destination(self) -> str:
        """What tells one place from another: what was tracked there is not tracked there again."""
        return f"{self.name} {self.config.get('mode')} {self.config.get('project')}"

    @property
    def trial(self) -> bool:
        """Whether everything here belongs to one run that somebody else began, such as a trial of a sweep."""
        return False

    def start(self, run: TrackedRun) -> None:
        """Open a run for one stack."""
        raise NotImplementedError(f"{type(self).__name__} does not define start()")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Store final values by name; names are grouped by ``/``."""
        raise NotImplementedError(f"{type(self).__name__} does not define log()")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Store a table; a cell may be a `PIL.Image.Image`."""
        raise NotImplementedError(f"{type(self).__name__} does not define table()")

    def artifact(self, name: str, kind: str, files: Mapping[str, Path]) -> None:
        """Store files as one versioned thing; where there is no such thing, nothing is done.

        Parameters
        ----------
        name
            Letters, digits, dots, dashes and underscores.
        kind
            ``report`` or ``records``.
        files
            Name inside the artifact -> file.
        """

    def finish(self, *, failed: bool = False) -> str | None:
        """Close the run and return where it can be found (``None``: nowhere)."""
        raise NotImplementedError(f"{type(self).__name__} does not define finish()")

    def give_up(self) -> None:
        """Close the run after a failure, which is the one worth reporting: another one is not raised."""
        with suppress(Exception):
            self.finish(failed=True)
