"""The result table: columns made once from a comparison's numbers, drawn by the terminal and by the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

#: Width of the tables where the output has no terminal to measure.
PLAIN_WIDTH = 140
#: So many metrics of one unit are named; more are "all others".
_NAMED = 2
#: Longer parts of a metric's name are cut to three letters in headings.
_PART_WIDTH = 6
_SHORT = {"accuracy": "acc.", "yes-rate": "yes"}
BETTER, WORSE, FLAG = "better", "worse", "flag"
_STYLES = {BETTER: "bold green", WORSE: "bold red", FLAG: "bold yellow", "": ""}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table.

    Parameters
    ----------
    text
        The number as printed; a difference that excludes zero ends in ``*``.
    interval
        Its 95 % interval as ``[low, high]``, or empty.
    tone
        ``better``, ``worse``, ``flag`` or empty.
    """

    text: str
    interval: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column over all stacks.

    Parameters
    ----------
    section
        Which part of the table: ``quality``, ``difference``, ``cost``, ``failures`` or ``effect``.
    group, title
        Header lines; the group is what neighbouring columns share.
    metric
        Name of the metric it shows; empty for others.
    inline
        Whether the terminal prints the interval too (the report always does).
    cells
        Stack -> cell.
    """

    section: str
    group: str
    title: str
    metric: str = ""
    inline: bool = False
    cells: Mapping[str, Cell] = field(default_factory=dict)

    def lines(self, stack: str) -> str:
        """Return what the terminal prints for a stack."""
        cell = self.cells[stack]
        return f"{cell.text} {cell.interval}" if self.inline and cell.interval else cell.text

    def width(self) -> int:
        """Return the width the column needs in a terminal."""
        return max(map(len, (*self.group.splitlines(), self.title, *map(self.lines, self.cells))))


def columns(comparison: Mapping[str, Any]) -> list[Column]:
    """Make the columns of a comparison: quality, paired differences, cost, effects.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    """
    stacks: Mapping[str, Any] = comparison["stacks"]
    made = [
        Column(
            section="quality",
            group=_group(name, metric),
            title=_SHORT.get(metric["short"], metric["short"]),
            metric=name,
            cells={stack: value_cell(metric, data["metrics"][name]) for stack, data in stacks.items()},
        )
        for name, metric in comparison["metrics"].items()
    ]
    if comparison["baseline"] is not None:
        made += [
            Column(
                section="difference",
                group=f"difference\nto {comparison['baseline']}, 95 %",
                title=comparison["metrics"][name]["title"],
                inline=True,
                cells={
                    stack: difference_cell(comparison["metrics"][name], data["differences"].get(name))
                    for stack, data in stacks.items()
                },
            )
            for name in comparison["headline"]
        ]
    made += [_numbers(stacks, *definition) for definition in _COST_AND_EFFECTS]
    if any(data["failures"] for data in stacks.values()):
        made.append(_numbers(stacks, "failures", "samples", "failed", _failed))
    return made + [
        Column(
            section="effect",
            group=group,
            title=title,
            cells={stack: _did(data, number(_effect(data, counted), 2)) for stack, data in stacks.items()},
        )
        for counted, group, title in _WHERE_IT_HAPPENED
        if any(_effect(data, counted) for data in stacks.values())
    ]


def p_text(value: float | None) -> str:
    """Format a p-value; very small ones by their bound."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, 3)


def print_table(comparison: Mapping[str, Any], console: Console) -> None:
    """Print the table, folded into as many blocks with the same rows as the width asks for."""
    width = console.width if console.is_terminal else PLAIN_WIDTH
    details = [name for name, metric in comparison["metrics"].items() if metric.get("detail")]
    made = [column for column in columns(comparison) if column.metric not in details]
    name_width = max(len("stack"), *(len(name) for name in comparison["stacks"]))
    title: str | None = (
        f"{comparison['name']}: {size(comparison)}, model {comparison['model']}; "
        f"{units(comparison['metrics'].values())}"
    )
    for block in _blocks(made, width - name_width - 4):
        table = Table(
            title=title and Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False
        )
        table.add_column("stack", no_wrap=True)
        for column in block:
            heading = "\n".join([*column.group.splitlines(), column.title])
            table.add_column(Text(heading, justify="right"), justify="right", vertical="bottom", no_wrap=True)
        for stack in comparison["stacks"]:
            cells = [Text(column.lines(stack), style=_STYLES[column.cells[stack].tone]) for column in block]
            table.add_row(Text(stack), *cells)
        console.print(table, width=width, crop=False, no_wrap=True, overflow="ignore")
        console.print()
        title = None
    more = ", ".join(dict.fromkeys(comparison["metrics"][name]["short"] for name in details))
    for line in [*footnotes(comparison), *([f"Also in the report and in comparison.json: {more}."] if more else [])]:
        console.print(Text(line), width=width, crop=False)


