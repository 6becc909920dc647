"""Write a report in the formats that are asked for: a page, Markdown, a tidy table, a LaTeX table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.jsonfiles import write_text
from mitigate.report.html import render
from mitigate.report.samples import SAMPLES, choose_samples

if TYPE_CHECKING:
    from mitigate.runner.stored import StoredRun

#: Formats by the ending of their file.
FORMATS = ("html", "md", "csv", "tex")


def write_report(
    folder: Path,
    comparison: Mapping[str, Any],
    runs: Sequence[StoredRun],
    *,
    formats: Sequence[str] = ("html",),
    title: str = "",
    samples: int = SAMPLES,
    command: str = "",
) -> list[Path]:
    """Write ``report.html`` and its like; each file is replaced in one step.

    Parameters
    ----------
    folder
        Where to write; made if missing.
    comparison
        Content of ``comparison.json``, as `mitigate.runner.results.summarise` makes it of the runs.
    runs
        The runs, for the sample browser.
    formats
        Some of `FORMATS`.
    title
        Heading; the comparison's name by default.
    samples
        Most samples of the browser.
    command
        Command line that made it.

    Returns
    -------
    list of Path
        The files, in the order of the formats.

    Raises
    ------
    DataError
        If the disk refuses a file.
    """
    made = []
    for ending in formats:
        path = Path(folder) / f"report.{ending}"
        if ending == "html":
            benchmark = runs[0].benchmark
            choice = choose_samples(
                benchmark, runs, comparison["baseline"], limit=samples, seed=int(comparison["seed"])
            )
            text = render(comparison, choice, benchmark, title=title, command=command)
        else:
            raise NotImplementedError(ending)
        write_text(path, text)
        made.append(path)
    return made
