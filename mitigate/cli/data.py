"""``mitigate data``: get the files benchmarks need, and see whether they are the right ones."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mitigate.cli.exits import FAILED, OK, USER_ERROR
from mitigate.cli.flags import read_flags, wants_help
from mitigate.cli.parameters import Parameters
from mitigate.data import checking, data_folder, data_root
from mitigate.data.fetching import download
from mitigate.errors import ConfigError, PluginError
from mitigate.registry import benchmarks, suggestion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mitigate.benchmarks.base import Benchmark
    from mitigate.data.checking import FileState

HELP = """\
Usage: mitigate data list  [NAME ...] [--data DIR] [--json]
       mitigate data fetch NAME ...   [--data DIR] [--json]
       mitigate data check NAME ...   [--data DIR] [--json] [--quick] [KEY=VALUE ...]

  list     the files each benchmark needs, their licences, and whether they are there
  fetch    download what may be downloaded (pinned by commit and sha256), and say what to get by hand and from where
  check    compare every file with its pinned sha256, count rows, look for duplicate ids, decode every picture

Names are those of benchmarks in any case (POPE, pope); `mitigate data list` shows them.

KEY=VALUE checks the data of other settings of the benchmark than its own: dataset=gqa, splits=[random]

Options
  --data DIR   folder of all data; $MITIGATE_DATA if not given, or data/. A benchmark's files lie below DIR/NAME,
               pictures and annotations that several share below DIR/coco and DIR/gqa
  --quick      with check: only see whether the pictures are there, do not decode them
  --json       print one JSON object and nothing else
  -h, --help   this text

Examples
  mitigate data fetch pope
  mitigate data check pope amber --data /scratch/data
  mitigate data check pope dataset=gqa

