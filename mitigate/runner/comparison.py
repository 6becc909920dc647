"""Run several stacks on the same samples and compare them, paired by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.errors import ConfigError
from mitigate.jsonfiles import write_json
from mitigate.processes import is_first_process
from mitigate.records import RunRecord
from mitigate.report import write_report
from mitigate.runner.folder import claim, refuse_run
from mitigate.runner.identity import check_same_run
from mitigate.runner.progress import StackProgress, silent
from mitigate.runner.results import summarise
from mitigate.runner.single import ModelCache, run_stack
from mitigate.runner.standalone import configured_tracker, notes_of, stored
from mitigate.runner.table import print_table
from mitigate.runner.tracking import track

if TYPE_CHECKING:
    from rich.console import Console

    from mitigate.compose import ResolvedRun
    from mitigate.trackers.base import Tracker


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` made.

    Parameters
    ----------
    directory
        Folder of the comparison: one record folder per stack, ``comparison.json``, ``report.html``.
    data
        Content of ``comparison.json``.
    """

    directory: Path
    data: Mapping[str, Any]


def compare(
    resolved: Sequence[ResolvedRun],
    directory: Path,
    *,
    console: Console,
    tracker: Tracker | None = None,
    command: str = "",
) -> Comparison | None:
    """Run every stack that is not finished, then compare all of them to the one without methods.

    Started again after an interruption, it goes on where it stopped and ends with the same numbers.

    Parameters
    ----------
    resolved
        One run per stack, on one benchmark.
    directory
        Folder of the comparison.
    console
        Where progress, table and messages go.
    tracker
        Where else the results are shown; ``None``: as the configuration says.
    command
        Command line, for the report.

    Returns
    -------
    Comparison or None
        ``None`` in processes other than the first: they only helped generating.

    Raises
    ------
    ConfigError
        If the stacks cannot be compared, the folder cannot be written or another process works in it, or it holds
        another run. Nothing has run then.
    DataError
        As `run_stack` does.
    """
    directory, first = Path(directory), is_first_process()
    _check_comparable(resolved)
    console = console if first else silent()
    with claim(directory) if first else nullcontext():
        refuse_run(directory)
        for item in resolved:
            check_same_run(item, directory / item.stack_name)
        if tracker is None:
            tracker = configured_tracker(resolved[0], directory)
        records = _run_all(resolved, directory, console)
        if not first:
            return None
        return _conclude(resolved, records, directory, console, tracker, command)


def _run_all(resolved: Sequence[ResolvedRun], directory: Path, console: Console) -> dict[str, RunRecord]:
    """Run the stacks one after the other, each one in its own folder."""
    models = ModelCache()
    records: dict[str, RunRecord] = {}
    try:
        with StackProgress(console, len(resolved)) as progress:
            for item in resolved:
                folder = directory / item.stack_name
                records[item.stack_name] = run_stack(item, folder, console=console, models=models, progress=progress)
    except KeyboardInterrupt:
        line = f"Interrupted. Answers so far are in {directory}; the same command goes on from there."
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        raise
    return records


def _conclude(
    resolved: Sequence[ResolvedRun],
    records: Mapping[str, RunRecord],
    directory: Path,
    console: Console,
    tracker: Tracker,
    command: str,
) -> Comparison:
    """Write, show and track the results of finished runs."""
    runs = [stored(item, records[item.stack_name], directory / item.stack_name) for item in resolved]
    data = summarise(directory.name, runs, notes=notes_of(resolved))
    write_json(directory / "comparison.json", data)
    (report,) = write_report(directory, data, runs, command=command)
    print_table(data, console)
    messages = track(tracker, data, runs, directory).lines
    messages.append(f"Report: {report} (open it in a browser: {report.resolve().as_uri()})")
    for message in messages:
        console.print(message, markup=False, highlight=False, soft_wrap=True)
    return Comparison(directory=directory, data=data)


def _check_comparable(resolved: Sequence[ResolvedRun]) -> None:
    if not resolved:
        raise ConfigError("nothing to compare: stacks is empty; name at least one, such as stacks=[none]")
    names = [item.stack_name for item in resolved]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"stack {twice[0]!r} is listed twice; leave one out")
    for item in resolved[1:]:
        if item.benchmark != resolved[0].benchmark or item.config["seed"] != resolved[0].config["seed"]:
            raise ConfigError(
                f"stacks {names[0]!r} and {item.stack_name!r} differ in benchmark or seed; "
                "a paired comparison needs the same samples"
            )
