"""``report.html``: one page without scripts and outside resources; pictures, plots and styles are inside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.jsonfiles import write_text
from mitigate.report.plots import cost_plot, difference_plot
from mitigate.runner.table import Column, columns, footnotes, number, units

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.report.examples import Example

#: Pictures are shown at about this many pixels; small ones are enlarged without smoothing.
SHOWN_PIXELS = 256


def write_report(path: Path, comparison: Mapping[str, Any], examples: Sequence[Example], *, command: str = "") -> None:
    """Write the report of a comparison.

    Parameters
    ----------
    path
        File to write; replaced in one step.
    comparison
        Content of ``comparison.json``.
    examples
        Pictures to show, with every stack's marked replies.
    command
        Command line that made it.
    """
    write_text(path, render(comparison, examples, command=command))


def render(comparison: Mapping[str, Any], examples: Sequence[Example], *, command: str = "") -> str:
    """Return the report as HTML; everything that a model or a user wrote is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mitigate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    made = columns(comparison)
    sections = {section: [column for column in made if column.section == section] for section in _SECTIONS}
    return environment.get_template("template.html.j2").render(
        c=comparison,
        summary=summary(comparison),
        sections=sections,
        families=_families(sections["quality"], comparison["metrics"]),
        footnotes=footnotes(comparison),
        differences=[
            plot for name in comparison["headline"] if (plot := difference_plot(comparison, name)) is not None
        ],
        tradeoff=cost_plot(comparison),
        examples=[_example(example) for example in examples],
        config=json.dumps(comparison["config"], indent=2, ensure_ascii=False),
        command=command,
    )


_NOT_CLEAR = "No difference beyond the 95 % interval"
_UNCORRECTED = " (beyond the 95 % interval, uncorrected)"
_SECTIONS = ("quality", "difference", "test", "cost", "effect")


def _families(quality: Sequence[Column], metrics: Mapping[str, Any]) -> list[tuple[str, list[Column]]]:
    """Split the quality columns into one table per family of metrics, each with its caption."""
    families: dict[str, list[Column]] = {}
    for column in quality:
        family, _, part = column.group.partition("\n")
        families.setdefault(family, []).append(replace(column, group=part))
    return [(_caption(family, members, metrics), members) for family, members in families.items()]


def _caption(family: str, members: Sequence[Column], metrics: Mapping[str, Any]) -> str:
    parts = [family, units([metrics[column.metric] for column in members])]
    text = ": ".join(part for part in parts if part) or "Results"
    return f"{text[0].upper()}{text[1:]}; with 95 % intervals (bootstrap over pictures)"


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """Say in one sentence per headline metric which stacks differ from the baseline beyond their interval."""
    baseline = comparison["baseline"]
    if baseline is None or len(comparison["stacks"]) < 2:
        return []
    sentences = []
    for name in comparison["headline"]:
        metric = comparison["metrics"][name]
        unit = 100.0 if metric["percent"] else 1.0
        value = comparison["stacks"][baseline]["metrics"][name]["value"]
        groups: dict[str, list[str]] = {"Better": [], "Worse": [], "Different": [], _NOT_CLEAR: []}
        for stack, data in comparison["stacks"].items():
            difference = data["differences"].get(name)
            if difference is None:
                continue
            verdict = _verdict(metric, difference)
            groups[verdict].append(stack if verdict == _NOT_CLEAR else f"{stack} ({_amount(difference, unit)})")
        shown = "undefined" if value is None else number(unit * value)
        parts = [
            f"{verdict}{'' if verdict == _NOT_CLEAR else _UNCORRECTED}: {', '.join(stacks)}."
            for verdict, stacks in groups.items()
            if stacks
        ]
        sentences.append(" ".join([f"{metric['title']} is {shown} with {baseline}.", *parts]))
    return sentences


def _amount(difference: Mapping[str, Any], unit: float) -> str:
    """Return a difference, with what is left of its surprise when all stacks are counted."""
    value, p = difference["value"], difference.get("p_holm")
    parts = ["" if value is None else number(unit * value, sign=True)]
    if p is not None and p == p:
        parts.append(f"Holm-corrected p {'< 0.001' if p < 0.001 else f'= {number(p, 3)}'}")
    return ", ".join(part for part in parts if part)


def _verdict(metric: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    if not difference["excludes_zero"]:
        return _NOT_CLEAR
    if metric["higher_is_better"] is None:
        return "Different"
    return "Better" if (difference["value"] > 0) == metric["higher_is_better"] else "Worse"


def _example(example: Example) -> dict[str, Any]:
    """Return a picture and its replies; stacks with one and the same reply share a line."""
    entries = []
    for entry in example.entries:
        lines: list[dict[str, Any]] = []
        for stack, spans in entry.spans.items():
            same = next((line for line in lines if line["spans"] == list(spans)), None)
            if same is None:
                lines.append({"stacks": [stack], "spans": list(spans)})
            else:
                same["stacks"].append(stack)
        entries.append({"sample": entry.sample, "lines": lines})
    return {
        "image_id": example.image_id,
        "pictures": [_picture(picture) for picture in example.pictures],
        "entries": entries,
    }


def _picture(picture: Image) -> dict[str, Any]:
    """Return a picture as a data address; large photographs are scaled down, small ones left to the browser."""
    shown = picture.convert("RGB")
    if max(shown.size) > 2 * SHOWN_PIXELS:
        shown.thumbnail((2 * SHOWN_PIXELS, 2 * SHOWN_PIXELS))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"url": f"data:image/png;base64,{data}", "pixelated": max(picture.size) < SHOWN_PIXELS}
