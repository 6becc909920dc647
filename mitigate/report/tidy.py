"""``report.csv``: every number of the comparison in a row of its own, for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = (
    "breakdown", "category", "stack", "baseline", "metric", "title", "unit", "higher_is_better",
    "value", "low", "high", "difference", "diff_low", "diff_high", "p", "p_holm", "effect_size", "mde",
    "n", "images", "failures", "seeds",
)  # fmt: skip

#: A cell that begins so is a formula to spreadsheets.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")


def tidy(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as CSV: stack by stack, metric by metric, then the breakdowns.

    Rates are in 0..1 (``unit`` is ``rate``), undefined numbers are empty.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in _rows(comparison):
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _rows(comparison: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for stack, data in comparison["stacks"].items():
        for name, interval in data["metrics"].items():
            yield {
                **_about(comparison, stack, name),
                **{key: interval[key] for key in ("value", "low", "high")},
                **_difference(data["differences"].get(name)),
                "n": comparison["n_samples"],
                "images": comparison["n_images"],
                "failures": data["failures"],
                "seeds": " ".join(map(str, data["seeds"])),
            }
    for breakdown, categories in comparison["breakdowns"].items():
        for category, numbers in categories.items():
            for stack, metrics in numbers["stacks"].items():
                for name, found in metrics.items():
                    yield {
                        **_about(comparison, stack, name),
                        "breakdown": breakdown,
                        "category": category,
                        "value": found["value"],
                        **_difference(found.get("difference")),
                        "n": numbers["n"],
                        "images": numbers["images"],
                    }


def _about(comparison: Mapping[str, Any], stack: str, name: str) -> dict[str, Any]:
    about = {"stack": stack, "baseline": comparison["baseline"], "metric": name}
    metric = comparison["metrics"].get(name)
    if metric is None:  # a share that only breakdowns have, such as that of wrong answers
        return {**about, "title": name, "unit": "rate", "higher_is_better": False}
    unit = "rate" if metric["percent"] else metric["unit"]
    return {**about, "title": metric["title"], "unit": unit, "higher_is_better": metric["higher_is_better"]}


def _difference(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return {}
    named = {"difference": "value", "diff_low": "low", "diff_high": "high"}
    tests = {key: key for key in ("p", "p_holm", "effect_size", "mde")}
    return {column: found.get(key) for column, key in {**named, **tests}.items()}


def _cell(value: object) -> str:
    """Return what stands in a cell: exact numbers, and texts that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if value in ("inf", "-inf"):
        return str(value)
    text = str(value).replace("\0", "")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