A file that is already there is never overwritten. HTTP_PROXY and HTTPS_PROXY are respected. Exit codes: 0 everything is
there and right, 1 something has to be got or mended, 2 something to fix in the command, or a download that failed.
"""

_FLAGS = {
    "list": {"--data": True, "--json": False},
    "fetch": {"--data": True, "--json": False},
    "check": {"--data": True, "--json": False, "--quick": False},
}
_STYLES = {
    checking.OK: "green",
    checking.UNPINNED: "green",
    checking.MISSING: "yellow",
    checking.OLDER: "bold red",
    checking.ALTERED: "bold red",
    checking.DAMAGED: "bold red",
}
_SHOWN_PROBLEMS = 10


def data(arguments: Sequence[str], console: Console) -> int:
    """List, fetch or check the data of benchmarks."""
    if not arguments or wants_help(arguments):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return OK if arguments else USER_ERROR
    command, rest = arguments[0], arguments[1:]
    if command not in _FLAGS:
        raise ConfigError(f"mitigate data has no command {command!r}{suggestion(command, _FLAGS)}")
    settings = [word for word in rest if "=" in word and not word.startswith("-")] if command == "check" else []
    words, flags = read_flags(f"data {command}", [word for word in rest if word not in settings], _FLAGS[command])
    if not words and command != "list":
        raise ConfigError(f"mitigate data {command} needs names, such as `mitigate data {command} pope`{_known()}")
    root = flags.get("--data")
    if root is not None and not Path(root).is_dir() and command != "fetch":
        raise ConfigError(f"--data {root}: there is no such folder")
    names = [benchmark_name(word) for word in words] if words else with_sources()
    quiet = Console(file=sys.stderr, quiet=True) if "--json" in flags else console
    if command == "list":
        found, code = [_list(name, root, quiet) for name in names], OK
    else:
        if command == "fetch":
            for name in names:
                _fetch(name, root, quiet)
            found = [_fetched(name, root, quiet) for name in names]
        else:
            chosen = [_benchmark(name, root, settings) for name in names]
            found = [_check(each, root, quiet, quick="--quick" in flags, all_files=not settings) for each in chosen]
        code = OK if all(item["ok"] for item in found) else FAILED
    if "--json" in flags:
        console.print_json(json.dumps({"data": str(data_root(root)), "benchmarks": found}), highlight=False)
    return code


def with_sources() -> list[str]:
    """Return the names of the benchmarks that need files; broken ones are left to `mitigate list`."""
    found = []
    for name in benchmarks().names():
        try:
            if benchmarks().get(name).sources:
                found.append(name)
        except PluginError:
            continue
    return found


def benchmark_name(word: str) -> str:
    """Return the registered name of a benchmark that is written in any case.

    Raises
    ------
    UnknownName
        If there is none.
    """
    names = benchmarks().names()
    return next((name for name in names if name.lower() == word.lower()), None) or _refuse(word)


def _refuse(word: str) -> str:
    return benchmarks().origin(word.lower()).name  # raises, with the nearest names


def _known() -> str:
    return suggestion("", with_sources())


def _states(name: str, root: str | None) -> list[FileState]:
    folder = data_folder(name, root)
    return [checking.inspect(source, folder) for source in benchmarks().get(name).sources]


def _summary(name: str, root: str | None, states: Sequence[FileState]) -> dict[str, Any]:
    return {
        "name": name,
        "folder": str(data_folder(name, root)),
        "ok": not any(state.wrong for state in states),
        "files": [checking.as_json(state) for state in states],
    }


def _list(name: str, root: str | None, console: Console) -> dict[str, Any]:
    states = _states(name, root)
    table = Table("file", "there", "how to get it", "licence", title=name, title_justify="left")
    for state in states:
        how = "mitigate data fetch" if state.source.url else "by hand"
        there = "yes" if state.verdict in (checking.OK, checking.UNPINNED) else state.verdict
        optional = " (for some settings)" if state.source.optional else ""
        row = (Text(str(state.path) + ("/" if state.source.is_folder else "")), _verdict(there, state.verdict))
        table.add_row(*row, Text(how + optional), Text(state.source.licence))
    if not states:
        _say(console, f"{name} needs no files")
    else:
        console.print(table)
    return _summary(name, root, states)


def _fetch(name: str, root: str | None, console: Console) -> None:
    """Download what is missing and may be downloaded.

    Raises
    ------
    DataError
        At the first download that fails; files that were complete before stay.
    """
    for state in _states(name, root):
        if state.verdict == checking.MISSING and state.source.url is not None:
            _say(console, f"{state.source.url}\n  -> {state.path}")
            download(state.source, state.path, progress=not console.quiet and sys.stderr.isatty())


def _fetched(name: str, root: str | None, console: Console) -> dict[str, Any]:
    """Show what is there after the downloads, and what is left for the user to do."""
    states = _states(name, root)
    _files_table(name, states, console)
    left = [state for state in states if state.verdict == checking.MISSING]
    for state in left:
        when = "; only some settings need it" if state.source.optional else ""
        text = f"{state.path}{'/' if state.source.is_folder else ''} is missing{when}: {state.source.instruction}"
        _say(console, _folded(text))
    _mend(states, console)
    summary = _summary(name, root, states)
    if not states:
        _say(console, f"{name} needs no files")
    elif summary["ok"]:
        _say(console, f"{name}: everything is there; `mitigate data check {name}` also reads the pictures")
    return summary


def _check(benchmark: Benchmark, root: str | None, console: Console, *, quick: bool, all_files: bool) -> dict[str, Any]:
    """Look at all files, and at the pictures of the settings; which files other settings need is not asked."""
    name = benchmark.name
    states = _states(name, root)
    summary = _summary(name, root, states)
    _files_table(name, states, console)
    missing = [state for state in states if state.verdict == checking.MISSING and not state.source.optional]
    for state in missing if all_files else []:
        _say(console, _folded(f"{state.path} is missing: {state.source.instruction}"))
    _mend(states, console)
    problems: list[str] = []
    if not (all_files and any(not state.source.is_folder for state in missing)):
        with progress_bar("Pictures", shown=not console.quiet and sys.stderr.isatty()) as report:
            pictures = checking.check_pictures(benchmark, decode=not quick, report=report)
        if isinstance(pictures, str):
            problems = [pictures]
        else:
            problems = pictures.problems
            summary["pictures"] = {"needed": pictures.needed, "wrong": len(problems), "decoded": pictures.decoded}
            read = "are there and can be read" if pictures.decoded else "are there (not decoded: --quick)"
            if pictures.needed:
                _say(console, f"{pictures.needed - len(problems)} of {pictures.needed} pictures {read}")
    gone = tuple(str(state.path) for state in missing if state.source.is_folder) if all_files else ()
    _say_problems([problem for problem in problems if not (gone and problem.startswith(gone))], console)
    if all_files and any(state.source.optional and state.verdict != checking.MISSING for state in states):
        _say(console, f"pictures of other settings were not looked for: mitigate data check {name} KEY=VALUE")
    wrong = [state for state in states if state.wrong and (all_files or state not in missing)]
    summary["ok"] = not wrong and not problems
    summary["problems"] = problems
    _say(console, f"{name}: {'ready' if summary['ok'] else 'not ready'}")
    return summary


def _say_problems(problems: Sequence[str], console: Console) -> None:
    for problem in problems[:_SHOWN_PROBLEMS]:
        _say(console, f"  {problem}")
    if len(problems) > _SHOWN_PROBLEMS:
        _say(console, f"  ... and {len(problems) - _SHOWN_PROBLEMS} more (--json lists them)")


def _benchmark(name: str, root: str | None, settings: Sequence[str]) -> Benchmark:
    plugin = benchmarks().get(name)
    parameters = Parameters(plugin, f"benchmark {name}")
    for setting in settings:
        key, _, value = setting.partition("=")
        parameters.set(key, value, setting)
    if plugin.sources:
        parameters.set("data_dir", str(data_root(root)), "--data")
    made: Benchmark = parameters.build()
    return made


def _files_table(name: str, states: Sequence[FileState], console: Console) -> None:
    table = Table("file", "verdict", "", title=name, title_justify="left")
    for state in states:
        verdict = state.verdict
        if verdict == checking.MISSING and state.source.optional:
            verdict = "missing (only for some settings)"
        elif verdict == checking.UNPINNED:
            verdict = "there, cannot be pinned"
        path = f"{state.path}{'/' if state.source.is_folder else ''}"
        table.add_row(Text(path), _verdict(verdict, state.verdict), Text(state.detail))
    if states:
        console.print(table)


def _mend(states: Sequence[FileState], console: Console) -> None:
    for state in states:
        if state.verdict in (checking.OLDER, checking.ALTERED, checking.DAMAGED):
            older = state.verdict == checking.OLDER
            what = f"is an older version, {state.detail}" if older else "is not what the benchmark needs"
            how = "fetch it again" if state.source.url else state.source.instruction
            _say(console, _folded(f"{state.path} {what}: move it away, then {how}"))


def _verdict(text: str, verdict: str) -> Text:
    return Text(text, style=_STYLES[verdict])


@contextmanager
def progress_bar(title: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Draw a progress bar on stderr while a loop reports how much is done of how much."""
    if not shown:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _folded(text: str) -> str:
    lines = textwrap.wrap(
        text, 118, initial_indent="* ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
