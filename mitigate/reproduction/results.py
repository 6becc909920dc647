"""From finished comparisons to ``reproduction.json``: published beside measured, and a verdict for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mitigate.errors import DataError
from mitigate.jsonfiles import read_object, to_json, write_json
from mitigate.reproduction.verdicts import Measured, difference_verdict, sign_only, value_verdict

if TYPE_CHECKING:
    from mitigate.reproduction.planning import Job
    from mitigate.reproduction.tables import Cell, Column, Published

FILE: Final = "reproduction.json"
_UNDEFINED: Final = Measured(math.nan, math.nan, math.nan)


def result_of(job: Job, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Hold one comparison against its rows.

    Parameters
    ----------
    job
        What was compared.
    comparison
        Content of ``comparison.json``, with the vanilla row as baseline.

    Returns
    -------
    dict
        Plain JSON; undefined numbers ``None``.
    """
    published = job.published.models[job.model]
    return to_json(  # type: ignore[no-any-return]
        {
            "published_model": published.printed,
            "measured_model": comparison["model"],
            "benchmark": comparison["benchmark"]["name"],
            "protocol": job.protocol.name,
            "images": comparison["n_images"],
            "samples": comparison["n_samples"],
            "left_out": len(comparison["left_out"]),
            "vanilla": job.published.vanilla,
            "altered": list(job.altered),
            "other_model": job.other_model,
            "weights": job.weights,
            "cells": _cells(job, comparison),
        }
    )


def _cells(job: Job, comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, cells = job.rows, []
    for stack, row in rows.items():
        for column, cell in row.items():
            how = job.columns[column]
            base = rows.get(job.published.vanilla, {}).get(column) if stack != job.published.vanilla else None
            made = {
                "stack": stack,
                "row": job.published.names[stack],
                "column": column,
                "metric": how.metric,
                "decimals": how.decimals,
                "higher_is_better": _direction(comparison, how),
            }
            cells.append(made | _held_against(cell, base, how, comparison, stack, other=bool(job.other_model)))
    return cells


def _held_against(
    cell: Cell, base: Cell | None, how: Column, comparison: Mapping[str, Any], stack: str, *, other: bool
) -> dict[str, Any]:
    """Return a cell's published and measured numbers with their verdicts."""
    found = comparison["stacks"][stack]
    unit = 0.5 * 10.0**-how.decimals
    measured = _measured(found["metrics"].get(how.metric), how, comparison)
    entry: dict[str, Any] = {
        "published": cell.value,
        "note": cell.note,
        "measured": _plain(measured),
        "verdict": None if other else value_verdict(cell.value, measured, unit),
    }
    if base is not None:
        claimed = round(cell.value - base.value, how.decimals + 1)
        difference = _measured(found["differences"].get(how.metric), how, comparison, difference=True)
        entry["difference"] = {
            "published": claimed,
            "measured": _plain(difference),
            "verdict": sign_only(claimed, difference) if other else difference_verdict(claimed, difference, 2 * unit),
        }
    return entry


def _measured(
    found: Mapping[str, Any] | None, how: Column, comparison: Mapping[str, Any], *, difference: bool = False
) -> Measured:
    """Return a measured number in the published unit."""
    if found is None or any(found[key] is None for key in ("value", "low", "high")):
        return _UNDEFINED
    rate = comparison["metrics"][how.metric]["percent"]
    scale = how.scale if how.scale is not None else 100.0 if rate else 1.0
    value, low, high = (scale * float(found[key]) for key in ("value", "low", "high"))
    if not how.complement:
        return Measured(value, low, high)
    whole = 0.0 if difference else 100.0
    return Measured(whole - value, whole - high, whole - low)


def _plain(measured: Measured) -> dict[str, float]:
    return {"value": measured.value, "low": measured.low, "high": measured.high}


def _direction(comparison: Mapping[str, Any], how: Column) -> bool | None:
    better = comparison["metrics"][how.metric]["higher_is_better"]
    return None if better is None else bool(better) != how.complement


def merge_results(folder: Path, published: Published, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``reproduction.json`` of a table: these comparisons, and those of earlier commands that are still there.

    Parameters
    ----------
    folder
        Of the table; its comparisons lie below.
    published
        The table.
    results
        Folder of a comparison -> what `result_of` returns.

    Raises
    ------
    DataError
        If the file that is there cannot be read, or is of another table.
    """
    path = folder / FILE
    earlier: Mapping[str, Any] = {}
    if path.exists():
        before = read_object(path)
        if before.get("experiment") != published.name or not isinstance(before.get("comparisons"), dict):
            raise DataError(f"{path} is not of {published.name}; choose another folder with name=")
        earlier = {
            name: item for name, item in before["comparisons"].items() if (folder / name / "comparison.json").is_file()
        }
    data = {
        "experiment": published.name,
        "paper": published.paper,
        "arxiv": published.arxiv,
        "table": published.table,
        "notes": list(published.notes),
        "left_out": list(published.left_out),
        "comparisons": {**earlier, **results},
    }
    write_json(path, data)
    return data
