"""``mitigate check``: the conformance suite on a method, for its author."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mitigate.cli.exits import FAILED, OK
from mitigate.core.method import Method
from mitigate.errors import ConfigError, PluginError
from mitigate.registry import methods, suggestion

if TYPE_CHECKING:
    from mitigate.testing.base import CheckResult
    from mitigate.testing.suite import Case

HELP = """\
Usage: mitigate check NAME [NAME ...] [--check CHECK] [--family FAMILY] [--json]
       mitigate check --list-checks

See whether a method keeps the contract: its class, parameters and tags without a model, then what it does on tiny
random models, which are built here in milliseconds (nothing is downloaded). Every check runs with the
method's defaults and with each of its test_params(); checks that look at the class only run once.

NAME is a registered name (`mitigate list methods`), or module:Class for a class that no package registers yet, imported
from the current directory: `mitigate check foo:Foo`.

Options
  --check CHECK     run this check only; can be given several times
  --family FAMILY   run on a tiny model of this family (`mitigate list adapters`) instead of the first one, LLaVA's; can
                    be given several times, and `--family all` means every one: some minutes
  --json            every single result as JSON, with parameters, family, message and time
  --list-checks     print all checks, each with the rule it stands for
  -h, --help        this text

A message says what is wrong and what to do. Every check can be run alone while you mend the method, and by pytest:
decorate a test with mitigate.testing.parametrize_with_checks([Foo]), which also takes failures that are expected, each
with its reason.

Exit codes: 0 the method conforms, 1 a check failed, 2 something to fix in the command or a method that cannot be built.
"""

_STYLES = {"passed": "green", "failed": "bold red", "unexpected pass": "bold red", "expected failure": "yellow"}
_VALUED = {"--check": "checks", "--family": "families"}
_FLAGS = {"--json": "json", "--list-checks": "listing", "-h": "help", "--help": "help"}


@dataclass
class _Options:
    names: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    json: bool = False
    listing: bool = False
    help: bool = False


def check(arguments: Sequence[str], console: Console) -> int:
    """Check one or several methods."""
    options = _read(arguments)
    if options.help:
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return OK
    if options.listing:
        console.print(_catalogue())
        return OK
    if not options.names:
        raise ConfigError(f"mitigate check needs the name of a method; known: {', '.join(methods().names())}")
    from mitigate.testing.suite import plan_cases
    from mitigate.testing.tiny import tiny_families

    families = tiny_families() if options.families == ["all"] else options.families or None
    with _importable_from_here():
        found = {name: _find(name) for name in dict.fromkeys(options.names)}  # all are found before the first runs
        planned = {name: plan_cases(plugin, families=families, only=options.checks) for name, plugin in found.items()}
        results = {name: _run(name, cases, options.json, console) for name, cases in planned.items()}
    if options.json:
        text = json.dumps([_as_json(name, rows) for name, rows in results.items()], indent=2, ensure_ascii=False)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return FAILED if any(row.bad for rows in results.values() for row in rows) else OK


def _read(arguments: Sequence[str]) -> _Options:
    options, remaining = _Options(), list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, separator, value = argument.partition("=")
        if flag in _VALUED:
            if not separator:
                value = remaining.pop(0) if remaining else ""
            if not value or value.startswith("-"):
                raise ConfigError(f"{flag} needs a value, such as {flag} NAME")
            getattr(options, _VALUED[flag]).append(value)
        elif argument in _FLAGS:
            setattr(options, _FLAGS[argument], True)
        elif argument.startswith("-"):
            raise ConfigError(f"mitigate check has no option {argument!r}{suggestion(flag, [*_VALUED, *_FLAGS])}")
        else:
            options.names.append(argument)
    return options


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Let modules of the current directory be imported, as `python -m` does."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find(name: str) -> type[Method]:
    """Return the class of a registered name or of ``module:Class``."""
    module, separator, attribute = name.partition(":")
    if not separator:
        return methods().get(name)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # whatever its author did
        raise PluginError(
            f"{module} cannot be imported: {type(error).__name__}: {error}\n"
            f"write module:Class with dots, from the folder that holds the module or its package"
        ) from error
    plugin = getattr(loaded, attribute, None)
    if not (isinstance(plugin, type) and issubclass(plugin, Method)):
        known = [key for key, value in vars(loaded).items() if isinstance(value, type) and issubclass(value, Method)]
        raise PluginError(f"{module} has no method class {attribute!r}{suggestion(attribute, known)}")
    return plugin


def _run(name: str, cases: Sequence[Case], silent: bool, console: Console) -> list[CheckResult]:
    """Run the checks of one method with a bar on the terminal, then print its table."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = Console(stderr=True)
    results = []
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task(name, total=len(cases))
        for case in cases:
            progress.update(task, description=f"{name} {case.check.name} {case.family}")
            results.append(case.run())
            progress.advance(task)
    if not silent:
        console.print(_table(name, results))
        console.print(_summary(name, results))
    return results


