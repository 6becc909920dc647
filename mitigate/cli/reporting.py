"""``mitigate report``: a page, and tables for papers and programs, from runs that lie on disk."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mitigate.cli.exits import OK, USER_ERROR
from mitigate.cli.flags import read_flags, wants_help
from mitigate.errors import ConfigError
from mitigate.registry import suggestion
from mitigate.report.samples import SAMPLES
from mitigate.report.writing import FORMATS, write_report

HELP = f"""\
Usage: mitigate report RUN... [--out DIR] [--format html,md,csv,tex] [--title TEXT] [--samples N]

Compare finished runs that lie on disk and write the result; no model is loaded and nothing is run.

  RUN              folder of a comparison (all its stacks), or of a single run; several are put into one table if they
                   answer the same questions with the same model. Runs of one stack with several seeds are pooled

Options
  --out DIR        where to write; the folder itself if there is one RUN
  --format LIST    some of {", ".join(FORMATS)}, joined by commas; default html
                     html  one page with everything in it, also a browser of the samples
                     md    the tables and breakdowns as Markdown
                     csv   one number per row, for other programs
                     tex   the headline numbers as a LaTeX table (booktabs)
  --title TEXT     heading; default the name of the folder
  --samples N      most samples in the browser of the page; default {SAMPLES}, 0 for none
  -h, --help       this text

Examples
  mitigate report runs/NAME
  mitigate report runs/NAME --format html,md,csv,tex --out paper
  mitigate report runs/ONE runs/OTHER --out both --title "Two stacks"

A run that is not finished is refused; the command that began it goes on where it stopped.
"""

_FLAGS = {"--out": True, "--format": True, "--title": True, "--samples": True}


def report(arguments: Sequence[str], console: Console) -> int:
    """Write the report of stored runs."""
    if not arguments or wants_help(arguments):
        _say(console, HELP, end="")
        return OK if arguments else USER_ERROR
    words, flags = read_flags("report", arguments, _FLAGS)
    if not words:
        raise ConfigError("mitigate report needs the folder of a run or comparison: mitigate report runs/NAME")
    if len(words) > 1 and "--out" not in flags:
        raise ConfigError(f"{len(words)} runs have no folder in common to write to; say where: --out DIR")
    formats, samples = _formats(flags.get("--format", "html")), _samples(flags.get("--samples", str(SAMPLES)))
    paths = [Path(word) for word in words]
    folder = Path(flags.get("--out", words[0]))
    if "--out" in flags and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    from mitigate.runner.comparable import check_comparable
    from mitigate.runner.results import summarise
    from mitigate.runner.standalone import notes_of
    from mitigate.runner.stored import find_runs

    runs = find_runs(paths)
    check_comparable(runs)
    title = flags.get("--title", "")
    name = (paths[0] if len(paths) == 1 else folder).resolve().name
    comparison = summarise(name, runs, notes=notes_of(runs))
    command = shlex.join(["mitigate", "report", *arguments])
    files = write_report(folder, comparison, runs, formats=formats, title=title, samples=samples, command=command)
    for file in files:
        where = f" (open it in a browser: {file.resolve().as_uri()})" if file.suffix == ".html" else ""
        _say(console, f"Report: {file}{where}")
    return OK


def _formats(text: str) -> list[str]:
    wanted = [part.strip().lower() for part in text.split(",") if part.strip()]
    for each in wanted:
        if each not in FORMATS:
            raise ConfigError(f"--format {each} is unknown{suggestion(each, FORMATS)}; there are {', '.join(FORMATS)}")
    if not wanted:
        raise ConfigError(f"--format needs some of {', '.join(FORMATS)}")
    return list(dict.fromkeys(wanted))


def _samples(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--samples {text} must be a whole number, 0 for none")
    return int(text)


def _say(console: Console, text: str, *, end: str = "\n") -> None:
    console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)
