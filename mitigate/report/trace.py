"""What ``mitigate trace`` writes: ``trace.json``, pictures with overlays, and one self-contained ``trace.html``."""

from __future__ import annotations

import base64
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mitigate.jsonfiles import write_json, write_text
from mitigate.report import overlays
from mitigate.report.trace_text import INDEX_LISTS, Known, Section, sections

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.metrics.base import Array

#: Method key of the watch whose ``attention`` the timeline shows.
WATCH = "attention"


@dataclass(frozen=True)
class Answer:
    """One answer: its text, token ids and the characters each token added."""

    text: str
    tokens: Sequence[int]
    texts: Sequence[str]


@dataclass(frozen=True)
class Raster:
    """Where one picture (or its whole-picture thumbnail) lies among the key columns.

    Parameters
    ----------
    columns
        Key columns of its patches in raster order.
    grid
        Rows and columns of the raster.
    picture
        What the model saw, or the picture as given where that cannot be restored (``exact`` is False).
    """

    columns: Sequence[int]
    grid: tuple[int, int]
    picture: Image
    exact: bool = True


@dataclass(frozen=True)
class Traced:
    """Everything about one traced answer.

    Parameters
    ----------
    about
        Model, stack, prompt, settings; plain JSON.
    plain, stacked
        The answers without and with the stack.
    records
        Trace records of the sample: ``method``, ``phase``, ``step``, ``layer``, ``values``.
    known
        What is needed to read them.
    rasters
        The pictures.
    telemetry
        What the methods counted.
    notes
        Sentences for the reader.
    """

    about: Mapping[str, Any]
    plain: Answer
    stacked: Answer
    records: Sequence[Mapping[str, Any]]
    known: Known
    rasters: Sequence[Raster]
    telemetry: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def methods(self) -> list[Mapping[str, Any]]:
        """Records of the stack's methods, without the attention watch."""
        return [record for record in self.records if record["method"] != WATCH]

    def sections(self, *, every: bool = False) -> list[Section]:
        """Return the readable account."""
        return sections(self.methods, self.known, every=every)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the pixels."""
        answers = {name: vars(answer) for name, answer in (("plain", self.plain), ("stacked", self.stacked))}
        pictures = [{"columns": list(item.columns), "grid": list(item.grid)} for item in self.rasters]
        return {
            **self.about,
            "answers": answers,
            "prompt_length": self.known.prompt_length,
            "pictures": pictures,
            "records": list(self.records),
            "telemetry": self.telemetry,
            "notes": list(self.notes),
        }


def differences(one: Answer, other: Answer) -> tuple[list[bool], list[bool]]:
    """Say for the tokens of two answers which have no counterpart in the other."""
    match = difflib.SequenceMatcher(None, list(one.tokens), list(other.tokens), autojunk=False)
    marks = ([True] * len(one.tokens), [True] * len(other.tokens))
    for block in match.get_matching_blocks():
        for offset in range(block.size):
            marks[0][block.a + offset] = marks[1][block.b + offset] = False
    return marks


def spans(answer: Answer, marks: Sequence[bool]) -> list[tuple[str, bool]]:
    """Join an answer's tokens into pieces of text with one mark each."""
    joined: list[tuple[str, bool]] = []
    for text, mark in zip(answer.texts, marks, strict=True):
        if joined and joined[-1][1] == mark:
            joined[-1] = (joined[-1][0] + text, mark)
        elif text:
            joined.append((text, mark))
    return joined


