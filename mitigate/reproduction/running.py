"""Running a published table: every comparison through the same path as ``mitigate compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.jsonfiles import write_text
from mitigate.reproduction.markdown import as_markdown
from mitigate.reproduction.results import merge_results, result_of

if TYPE_CHECKING:
    from rich.console import Console

    from mitigate.reproduction.planning import Job


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    console: Console,
    command: str = "",
    begin: Callable[[int, Job, Path], None] = lambda number, job, directory: None,
) -> Mapping[str, Any] | None:
    """Run comparisons one after the other, and write what was published beside what was measured.

    Started again after an interruption, it goes on where it stopped.

    Parameters
    ----------
    jobs
        Of one table.
    folder
        Folder of the table; each comparison has its own below.
    console
        Where progress, tables and messages go.
    command
        Command line, for the reports.
    begin
        Called before each comparison with its number, itself, and its folder.

    Returns
    -------
    Mapping or None
        Content of ``reproduction.json``, which is complete after every comparison; ``None`` in processes other than
        the first.
    """
    from mitigate.runner import compare

    data: Mapping[str, Any] | None = None
    for number, job in enumerate(jobs, start=1):
        directory = folder / job.name
        begin(number, job, directory)
        comparison = compare(job.runs, directory, console=console, command=command)
        if comparison is None:
            continue
        results = {job.name: result_of(job, against_vanilla(job, comparison.data, directory))}
        data = merge_results(folder, job.published, results)
        write_text(folder / "reproduction.md", as_markdown(data))
    return data


def against_vanilla(job: Job, data: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    """Return the comparison with the vanilla row as baseline, which in some tables is another one than ``none``."""
    vanilla = job.published.vanilla
    if data["baseline"] == vanilla:
        return data
    from mitigate.runner.results import summarise
    from mitigate.runner.stored import read_run

    stacks = [vanilla, *(stack for stack in job.rows if stack != vanilla)]
    return summarise(directory.name, [read_run(directory / stack) for stack in stacks])
