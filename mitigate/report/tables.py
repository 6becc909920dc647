"""The tables of a report, as plain cells: the page, Markdown and LaTeX draw the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mitigate.report.sentences import beside, unit_of
from mitigate.runner.table import Cell, Column, columns, difference_cell, number, p_text, resampled, units, value_cell

#: What `breakdowns` adds to the benchmark's own metrics.
_WRONG = {"title": "Wrong answers", "percent": True, "higher_is_better": False}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Parameters
    ----------
    title
        What it is, with the units.
    corner
        Heading of the column of row names.
    rows
        Names of the rows.
    columns
        Columns with a cell for every row.
    """

    title: str
    corner: str = "stack"
    rows: Sequence[str]
    columns: Sequence[Column] = field(default_factory=list)


def headline_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return one table per headline metric: value, paired difference, tests, and beside them length and yes-rate."""
    stacks = comparison["stacks"]
    paired = comparison["baseline"] is not None and len(stacks) > 1
    return [
        Table(
            title=f"{comparison['metrics'][name]['title']}: {units([comparison['metrics'][name]]) or 'values'}, "
            "with 95 % intervals",
            rows=list(stacks),
            columns=_headline(name, comparison, paired=paired),
        )
        for name in comparison["headline"]
    ]


def _headline(name: str, comparison: Mapping[str, Any], *, paired: bool) -> list[Column]:
    stacks, metric = comparison["stacks"], comparison["metrics"][name]
    made = [_column("", metric["title"], lambda data: value_cell(metric, data["metrics"][name]), stacks)]
    if paired:
        made += _tests(name, metric, comparison)
    for other in beside(comparison, name):
        made += _context(other, comparison, paired=paired)
    if any(name in data.get("seed_spread", {}) for data in stacks.values()):
        factor = 100.0 if metric["percent"] else 1.0

        def spread(data: Mapping[str, Any]) -> Cell:
            found = data["seed_spread"].get(name)
            return Cell(text=number(None if found is None else factor * found))

        made.insert(1, _column("deviation", "over seeds", spread, stacks))
    return made + _section(comparison, "failures")


def _tests(name: str, metric: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[Column]:
    """Return what a paired comparison says about one metric."""
    stacks = comparison["stacks"]
    factor = 100.0 if metric["percent"] else 1.0

    def of(make: Callable[[Mapping[str, Any]], Cell]) -> Callable[[Mapping[str, Any]], Cell]:
        return lambda data: make(data["differences"][name]) if name in data["differences"] else Cell(text="")

    def least(item: Mapping[str, Any]) -> Cell:
        return Cell(text=number(factor * item["mde"] if item.get("mde") else None))  # none where nothing varies

    return [
        _column("difference to", comparison["baseline"], of(lambda item: difference_cell(metric, item)), stacks),
        _column("p", "uncorrected", of(lambda item: Cell(text=p_text(item["p"]))), stacks),
        _column("p", "Holm", of(lambda item: Cell(text=p_text(item.get("p_holm")))), stacks),
        _column("effect", "size", of(lambda item: Cell(text=number(item.get("effect_size"), 2, sign=True))), stacks),
        _column("smallest", "detectable", of(least), stacks),
    ]  # fmt: skip


def _context(name: str, comparison: Mapping[str, Any], *, paired: bool) -> list[Column]:
    metric, stacks = comparison["metrics"][name], comparison["stacks"]
    title, unit = metric["title"], unit_of(metric).strip() or "value"
    made = [_column(title, unit, lambda data: value_cell(metric, data["metrics"][name]), stacks)]
    if paired:
        made.append(
            Column(
                section="report",
                group=title,
                title="difference",
                cells={stack: difference_cell(metric, data["differences"].get(name)) for stack, data in stacks.items()},
            )
        )
    return made


def metric_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return the values of all metrics, one table per family."""
    families: dict[str, list[Column]] = {}
    for column in _section(comparison, "quality"):
        family, _, part = column.group.partition("\n")
        families.setdefault(family, []).append(replace(column, group=part))
    return [
        Table(title=_caption(family, members, comparison), rows=list(comparison["stacks"]), columns=members)
        for family, members in families.items()
    ]