def write(folder: Path, traced: Traced, *, every: bool = False) -> list[Path]:
    """Write JSON, overlays and the page; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = overlay_sheets(traced)
    files = [folder / "trace.json"]
    write_json(files[0], traced.as_json())
    for name, (_, picture) in pictures.items():
        files.append(folder / f"{name}.png")
        picture.save(files[-1])
    files.append(folder / "trace.html")
    write_text(files[-1], render(traced, pictures, every=every))
    return files


# ---------------------------------------------------------------------------------------------------------- overlays


def overlay_sheets(traced: Traced) -> dict[str, tuple[str, Image]]:
    """Draw every value that lies over the key columns on the pictures: file name -> title and picture."""
    sheets: dict[str, tuple[str, Image]] = {}
    for number, raster in enumerate(traced.rasters):
        suffix = f"-picture{number + 1}" if len(traced.rasters) > 1 else ""
        ground = "what the model saw" if raster.exact else "the picture as given; the model saw another crop"
        base = (ground, overlays.enlarged(raster.picture))
        for (method, name), steps in columns_of(traced, raster).items():
            panels = [base, *_panels(name, steps, raster)]
            sheets[f"overlay-{method}-{name}{suffix}"] = (f"{method}: {name.replace('_', ' ')}", overlays.sheet(panels))
    return sheets


def columns_of(traced: Traced, raster: Raster) -> dict[tuple[str, str], dict[int, Array]]:
    """Collect values over a picture's patches: (method, value) -> step -> ``[N]``, mean over layers.

    Boolean values become shares of layers, lists of columns become ones.
    """
    found: dict[tuple[str, str], dict[int, list[Array]]] = {}
    for record in traced.records:
        for name, value in record["values"].items():
            patches = _over_patches(name, value, record["step"], traced.known, raster)
            if patches is not None:
                steps = found.setdefault((record["method"], name), {})
                steps.setdefault(record["step"], []).append(patches)
    return {
        key: {step: np.mean(parts, axis=0) for step, parts in steps.items()}
        for key, steps in found.items()
        if any(np.any(part) for parts in steps.values() for part in parts)
    }


def _over_patches(name: str, value: Any, step: int, known: Known, raster: Raster) -> Array | None:
    if name in INDEX_LISTS and isinstance(value, list | tuple):
        listed = set(value)
        return None if name == "owners" else np.array([float(column in listed) for column in raster.columns])
    if not known.is_over_columns(value, step):
        return None
    return np.array([float(value[column] or 0.0) for column in raster.columns])


def _panels(name: str, steps: Mapping[int, Array], raster: Raster) -> list[tuple[str, Image]]:
    """First step, and the mean of the steps where there are several."""
    first = min(steps)
    title = name.replace("_", " ")
    values = {f"{title}, step {first}": steps[first]}
    if len(steps) > 1:
        values[f"{title}, mean of {len(steps)} steps"] = np.mean(list(steps.values()), axis=0)
    drawn = []
    for caption, value in values.items():
        if set(np.unique(value)) <= {0.0, 1.0}:
            drawn.append((f"{caption}: {int(value.sum())}", overlays.marked(raster.picture, value > 0, raster.grid)))
        else:
            text = f"{caption} (max {value.max():.3g})"
            drawn.append((text, overlays.over(raster.picture, value, raster.grid)))
    return drawn


# --------------------------------------------------------------------------------------------------------- the page


def render(traced: Traced, pictures: Mapping[str, tuple[str, Image]], *, every: bool = False) -> str:
    """Return the page; whatever a model or a user wrote is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mitigate.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    before, after = differences(traced.plain, traced.stacked)
    return environment.get_template("trace.html.j2").render(
        t=traced,
        plain=spans(traced.plain, before),
        stacked=spans(traced.stacked, after),
        sections=traced.sections(every=every),
        timeline=_timeline(traced, after),
        ground=_data(traced.rasters[0].picture) if traced.rasters else "",
        ratio=_ratio(traced),
        pictures=[{"title": title, "url": _data(picture)} for title, picture in pictures.values()],
    )


def _timeline(traced: Traced, marks: Sequence[bool]) -> list[dict[str, Any]]:
    """One entry per token: text, whether it differs, its attention map and its share of attention on the picture."""
    maps: dict[int, Array] = {}
    if traced.rasters:
        maps = columns_of(traced, traced.rasters[0]).get((WATCH, WATCH), {})
    top = max((float(value.max()) for value in maps.values()), default=0.0)
    entries = []
    for step, (text, mark) in enumerate(zip(traced.stacked.texts, marks, strict=True)):
        entry: dict[str, Any] = {"step": step, "text": text.strip() or "∎", "mark": mark, "map": "", "mass": ""}
        if step in maps:
            entry["map"] = _data(overlays.heat(maps[step], traced.rasters[0].grid, top=top))
            entry["mass"] = f"{100 * float(maps[step].sum()):.0f} %"
        entries.append(entry)
    return entries


def _ratio(traced: Traced) -> str:
    if not traced.rasters:
        return "1 / 1"
    return "{} / {}".format(*traced.rasters[0].picture.size)


def _data(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