def size(comparison: Mapping[str, Any]) -> str:
    """Say how much was asked, and with which seeds if there are several."""
    seeds = sorted({seed for data in comparison["stacks"].values() for seed in data["seeds"]})
    several = f" and seed (seeds {', '.join(map(str, seeds))})" if len(seeds) > 1 else ""
    groups = f" in {comparison['n_clusters']} groups" if resampled(comparison) != "pictures" else ""
    return f"{comparison['n_images']} pictures{groups}, {comparison['n_samples']} answers per stack{several}"


def resampled(comparison: Mapping[str, Any]) -> str:
    """Name what the bootstrap draws: pictures, or groups of them that count together."""
    return "pictures" if comparison.get("n_clusters", comparison["n_images"]) == comparison["n_images"] else "groups"


def units(metrics: Iterable[Mapping[str, Any]]) -> str:
    """Say what the numbers of some metrics are: rates in percent, and the unit of every other one by name."""
    metrics = list(metrics)
    rates = ["rates in %"] if any(metric["percent"] for metric in metrics) else []
    plain = dict.fromkeys((metric["title"], metric.get("unit", "")) for metric in metrics if not metric["percent"])
    by_unit: dict[str, list[str]] = {}
    for title, unit in plain:
        if unit and unit not in title.split():  # a title that names its unit says enough
            # one that begins with an abbreviation keeps its capitals
            by_unit.setdefault(unit, []).append(title if title[1:2].isupper() else title[0].lower() + title[1:])
    named = [
        f"all others in {unit}" if len(titles) > _NAMED and len(by_unit) == 1 else f"{', '.join(titles)} in {unit}"
        for unit, titles in by_unit.items()
    ]
    return ", ".join([*rates, *named])


def footnotes(comparison: Mapping[str, Any]) -> list[str]:
    """Return the sentences under the table: what the marks mean, who did nothing, what the numbers are not."""
    lines = []
    if comparison["baseline"] is not None and len(comparison["stacks"]) > 1:
        lines.append(
            f"* the paired 95 % interval of the difference to {comparison['baseline']} excludes zero "
            f"(bootstrap over {resampled(comparison)}, no correction for several stacks)."
        )
        if least := _least_differences(comparison):
            lines.append(f"The smallest difference these samples could have shown (power 80 %): {least}.")
    for stack, data in comparison["stacks"].items():
        lines += [f"! {stack}: {note}" for kind in ("warnings", "notes") for note in data[kind]]
    return lines + list(comparison["notes"])


def _least_differences(comparison: Mapping[str, Any]) -> str:
    """Return the minimum detectable effects of the headline metrics, over all stacks."""
    told = []
    for name in comparison["headline"]:
        metric = comparison["metrics"][name]
        found = [data["differences"][name]["mde"] for data in comparison["stacks"].values() if data["differences"]]
        known = sorted(_scale(metric) * value for value in found if value)
        if known:
            low, high = number(known[0]), number(known[-1])
            told.append(f"{metric['title']} {low if low == high else f'{low} to {high}'}")
    return ", ".join(told)


def number(value: float | str | None, digits: int = 1, *, sign: bool = False) -> str:
    """Format a number for a table; undefined ones (``None`` or not a number) as a dash, infinite ones by their sign."""
    if value is None or value != value:
        return "–"
    value = float(value)  # JSON has no infinities: they come as text
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    value = round(value, digits) or 0.0  # no "-0.0"
    text = f"{value:+.{digits}f}" if sign and value else f"{value:.{digits}f}"
    return text.replace("-", "−")


def _group(name: str, metric: Mapping[str, Any]) -> str:
    """Return what a metric called ``family/part/statistic`` shares with its neighbours; empty for other names."""
    if "/" not in name:
        return ""
    part = "/".join(name.split("/")[1:-1])
    return f"{metric['title'].split()[0]}\n{part if len(part) <= _PART_WIDTH else f'{part[:3]}.'}"


