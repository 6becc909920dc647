"""Traces as text: one line per step, or per step and layer; knows names and shapes of values, not methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

#: Values that list key columns by index.
INDEX_LISTS: Final = ("sources", "neighbours", "owners")
ABBREVIATED: Final = {"probabilities": "p", "saliency": "S"}
CANDIDATES, PLACE = "candidates", "chosen_place"


@dataclass(frozen=True)
class Known:
    """What is needed to read values: words of token ids, and what lies in which key column.

    Parameters
    ----------
    decode
        Token id -> its characters.
    prompt_length
        Key columns of the prompt.
    patches
        Column -> ``row,column`` of its patch in the picture's raster.
    texts
        The answer's tokens.
    """

    decode: Callable[[int], str]
    prompt_length: int
    patches: Mapping[int, str] = field(default_factory=dict)
    texts: Sequence[str] = ()

    def column(self, index: int) -> str:
        """Name a key column."""
        if index in self.patches:
            return f"patch {self.patches[index]}"
        fresh = index - self.prompt_length
        return f"token {fresh} {self.texts[fresh]!r}" if 0 <= fresh < len(self.texts) else f"prompt column {index}"

    def is_over_columns(self, value: Any, step: int) -> bool:
        """Whether a value has one entry per key column of its step."""
        return _is_list(value) and len(value) in (self.prompt_length + step, self.prompt_length) and _flat(value)


@dataclass(frozen=True)
class Section:
    """The account of one method: a head and rows of text.

    Parameters
    ----------
    method
        Key in the stack.
    columns, rows
        Text.
    """

    method: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(records: Iterable[Mapping[str, Any]], known: Known, *, every: bool = False) -> list[Section]:
    """Render records, method by method in the order of their first record.

    Parameters
    ----------
    records
        With ``method``, ``phase``, ``step``, ``layer`` and ``values`` of one sample.
    every
        One line per step and layer instead of one per step.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    return [_section(method, own, known, every) for method, own in by_method.items()]


def _section(method: str, records: Sequence[Mapping[str, Any]], known: Known, every: bool) -> Section:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["step"], record["phase"], record["layer"] if every else None)
        groups.setdefault(key, []).append(record)
    names = list(dict.fromkeys(name for record in records for name in record["values"]))
    parallel = _parallel(records)
    nested = [name for name in parallel if every and name != PLACE and _is_nested(records, name)]
    names = [name for name in names if name not in parallel or name in nested]
    rows = []
    for (step, phase, layer), members in groups.items():
        inside = 0 <= step < len(known.texts)
        token = repr(known.texts[step]) if inside and known.texts[step] else "end" if inside else ""
        cells = [_cell(name, members, known, step, every=every) for name in names]
        where = f"{step} {phase}" if phase not in ("prefill", "decode") else str(step)
        place = ("" if layer is None else str(layer),) if every else ()
        rows.append((where, token, *place, *cells))
    shown = [_title(name, parallel) for name in names]
    return Section(method, ("step", "token", *(("layer",) if every else ()), *shown), tuple(rows))


def _parallel(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of values that have one entry per candidate, which the candidates' own column shows."""
    found: dict[str, None] = {}
    for record in records:
        values = record["values"]
        candidates = values.get(CANDIDATES)
        if _is_list(candidates):
            same = (name for name, value in values.items() if _is_list(value) and len(value) == len(candidates))
            found |= dict.fromkeys(name for name in same if name != CANDIDATES)
            found |= dict.fromkeys(name for name in values if name == PLACE)
    return list(found)


def _is_nested(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether every candidate has a list of its own, such as a value per layer."""
    return any(not _flat(record["values"].get(name) or ()) for record in records)


def _title(name: str, parallel: Sequence[str]) -> str:
    if name != CANDIDATES or not parallel:
        return name.replace("_", " ")
    return "candidates (→ chosen)" if PLACE in parallel else name


def _cell(name: str, members: Sequence[Mapping[str, Any]], known: Known, step: int, *, every: bool) -> str:
    """Return one value of a step over its layers as text."""
    found = [(record["layer"], record["values"]) for record in members if name in record["values"]]
    if not found:
        return ""
    if name == CANDIDATES:
        return "\n".join(_candidates(values, known) for _, values in found)
    if len(found) == 1:
        return value_text(name, found[0][1][name], known, step)
    return _over_layers(name, [(layer, values[name]) for layer, values in found], known, step)


def value_text(name: str, value: Any, known: Known, step: int) -> str:
    """Return one value as text."""
    if not _is_list(value):
        return number(value)
    if name in INDEX_LISTS:
        return f"{len(set(value))} columns"
    if not value:
        return "none"
    if not _flat(value):
        return " | ".join(" ".join(map(number, item)) if _is_list(item) else number(item) for item in value)
    if _is_bool(value):
        return f"{sum(value)} of {len(value)}"
    if known.is_over_columns(value, step):
        numbers = [item if _defined(item) else -math.inf for item in value]
        best = max(range(len(numbers)), key=numbers.__getitem__)
        if not any(value):
            return "all 0"
        return f"most {number(value[best])} at {known.column(best)}"
    numbers = [float(item) for item in value if _defined(item)]
    return _range(numbers)


def _over_layers(name: str, found: Sequence[tuple[int | None, Any]], known: Known, step: int) -> str:
    values = [value for _, value in found]
    if all(isinstance(value, bool) for value in values):
        layers = [str(layer) for layer, value in found if value]
        return "layers " + ", ".join(layers) if layers else "none"
    if all(isinstance(value, int) for value in values):
        return " ".join(map(str, values))
    if all(not _is_list(value) for value in values):
        return _range([float(value) for value in values if _defined(value)])
    if all(_is_list(value) and _flat(value) for value in values):
        if all(_is_bool(value) for value in values):
            return f"{sum(map(sum, values))} of {sum(map(len, values))}"
        if not known.is_over_columns(values[0], step):
            return _range([float(item) for value in values for item in value if _defined(item)])
    return "; ".join(f"{layer}: {value_text(name, value, known, step)}" for layer, value in found)


def _candidates(values: Mapping[str, Any], known: Known) -> str:
    """Return the candidates of a step with what is known of each, the chosen one after an arrow."""
    tokens = values[CANDIDATES]
    lines = []
    for place, token in enumerate(tokens):
        parts = ["→" if values.get(PLACE) == place else "", repr(known.decode(int(token)))]
        for name, other in values.items():
            if name == CANDIDATES or not _is_list(other) or len(other) != len(tokens):
                continue
            item = other[place]
            if isinstance(item, bool):
                parts.append(name if item else "")
            elif not _is_list(item) and _defined(item):
                parts.append(f"{ABBREVIATED.get(name, name)} {number(item)}")
        lines.append(" ".join(part for part in parts if part))
    return " | ".join(lines)


def number(value: Any) -> str:
    """Return a number with three significant digits; a dash where it is undefined."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if not _defined(value):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _range(numbers: Sequence[float]) -> str:
    if not numbers:
        return "–"
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return number(mean) if number(low) == number(high) else f"{number(mean)} [{number(low)}, {number(high)}]"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _flat(value: Sequence[Any]) -> bool:
    return all(not _is_list(item) for item in value)


def _is_bool(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(item, bool) for item in value)


def _defined(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
