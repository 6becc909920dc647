"""Run one stack by itself, outside a comparison."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mitigate.processes import is_first_process
from mitigate.runner.folder import claim, refuse_comparison
from mitigate.runner.progress import StackProgress, silent
from mitigate.runner.results import summarise
from mitigate.runner.single import ModelCache, run_stack
from mitigate.runner.stored import StoredRun, graded_answers
from mitigate.runner.tracking import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mitigate.compose import ResolvedRun
    from mitigate.records import RunRecord
    from mitigate.trackers.base import Tracker

TESTBED_NOTE = "The testbed is a small test bench, not evidence about large models."


def run(resolved: ResolvedRun, run_dir: Path, *, console: Console, tracker: Tracker | None = None) -> RunRecord:
    """Answer every sample of a benchmark with one stack, score the answers, and track the result.

    Parameters
    ----------
    resolved
        What to run.
    run_dir
        Folder of the records; a run that is already there is completed or, if finished, only read.
    console
        Where progress and messages go.
    tracker
        Where else the result is shown; ``None``: as the configuration says.

    Returns
    -------
    RunRecord
        The finished record.

    Raises
    ------
    ConfigError, DataError
        As `run_stack` does; also if the folder cannot be written, is in use, or holds a comparison.
    """
    run_dir, first = Path(run_dir), is_first_process()
    console = console if first else silent()
    with claim(run_dir) if first else nullcontext():
        refuse_comparison(run_dir)
        tracker = tracker or configured_tracker(resolved, run_dir)
        with StackProgress(console) as progress:
            record = run_stack(resolved, run_dir, console=console, models=ModelCache(), progress=progress)
        if first:
            _show(resolved, record, run_dir, console, tracker)
    return record


def _show(resolved: ResolvedRun, record: RunRecord, run_dir: Path, console: Console, tracker: Tracker) -> None:
    """Track a finished run, and say what is to be said about it."""
    stack = resolved.stack_name
    own = stored(resolved, record, run_dir)
    data = summarise(run_dir.name, [own], notes=notes_of([resolved]))
    lines = [f"! {note}" for kind in ("warnings", "notes") for note in data["stacks"][stack][kind]]
    for line in [*lines, *track(tracker, data, [own], run_dir).lines, *data["notes"]]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def stored(resolved: ResolvedRun, record: RunRecord, run_dir: Path) -> StoredRun:
    """Return a run that has just finished as it lies on disk."""
    return StoredRun(
        directory=run_dir,
        stack=resolved.stack_name,
        record=record,
        benchmark=resolved.benchmark,
        answers=graded_answers(resolved.benchmark, run_dir),
    )


def configured_tracker(resolved: ResolvedRun, directory: Path) -> Tracker:
    """Return the tracker a run's configuration names, for results in a folder."""
    from mitigate.registry import trackers

    config = resolved.config["tracker"]
    made: Tracker = trackers().get(config["name"])(config, directory)
    return made


def notes_of(resolved: Sequence[ResolvedRun | StoredRun]) -> list[str]:
    """Return the sentences that belong under every presentation of these runs."""
    small = any("testbed" in (item.config["benchmark"]["name"], item.config["model"]["path"]) for item in resolved)
    return [TESTBED_NOTE] if small else []