def _table(name: str, results: Sequence[CheckResult]) -> Table:
    """Return one row per check, those without a model first; every message is told once."""
    table = Table(title=name, title_justify="left", title_style="bold")
    for column in ("check", "result", "runs", "seconds", "message"):
        right = column in ("runs", "seconds")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=column == "check")
    on_models = False
    first = _first_seen(results)
    for check_name, group in groupby(results, key=lambda row: row.check):
        rows = list(group)
        if rows[0].family and not on_models:
            table.add_section()  # from here on, on tiny models
            on_models = True
        seconds = sum(row.seconds for row in rows)
        told = Text("\n".join(_told(rows, first)))
        table.add_row(check_name, _outcome(rows), str(len(rows)), f"{seconds:.2f}", told)
    return table


def _outcome(rows: Sequence[CheckResult]) -> Text:
    """Write ``passed``, or how many of the runs ended how, the worst first."""
    counts = {status: sum(row.status == status for row in rows) for status in _order(rows)}
    worst = next(iter(counts))
    if len(counts) == 1:
        return Text(worst, style=_STYLES.get(worst, "dim"))
    return Text(", ".join(f"{count} {status}" for status, count in counts.items()), style=_STYLES.get(worst, ""))


def _order(rows: Iterable[CheckResult]) -> list[str]:
    present = {row.status for row in rows}
    order = ("failed", "unexpected pass", "expected failure", "passed", "skipped")
    return [status for status in order if status in present]


def _first_seen(results: Sequence[CheckResult]) -> dict[str, str]:
    """Return for every error of a handler the first check that met it: the table tells it there alone."""
    from mitigate.testing.suite import own_error

    first: dict[str, str] = {}
    for row in results:
        first.setdefault(own_error(row.error), row.check)
    return first


def _told(rows: Sequence[CheckResult], first: Mapping[str, str]) -> list[str]:
    """Return every message once, with where it was first seen and how often it came."""
    from mitigate.testing.suite import own_error

    places: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: not row.bad):
        error = own_error(row.error)
        message = f"the error of {first[error]}" if error and first[error] != row.check else row.message
        if message:
            place = " ".join(part for part in (row.family, f"[{row.params}]" if row.params else "") if part)
            places.setdefault(message, []).append(place)
    lines = []
    for message, seen in places.items():
        more = f" (and {len(seen) - 1} more)" if len(seen) > 1 else ""
        everywhere = len(seen) == len(rows) or not seen[0]
        lines.append(message if everywhere else f"{seen[0]}{more}: {message}")
    return lines


def _summary(name: str, results: Sequence[CheckResult]) -> Text:
    checks = list(dict.fromkeys(row.check for row in results))
    bad = list(dict.fromkeys(row.check for row in results if row.bad))
    seconds = sum(row.seconds for row in results)
    spent = f"{len(checks)} checks, {len(results)} runs, {seconds:.1f} s"
    if not bad:
        return Text(f"{name} conforms: {spent}\n", style="green")
    again = " ".join(f"--check {check_name}" for check_name in bad[:3])
    return Text(
        f"{name} does not conform: {len(bad)} of {spent}; mend it and repeat `mitigate check {name} {again}`\n",
        style="bold red",
    )


def _as_json(name: str, results: Sequence[CheckResult]) -> dict[str, Any]:
    keys = [key.name for key in dataclasses.fields(results[0]) if key.name != "error"] if results else []
    return {
        "name": name,
        "conforms": not any(row.bad for row in results),
        "seconds": sum(row.seconds for row in results),
        "results": [{key: getattr(row, key) for key in keys} for row in results],
    }


def _catalogue() -> Table:
    from mitigate.testing.suite import catalogue

    table = Table("check", "runs", "rule", title="Checks, in their order: a method must ...", title_justify="left")
    for known in catalogue():
        runs = "once" if known.once else "per parameter set"
        table.add_row(known.name, f"{runs} and family" if known.needs_model else runs, Text(known.summary))
    return table