def difference_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return the paired differences of all metrics, one table per family; none where nothing is compared."""
    stacks = {stack: data for stack, data in comparison["stacks"].items() if data["differences"]}
    if not stacks:
        return []
    families: dict[str, list[Column]] = {}
    for column in _section(comparison, "quality"):
        name = column.metric
        if not any(name in data["differences"] for data in stacks.values()):
            continue
        family, _, part = column.group.partition("\n")
        metric = comparison["metrics"][name]
        cells = {stack: difference_cell(metric, data["differences"].get(name)) for stack, data in stacks.items()}
        families.setdefault(family, []).append(replace(column, group=part, cells=cells))
    return [
        Table(
            title=f"{family + ': d' if family else 'D'}ifference to {comparison['baseline']} "
            "(rates in percentage points), with 95 % intervals, not corrected",
            rows=list(stacks),
            columns=members,
        )
        for family, members in families.items()
    ]


def cost_table(comparison: Mapping[str, Any]) -> Table:
    """Return what the stacks cost, and what their methods did."""
    made = [*_section(comparison, "cost"), *_section(comparison, "effect")]
    return Table(title="Cost, and what the methods did", rows=list(comparison["stacks"]), columns=made)


def mcnemar_table(comparison: Mapping[str, Any]) -> Table | None:
    """Return McNemar's exact test over right and wrong answers; ``None`` where no answer is either."""
    stacks = {stack: data["mcnemar"] for stack, data in comparison["stacks"].items() if data["mcnemar"]}
    if not stacks:
        return None
    made = [
        _column("answers", "made right", lambda item: Cell(text=str(item["only_second"])), stacks),
        _column("answers", "made wrong", lambda item: Cell(text=str(item["only_first"])), stacks),
        _column("odds", "ratio", lambda item: Cell(text=number(item.get("odds_ratio"), 2)), stacks),
        _column("p", "McNemar", lambda item: Cell(text=p_text(item["p"])), stacks),
    ]
    title = f"Right and wrong answers against {comparison['baseline']} (exact McNemar test over single answers)"
    return Table(title=title, rows=list(stacks), columns=made)


def breakdown_tables(comparison: Mapping[str, Any]) -> list[tuple[str, list[Table]]]:
    """Return the breakdowns: name -> one table per metric, the categories with most samples first."""
    return [
        (name, tables)
        for name, categories in comparison.get("breakdowns", {}).items()
        if (tables := _breakdown(name, categories, comparison))
    ]


def _breakdown(name: str, categories: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[Table]:
    ordered = dict(sorted(categories.items(), key=lambda item: (-item[1]["n"], item[0])))
    metrics = dict.fromkeys(
        metric for category in ordered.values() for own in category["stacks"].values() for metric in own
    )
    tables = []
    for metric_name in metrics:
        metric = comparison["metrics"].get(metric_name, _WRONG)
        rows = {
            row: category
            for row, category in ordered.items()
            if any(metric_name in own for own in category["stacks"].values())
        }
        made = [
            _column("", "samples", lambda item: Cell(text=str(item["n"])), rows),
            _column("", "pictures", lambda item: Cell(text=str(item["images"])), rows),
        ]
        for stack in comparison["stacks"]:
            made += _of_stack(stack, metric_name, metric, rows, baseline=comparison["baseline"])
        title = f"{metric['title']} by {name}{', %' if metric['percent'] else ''}; intervals are not corrected"
        tables.append(Table(title=title, corner=name, rows=list(rows), columns=made))
    return tables


def _of_stack(
    stack: str, name: str, metric: Mapping[str, Any], rows: Mapping[str, Any], *, baseline: str | None
) -> list[Column]:
    factor = 100.0 if metric["percent"] else 1.0

    def value(item: Mapping[str, Any]) -> Cell:
        found = item["stacks"].get(stack, {}).get(name, {}).get("value")
        return Cell(text=number(None if found is None else factor * found))

    def difference(item: Mapping[str, Any]) -> Cell:
        found = item["stacks"].get(stack, {}).get(name, {}).get("difference")
        if found is None:
            return Cell(text="")
        low, high = found["low"], found["high"]
        clear = low is not None and high is not None and (low > 0 or high < 0)
        return difference_cell(metric, {**found, "excludes_zero": clear})

    made = [_column(stack, "value", value, rows)]
    if baseline is not None and stack != baseline:
        made.append(_column(stack, "difference", difference, rows))
    return made


def _column(group: str, title: str, cell: Callable[[Any], Cell], rows: Mapping[str, Any]) -> Column:
    return Column(
        section="report", group=group, title=title, cells={row: cell(content) for row, content in rows.items()}
    )


def _section(comparison: Mapping[str, Any], section: str) -> list[Column]:
    return [column for column in columns(comparison) if column.section == section]


def _caption(family: str, members: Sequence[Column], comparison: Mapping[str, Any]) -> str:
    parts = [family, units([comparison["metrics"][column.metric] for column in members])]
    text = ": ".join(part for part in parts if part) or "Results"
    return f"{text[0].upper()}{text[1:]}; with 95 % intervals (bootstrap over {resampled(comparison)})"
