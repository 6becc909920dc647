"""``mitigate reproduce``: published tables, run again and held against what is measured here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mitigate.cli.exits import INTERRUPTED, OK
from mitigate.cli.options import read_options
from mitigate.errors import ConfigError

if TYPE_CHECKING:
    from mitigate.reproduction.planning import Job

HELP = """\
Usage: mitigate reproduce [NAME] [--dry-run] [--list] [KEY=VALUE ...]

Run a published table with its own protocol, and print published against measured numbers: 95 % intervals, paired
differences to the row without the method, and a verdict for every cell. Without NAME: the tables that can be run, and
what each of them needs that is not here. An interrupted table goes on where it stopped.

  NAME             an experiment that holds published values
  model=MODEL      only the rows of this model; model.path=FOLDER for a local copy of its weights
  benchmark=NAME   only the columns of this benchmark
  model=testbed    the same stacks on the embedded testbed, in small: no verdict is drawn, only signs are shown
  benchmark.limit=50
                   a small try; anything that changes the protocol is named beside the verdicts
  name=FOLDER      folder below runs_dir; default reproduce-NAME

Options
  --dry-run        print the protocol, every setting and where it comes from, and what is missing; start nothing
  --list           list the tables
  -h, --help       this text

Results: reproduction.json and reproduction.md in the folder, one comparison with its report per model and benchmark.
All other values as for `mitigate compare`. docs/reproduction.md says what a verdict means and what papers leave open.
"""
_DRY, _LIST = "--dry-run", "--list"
_STYLES = {"agrees": "green", "confirmed": "green", "differs": "red", "opposite": "red", "not found": "red"}


def reproduce(arguments: Sequence[str], console: Console) -> int:
    """List published tables, show what one needs, or run it."""
    flags = [argument for argument in arguments if argument in (_DRY, _LIST)]
    options = read_options("reproduce", [argument for argument in arguments if argument not in flags], ())
    if options.help:
        _say(console, HELP.rstrip("\n"))
        return OK
    names = [item for item in options.overrides if "=" not in item]
    if not names:
        if options.overrides or _DRY in flags:
            given = (options.overrides or flags)[0]
            raise ConfigError(f"{given}: which table? `mitigate reproduce --list` shows their names")
        return _list(console)
    if _LIST in flags or len(names) > 1:
        raise ConfigError(f"{' '.join([*names, *flags])}: name one table, or give --list alone")
    from mitigate.reproduction.planning import find_table, plan_jobs, read_overrides

    published = find_table(names[0])
    asked = read_overrides([item for item in options.overrides if "=" in item])
    jobs = plan_jobs(published, asked)
    if _DRY in flags:
        _show_plan(jobs, console)
        return OK
    folder = Path(jobs[0].runs[0].config["runs_dir"]) / (asked.name or f"reproduce-{published.name}")
    return _run(jobs, folder, console, shlex.join(["mitigate", "reproduce", *arguments]))


def _run(jobs: Sequence[Job], folder: Path, console: Console, command: str) -> int:
    from mitigate.cli.running import check_before_start
    from mitigate.reproduction.needs import refuse_missing
    from mitigate.reproduction.running import run_jobs

    check_before_start([(run, folder / job.name / run.stack_name) for job in jobs for run in job.runs])
    refuse_missing(jobs)
    for note in dict.fromkeys(note for job in jobs for note in job.notes):
        _say(console, note)

    def begin(number: int, job: Job, directory: Path) -> None:
        _say(console, f"Comparison {number} of {len(jobs)}: {directory}" if len(jobs) > 1 else f"Folder: {directory}")

    try:
        data = run_jobs(jobs, folder, console=console, command=command, begin=begin)
    except KeyboardInterrupt:  # the runner has said where the answers are
        return INTERRUPTED
    if data is not None:
        for job in jobs:
            _show_result(data["comparisons"][job.name], console)
        _say(console, f"Published against measured: {folder / 'reproduction.md'} and reproduction.json beside it")
    return OK


def _show_result(result: Mapping[str, Any], console: Console) -> None:
    from mitigate.reproduction.markdown import HEADINGS, notes_of, rows_of, title_of

    table = Table(*HEADINGS, title=escape(title_of(result)), title_justify="left")
    for row in rows_of(result):
        styled = [_styled(cell) if HEADINGS[place] == "verdict" else escape(cell) for place, cell in enumerate(row)]
        table.add_row(*styled)
    console.print(table)
    for note in notes_of(result):
        _say(console, note)


def _styled(verdict: str) -> str:
    style = _STYLES.get(verdict)
    return f"[{style}]{verdict}[/{style}]" if style else verdict


def _list(console: Console) -> int:
    from mitigate.compose.session import session
    from mitigate.reproduction.needs import missing_in_short
    from mitigate.reproduction.tables import read_protocol, read_tables

    table = Table("name", "table", "models", "benchmarks", "missing here", title="Published tables", show_lines=True)
    with session() as hydra:
        tables = read_tables(hydra)
        for name, published in tables.items():
            protocols = [read_protocol(hydra, protocol) for protocol in published.protocols]
            names = list(dict.fromkeys(protocol.benchmark for protocol in protocols))
            missing = missing_in_short(hydra, list(published.models), names)
            source = f"{published.table}\narXiv {published.arxiv}"
            cells = (name, source, ", ".join(published.models), ", ".join(names), "\n".join(missing) or "nothing")
            table.add_row(*map(escape, cells))
    console.print(table)
    _say(console, "`mitigate reproduce NAME --dry-run` shows the protocol and how to get what is missing.")
    return OK


def _show_plan(jobs: Sequence[Job], console: Console) -> None:
    from mitigate.reproduction.needs import missing_of

    published = jobs[0].published
    console.rule(escape(f"{published.name}: {published.table}, arXiv {published.arxiv}"), align="left")
    _say(console, published.paper)
    for protocol in dict.fromkeys(job.protocol.name for job in jobs):
        _show_protocol([job for job in jobs if job.protocol.name == protocol], console)
    for heading, lines in (("About the table", published.notes), ("Left out", published.left_out)):
        if lines:
            _say(console, f"\n{heading}")
            for line in lines:
                _say(console, f"  {line}")
    missing = missing_of(jobs)
    _say(console, "\nMissing here" if missing else "\nNothing is missing: drop --dry-run to run it.")
    for item, users in missing.items():
        _say(console, f"  {item.what}\n      get it: {item.remedy}")
        if len(users) < len(jobs):
            _say(console, f"      for: {', '.join(f'{job.model} {job.protocol.benchmark}' for job in users)}")


def _show_protocol(jobs: Sequence[Job], console: Console) -> None:
    from mitigate.reproduction.settings import lines

    benchmark, name = jobs[0].runs[0].config["benchmark"]["name"], jobs[0].protocol.name
    _say(console, f"\nBenchmark {benchmark}, as experiment={name} sets it up")
    for job in jobs:
        rows = ", ".join(f"{stack} = {job.published.names.get(stack, 'no row')!r}" for stack in job.rows)
        _say(console, f"  {job.published.models[job.model].printed}: {rows}")
        if job.other_model:
            _say(console, f"      another model: {job.other_model}; no verdict will be drawn")
    printed = {column for job in jobs for row in job.rows.values() for column in row}
    measured = ", ".join(
        f"{column} = {'100 - ' if how.complement else ''}{how.metric}"
        for column, how in jobs[0].columns.items()
        if column in printed
    )
    _say(console, f"  Columns: {measured}")
    if jobs[0].altered:
        _say(console, f"  Not the full protocol: {', '.join(jobs[0].altered)}")
    table = Table("setting", "value", "from", "why", title="Settings", title_justify="left")
    for line in lines(jobs):
        style = "dim" if line.origin == "default" else ""
        table.add_row(*map(escape, (line.key, line.text, line.origin, line.why)), style=style)
    table.caption = "default: the project's own value; nothing about it is known from the paper or its code"
    console.print(table)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
