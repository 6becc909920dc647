"""Hand a diagnostic's result to a tracker; whatever happens there, everything is already on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mitigate.diagnostics.base import Diagnostic, Estimate, Findings, Table
from mitigate.errors import DataError
from mitigate.jsonfiles import content_hash, read_json, write_json
from mitigate.trackers.base import TrackedRun, Tracker

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun


def track(
    tracker: Tracker,
    resolved: ResolvedRun,
    diagnostic: Diagnostic,
    summary: Mapping[str, Any],
    findings: Findings,
    figures: Sequence[Path],
    folder: Path,
) -> list[str]:
    """Log numbers, tables and figures as one run; what was logged before is not logged again.

    Returns
    -------
    list of str
        Lines for the user: where the run is, or what failed. A tracker's failure is reported, never raised.
    """
    memory = folder / "tracked.json"
    destination = f"{tracker.name} {tracker.config.get('mode')} {tracker.config.get('project')}"
    numbers = flat_numbers(findings)
    shown = {name: value if value == value else None for name, value in numbers.items()}
    digest = content_hash([summary["created_at"], summary["parameters"], shown, list(summary["figures"])])
    known = _remembered(memory)
    if known.get(destination) == digest:
        return []
    try:
        tracker.start(_described(resolved, diagnostic, summary, findings, folder, destination))
        tracker.log(numbers)
        for table in findings.tables:
            columns, cells = expanded(table)
            tracker.table(f"{diagnostic.name}/{table.name}", columns, cells)
        tracker.table(f"{diagnostic.name}/figures", ("figure", "picture"), _pictures(figures))
        place = tracker.finish()
        if place is None:
            return []
        write_json(memory, {**known, destination: digest})
        return [f"Tracked with {tracker.name}: {place}"]
    except Exception as error:  # whatever it is, the results are on disk and must stay usable
        tracker.give_up()
        reason = (str(error).splitlines() or ["no message"])[0]
        return [
            f"Tracking with {tracker.name} failed ({type(error).__name__}: {reason}); "
            "all results are recorded, run the same command again to track them"
        ]


def flat_numbers(findings: Findings) -> dict[str, float]:
    """Return the headline numbers as ``name -> number``, with interval, n and p beside each."""
    flat: dict[str, float] = {}
    for name, estimate in findings.numbers.items():
        flat |= {name: estimate.value, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
        flat[f"{name}/n"] = float(estimate.n)
        if estimate.p is not None:
            flat[f"{name}/p"] = estimate.p
    return flat


def _described(
    resolved: ResolvedRun,
    diagnostic: Diagnostic,
    summary: Mapping[str, Any],
    findings: Findings,
    folder: Path,
    destination: str,
) -> TrackedRun:
    about = {key: summary[key] for key in ("versions", "git", "data_hash", "weights", "parameters")}
    return TrackedRun(
        id=content_hash([destination, folder.name, summary["created_at"]])[:16],
        name=f"{diagnostic.name}-{resolved.stack_name}",
        group=folder.name,
        config={**resolved.config, **about},
        tags=("diagnostic", diagnostic.name),
        notes=" ".join(findings.notes),
    )


def _pictures(figures: Sequence[Path]) -> list[list[Any]]:
    from PIL import Image

    rows = []
    for path in figures:
        with Image.open(path) as picture:
            rows.append([path.stem, picture.convert("RGB")])
    return rows


def expanded(table: Table) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of plain cells: an estimate takes five columns, its value and what supports it."""
    wide = [any(isinstance(row[place], Estimate) for row in table.rows) for place in range(len(table.columns))]
    parts = ("low", "high", "n", "p")
    columns: list[str] = []
    for column, several in zip(table.columns, wide, strict=True):
        columns += [column, *(f"{column}: {part}" for part in parts if several)]
    rows = []
    for row in table.rows:
        cells: list[Any] = []
        for cell, several in zip(row, wide, strict=True):
            estimate = isinstance(cell, Estimate)
            cells.append(cell.value if estimate else cell)
            cells += [getattr(cell, part) if estimate else None for part in parts if several]
        rows.append(cells)
    return columns, rows


def _remembered(memory: Path) -> dict[str, str]:
    try:
        tracked = read_json(memory) if memory.exists() else {}
    except DataError:
        return {}
    return tracked if isinstance(tracked, dict) else {}