def _scale(metric: Mapping[str, Any]) -> float:
    return 100.0 if metric["percent"] else 1.0


def value_cell(metric: Mapping[str, Any], interval: Mapping[str, float | None]) -> Cell:
    """Return a metric's value with its interval."""
    factor = _scale(metric)
    value, low, high = (_times(interval[key], factor) for key in ("value", "low", "high"))
    return Cell(text=number(value), interval="" if low is None else f"[{number(low)}, {number(high)}]")


def difference_cell(metric: Mapping[str, Any], difference: Mapping[str, Any] | None) -> Cell:
    """Return a paired difference with its interval, starred where that excludes zero; empty where there is none."""
    if difference is None:
        return Cell(text="")
    factor = _scale(metric)
    value, low, high = (_times(difference[key], factor) for key in ("value", "low", "high"))
    tone = ""
    if difference["excludes_zero"] and value is not None and metric["higher_is_better"] is not None:
        tone = BETTER if (value > 0) == metric["higher_is_better"] else WORSE
    star = "*" if difference["excludes_zero"] else ""
    return Cell(
        text=number(value, sign=True) + star,
        interval="" if low is None else f"[{number(low, sign=True)}, {number(high, sign=True)}]",
        tone=tone,
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _did(data: Mapping[str, Any], text: str) -> Cell:
    return Cell(text=text, tone=FLAG if data["effects"]["idle"] else "")


#: Section, header lines, and how a stack's entry becomes a cell.
_COST_AND_EFFECTS: list[tuple[str, str, str, Callable[[Mapping[str, Any]], Cell]]] = [
    ("cost", "ms", "/token", lambda data: Cell(text=number(data["cost"]["ms_per_token"], 2))),
    ("cost", "time", "ratio", lambda data: Cell(text=_ratio(data["cost"]["overhead"]))),
    ("effect", "texts", "changed", lambda data: Cell(text=_percent(data["effects"]["texts_changed"]))),
    ("effect", "rows", "edited", lambda data: _did(data, _percent(data["effects"]["rows_edited_share"]))),
    ("effect", "rejections", "/token", lambda data: _did(data, number(data["effects"]["rejections_per_token"], 2))),
    (
        "effect",
        "extra forwards",
        "/token",
        lambda data: Cell(text=number(data["effects"]["extra_forwards_per_token"], 2)),
    ),
    (
        "effect",
        "extra backwards",
        "/token",
        lambda data: Cell(text=number(data["effects"]["extra_backwards_per_token"], 2)),
    ),
]


#: Effects of methods that only some stacks have, with their header lines: shown where there are any.
_WHERE_IT_HAPPENED = (
    ("tokens_edited_per_sample", "states edited", "/sample"),
    ("steps_edited_per_token", "logits edited", "/token"),
    ("tokens_changed_per_token", "tokens changed", "/token"),
)


def _failed(data: Mapping[str, Any]) -> Cell:
    return Cell(text=str(data["failures"]), tone=FLAG if data["failures"] else "")


def _effect(data: Mapping[str, Any], name: str) -> float | None:
    """Return one of a stack's effects; comparisons of older versions lack some."""
    value: float | None = data["effects"].get(name, 0.0)
    return value


def _numbers(
    stacks: Mapping[str, Any], section: str, group: str, title: str, cell: Callable[[Mapping[str, Any]], Cell]
) -> Column:
    return Column(
        section=section, group=group, title=title, cells={stack: cell(data) for stack, data in stacks.items()}
    )


def _ratio(value: float | None) -> str:
    return number(value, 2) + ("×" if value is not None else "")


def _percent(value: float | None) -> str:
    return number(_times(value, 100.0))


def _blocks(made: list[Column], width: int) -> list[list[Column]]:
    """Fold columns into blocks that fit; where all do not fit in one, the differences start a new block."""
    if sum(column.width() + 2 for column in made) <= width:
        return [made]
    blocks: list[list[Column]] = [[]]
    left = width
    for before, column in zip([None, *made[:-1]], made, strict=True):
        needed = column.width() + 2
        opens = before is not None and before.section == "quality" != column.section
        if blocks[-1] and (needed > left or opens):
            blocks.append([])
            left = width
        blocks[-1].append(column)
        left -= needed
    return blocks
