"""Write a report in the formats that are asked for: a page, Markdown, a tidy table, a LaTeX table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.jsonfiles import write_text
from mitigate.report.html import render
from mitigate.report.latex import latex
from mitigate.report.markdown import markdown
from mitigate.report.provenance import judges_of
from mitigate.report.samples import SAMPLES, choose_samples
from mitigate.report.tidy import tidy

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
    judges = judges_of(runs)

    def page() -> str:
        benchmark, seed = runs[0].benchmark, int(comparison["seed"])
        choice = choose_samples(benchmark, runs, comparison["baseline"], limit=samples, seed=seed)
        return render(comparison, choice, benchmark, title=title, command=command, judges=judges)

    makers: dict[str, Callable[[], str]] = {
        "html": page,
        "md": lambda: markdown(comparison, title=title, command=command, judges=judges),
        "csv": lambda: tidy(comparison),
        "tex": lambda: latex(comparison, title=title),
    }
    made = []
    for ending in formats:
        made.append(Path(folder) / f"report.{ending}")
        # An answer may hold half a surrogate pair, which no file can.
        write_text(made[-1], makers[ending]().encode("utf-8", "backslashreplace").decode("utf-8"))
    return made
