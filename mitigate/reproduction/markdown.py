"""``reproduction.md``: the table of published and measured numbers, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mitigate.reproduction.verdicts import MEANING
from mitigate.statistics import FEW_IMAGES

HEADINGS: Final = (
    "row", "column", "published", "measured here", "verdict", "published difference", "difference here", "verdict",
)  # fmt: skip


def as_markdown(data: Mapping[str, Any]) -> str:
    """Write the content of ``reproduction.json``."""
    parts = [
        f"# {data['experiment']}: {data['table']} of arXiv {data['arxiv']}",
        f'*{_escaped(data["paper"])}*. Columns headed "published" repeat the paper; all others were measured here.',
    ]
    used: list[str] = []
    for name, result in data["comparisons"].items():
        parts += _comparison(name, result)
        used += [verdict for row in rows_of(result) for verdict in (row[4], row[7])]
    known = [verdict for verdict in MEANING if verdict in used]
    if known:
        parts += ["## What a verdict says", "\n".join(f"* **{verdict}**: {MEANING[verdict]}" for verdict in known)]
    for heading, key in (("## About the table", "notes"), ("## Left out", "left_out")):
        if data[key]:
            parts += [heading, "\n".join(f"* {_escaped(line)}" for line in data[key])]
    return "\n\n".join(parts) + "\n"


def _comparison(name: str, result: Mapping[str, Any]) -> list[str]:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows_of(result)]
    notes = [f"* {_escaped(note)}" for note in notes_of(result)]
    parts = [f"## {_escaped(title_of(result))}", f"Folder: `{name}`", "\n".join(lines)]
    return [*parts, "\n".join(notes)] if notes else parts


def title_of(result: Mapping[str, Any]) -> str:
    """Return a comparison's heading: whose numbers are published, and what ran here on how much."""
    size = f"{result['samples']} samples of {result['images']} pictures"
    return f"{result['published_model']} in the paper, {result['measured_model']} here, {result['benchmark']} ({size})"


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a comparison as text, under `HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for cell in result["cells"]:
        difference = cell.get("difference")
        claimed = ("", "", "")
        if difference is not None:
            shown = _number(difference["published"], cell["decimals"], sign=True)
            claimed = (shown, _interval(difference["measured"], cell, sign=True), difference["verdict"])
        mark = "*" if cell["note"] else ""
        rows.append(
            (
                cell["row"],
                cell["column"],
                _number(cell["published"], cell["decimals"]) + mark,
                _interval(cell["measured"], cell),
                cell["verdict"] or "none drawn",
                *claimed,
            )
        )
    return rows


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences that belong under a comparison's table."""
    notes = []
    if result["other_model"]:
        notes.append(f"The published numbers are of another model ({result['other_model']}): no verdict is drawn.")
    if result.get("weights"):
        notes.append(f"Weights from {result['weights']}, taken to be those of {result['published_model']}.")
    if result["altered"]:
        notes.append(f"Not the full protocol: {', '.join(result['altered'])}. All numbers are of this try.")
    if result["images"] < FEW_IMAGES:
        notes.append(f"Only {result['images']} pictures: the intervals are too narrow, and verdicts mean little.")
    if result["left_out"]:
        notes.append(f"{result['left_out']} pictures are left out, because a sample failed.")
    notes.append(f"Differences are to the row of `{result['vanilla']}`, paired by picture, with 95 % intervals.")
    told: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["note"]:
            told.setdefault(cell["note"], []).append(f"{cell['row']} {cell['column']}")
    return [*notes, *(f"(*) {', '.join(cells)}: {note}" for note, cells in told.items())]


def _interval(measured: Mapping[str, float | None], cell: Mapping[str, Any], *, sign: bool = False) -> str:
    value, low, high = (measured[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "–"
    digits = cell["decimals"] + 1
    return f"{_number(value, digits, sign=sign)} [{_number(low, digits)}, {_number(high, digits)}]"


def _number(value: float, decimals: int, *, sign: bool = False) -> str:
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>])", r"\\\1", text)
