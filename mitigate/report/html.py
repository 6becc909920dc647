"""``report.html``: one page with its pictures, plots, style and script inside it, and nothing from outside.

A model's answers, prompts and names of files and stacks are not trusted: the template escapes them, and the page's
content security policy lets nothing run but the one script whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mitigate.report.pictures import Album, Thumbnail, collect
from mitigate.report.plots import cost_plot, difference_plot
from mitigate.report.provenance import config_text, provenance
from mitigate.report.samples import Choice, ShownSample
from mitigate.report.sentences import sentences
from mitigate.report.tables import (
    breakdown_tables,
    cost_table,
    difference_tables,
    headline_tables,
    mcnemar_table,
    metric_tables,
)
from mitigate.runner.table import footnotes, number, resampled, size

if TYPE_CHECKING:
    from jinja2 import Template

    from mitigate.benchmarks.base import Benchmark


@dataclass(frozen=True)
class Sheet:
    """A picture with the samples about it that follow each other, numbered over the page."""

    image_id: str
    pictures: Sequence[Thumbnail]
    samples: Sequence[tuple[int, ShownSample]]


def render(
    comparison: Mapping[str, Any],
    choice: Choice,
    benchmark: Benchmark | None = None,
    *,
    title: str = "",
    command: str = "",
    judges: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return the page.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    choice
        Samples of the browser.
    benchmark
        Brings the pictures; ``None`` leaves them out.
    title
        Heading; the comparison's name by default.
    command
        Command line that made it.
    judges
        Who graded the answers of which stack.
    """
    from markupsafe import Markup

    album = Album({}, {}) if benchmark is None else collect(benchmark, (sample.record for sample in choice.shown))
    sheets = _sheets(choice, album)
    numbered = [sample for sheet in sheets for _, sample in sheet.samples]
    style, script = _part("style.css"), _part("browser.js")
    return _template().render(
        c=comparison,
        title=title or comparison["name"],
        size=size(comparison),
        resampled=resampled(comparison),
        summary=sentences(comparison),
        headlines=headline_tables(comparison),
        metrics=metric_tables(comparison),
        differences=difference_tables(comparison),
        mcnemar=mcnemar_table(comparison),
        cost=cost_table(comparison),
        footnotes=footnotes(comparison),
        plots=[plot for name in comparison["headline"] if (plot := difference_plot(comparison, name)) is not None],
        tradeoff=cost_plot(comparison),
        breakdowns=breakdown_tables(comparison),
        choice=choice,
        sheets=sheets,
        album=album,
        shows=_shows(comparison, numbered),
        tasks=sorted({sample.record.task for sample in numbered}),
        categories=_categories(numbered),
        facts=_facts(comparison, numbered),
        provenance=provenance(comparison, command, judges),
        config=config_text(comparison),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )


@cache
def _template() -> Template:
    """Return the page's template; compiling it takes longer than filling it in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mitigate.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("page.html.j2")


def _part(name: str) -> str:
    return files("mitigate.report").joinpath("page", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return a content security policy under which nothing is loaded, and nothing runs but this style and script."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script)
    )
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _sheets(choice: Choice, album: Album) -> list[Sheet]:
    """Put samples of one picture together, at the place of the first of them, and number them."""
    first: dict[str, int] = {}
    for place, sample in enumerate(choice.shown):
        first.setdefault(sample.record.image_id, place)
    ordered = sorted(choice.shown, key=lambda sample: first[sample.record.image_id])  # stable
    sheets = []
    for image_id, members in groupby(enumerate(ordered), key=lambda item: item[1].record.image_id):
        sheets.append(Sheet(image_id, album.pictures.get(image_id, []), list(members)))
    return sheets


def _shows(comparison: Mapping[str, Any], samples: Sequence[ShownSample]) -> list[str]:
    """Return what the samples can be filtered by; without a comparison nothing changed."""
    compared = comparison["baseline"] is not None and len(comparison["stacks"]) > 1
    failed = any("failed" in states for sample in samples for states in sample.states.values())
    return ["all", *(["changed", "fixed", "broken"] if compared else []), *(["failed"] if failed else [])]


def _categories(samples: Sequence[ShownSample]) -> dict[str, list[tuple[str, str]]]:
    """Return breakdown -> value and text of its options."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        for name, category in sample.categories.items():
            found.setdefault(name, set()).add(category)
    return {name: [(_key(name, each), each) for each in sorted(members)] for name, members in found.items()}


def _key(name: str, category: str) -> str:
    """Return one text for a breakdown's name and a category."""
    return f"{name}={category}"


def _facts(comparison: Mapping[str, Any], samples: Sequence[ShownSample]) -> dict[str, Any]:
    """Return what the filters need to know about every sample, in the order of the page."""
    return {
        "stacks": list(comparison["stacks"]),
        "baseline": comparison["baseline"],
        "samples": [
            {
                "id": sample.record.id,
                "task": sample.record.task,
                "categories": [_key(name, category) for name, category in sample.categories.items()],
                "states": {stack: list(states) for stack, states in sample.states.items()},
            }
            for sample in samples
        ],
    }
