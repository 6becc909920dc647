"""``report.md``: the report's text and tables for places that show Markdown; the sample browser is left to the page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mitigate.report.provenance import Part, config_text, provenance
from mitigate.report.sentences import sentences
from mitigate.report.tables import (
    Table,
    breakdown_tables,
    cost_table,
    difference_tables,
    headline_tables,
    mcnemar_table,
    metric_tables,
)
from mitigate.runner.table import footnotes, number, size

_SIGNS = re.compile(r"([\\`*_\[\]|~$^])")
#: What would begin a heading, list, quotation or rule.
_OPENING = re.compile(r"^(\d*)([#+\-=.)])")


def markdown(
    comparison: Mapping[str, Any],
    *,
    title: str = "",
    command: str = "",
    judges: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the report as Markdown; whatever a model or a user wrote is escaped.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    title, command, judges
        As for `mitigate.report.html.render`.
    """
    return "\n".join(_lines(comparison, title or comparison["name"], provenance(comparison, command, judges))) + "\n"


def _lines(comparison: Mapping[str, Any], title: str, parts: Sequence[Part]) -> Iterator[str]:
    benchmark = comparison["benchmark"]
    yield f"# {opening(title)}\n"
    yield (
        f"{size(comparison)} · model {escape(comparison['model'])} · benchmark {escape(benchmark['name'])} "
        f"(version {benchmark['version']}) · seed of the bootstrap {comparison['seed']}\n"
    )
    for sentence in sentences(comparison):
        yield f"{opening(sentence)}\n"
    for note in comparison["notes"]:
        yield f"> {opening(note)}\n"
    yield "## Results\n"
    for each in headline_tables(comparison):
        yield from _table(each)
    yield from _table(cost_table(comparison))
    for line in footnotes(comparison):
        yield f"* {opening(line)}"
    yield ""
    mcnemar = mcnemar_table(comparison)
    if mcnemar is not None:
        yield from _table(mcnemar)
    yield "## All metrics\n"
    for each in [*metric_tables(comparison), *difference_tables(comparison)]:
        yield from _table(each)
    breakdowns = breakdown_tables(comparison)
    if breakdowns:
        yield "## Breakdowns\n"
    for name, tables in breakdowns:
        yield f"### By {escape(name)}\n"
        for each in tables:
            yield from _table(each)
    yield from _effects(comparison)
    yield from _provenance(comparison, parts)


def _table(table: Table) -> Iterator[str]:
    yield f"{opening(table.title)}\n"
    heads = [escape(f"{column.group} {column.title}".strip()) for column in table.columns]
    yield f"| {' | '.join([escape(table.corner), *heads])} |"
    yield f"| --- |{' ---: |' * len(heads)}"
    for row in table.rows:
        cells = [column.cells[row] for column in table.columns]
        shown = [escape(f"{cell.text} {cell.interval}".strip()) for cell in cells]
        yield f"| {' | '.join([escape(row), *shown])} |"
    yield ""


def _effects(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield "## What each method did\n"
    for stack, data in comparison["stacks"].items():
        for method, counters in data["effects"]["methods"].items() if data["methods"] else ():
            shown = ", ".join(f"{escape(name.replace('_', ' '))} {_amount(value)}" for name, value in counters.items())
            yield f"* {opening(stack)}, {escape(method)}: {shown}"
    yield ""


def _amount(value: float | None) -> str:
    return number(value, 0 if value is not None and float(value).is_integer() else 3)


def _provenance(comparison: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[str]:
    yield "## Where the numbers come from\n"
    for part in parts:
        yield f"### {opening(part.title)}\n"
        for key, value in part.facts:
            yield f"* {opening(key)}: {escape(value)}"
        yield ""
    text = config_text(comparison)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"### Configuration\n\n{fence}json\n{text}\n{fence}"


def escape(text: object) -> str:
    """Return a text on one line that Markdown shows as it is: no tag, no emphasis, no link, no cell."""
    flat = " ".join(str(text).split())
    flat = html.escape("".join(char for char in flat if char.isprintable()), quote=False)
    # no links out of plain addresses
    return _SIGNS.sub(r"\\\1", flat).replace("://", ":&#47;/").replace("www.", "www&#46;")


def opening(text: object) -> str:
    """Return an escaped text that may begin a paragraph or item: no heading, list, quotation or rule."""
    return _OPENING.sub(lambda found: f"{found[1]}\\{found[2]}", escape(text))
