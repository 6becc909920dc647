"""Hand finished results to a tracker; whatever happens there, the records are already on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mitigate.errors import DataError
from mitigate.jsonfiles import content_hash, read_json, write_json
from mitigate.records import sample_files
from mitigate.runner.sample_table import SampleTables
from mitigate.trackers.base import TrackedRun, Tracker
from mitigate.trackers.none import NoTracker

if TYPE_CHECKING:
    from pathlib import Path

    from mitigate.runner.stored import StoredRun

#: Files of a comparison, or of a single run, that are its report.
_REPORT = ("comparison.json", "report.html", "report.md", "report.csv", "report.tex")
_INFINITE = ("inf", "-inf")
#: Files of a run besides its samples.
_RECORDS = ("config.json", "record.json", "judgements.jsonl")


@dataclass
class Tracked:
    """What came of tracking.

    Parameters
    ----------
    lines
        For the user: where the runs are, or what failed.
    complete
        Whether everything is now where it should be.
    """

    lines: list[str] = field(default_factory=list)
    complete: bool = True


def track(
    tracker: Tracker,
    comparison: Mapping[str, Any],
    runs: Sequence[StoredRun],
    directory: Path,
    *,
    stacks: Collection[str] | None = None,
    force: bool = False,
    report: Callable[[str, str], None] | None = None,
) -> Tracked:
    """Log every stack as one run of one group; results that were logged before are not logged again.

    The first stack's run also gets the report. In a trial of a sweep everything belongs to one run, the last stack's.

    Parameters
    ----------
    tracker
        Where to log.
    comparison
        Content of ``comparison.json``.
    runs
        All runs of the comparison; those of one stack are logged as one.
    directory
        Folder of the comparison; ``tracked.json`` in it remembers what was logged where.
    stacks
        Log these only; ``None``: all.
    force
        Log also what was logged before.
    report
        Called with a stack and where it is now.

    Returns
    -------
    Tracked
        A tracker's failure is reported in it, never raised.
    """
    if isinstance(tracker, NoTracker):
        return Tracked()
    memory = directory / "tracked.json"
    tracked, lines = _remembered(memory)
    known, places = tracked.setdefault(tracker.destination, {}), []
    tables = SampleTables(runs, comparison["baseline"])
    groups = {stack: [run for run in runs if run.stack == stack] for stack in comparison["stacks"]}
    reporting = next(iter(groups))
    if tracker.trial:
        reporting = list(groups)[-1]
        stacks = [reporting]
    for stack, group in groups.items() if stacks is None else [(stack, groups[stack]) for stack in stacks]:
        folder = directory if stack == reporting else None
        digest = _digest(comparison, group, whole=folder is not None)
        if known.get(stack) == digest and not force:
            continue
        try:
            place = _log(tracker, comparison, group, tables, folder)
            if place is not None:
                places.append(place)
                known[stack] = digest
                write_json(memory, tracked)
                if report is not None:
                    report(stack, place)
        except KeyboardInterrupt:
            tracker.give_up()
            raise
        except Exception as error:  # whatever it is, the results are on disk and must stay usable
            tracker.give_up()
            reason = (str(error).splitlines() or ["no message"])[0]
            failure = (
                f"Tracking with {tracker.name} failed at stack {stack} ({type(error).__name__}: {reason}); "
                "all results are recorded, run the same command again to track them"
            )
            return Tracked([*lines, failure], complete=False)
    return Tracked([*lines, *_said(tracker.name, places, tables)])


def _log(
    tracker: Tracker,
    comparison: Mapping[str, Any],
    group: Sequence[StoredRun],
    tables: SampleTables,
    report: Path | None,
) -> str | None:
    """Log one stack; returns where it is."""
    stack, run = group[0].stack, _described(group, comparison, tracker.config.get("project"))
    tracker.start(run)
    tracker.log(flat_numbers(comparison, stack))
    tracker.table("samples", *tables.of(stack))
    tracker.artifact(_artifact_name("records", stack, run.id[:8]), "records", _records(group))
    if report is not None and (files := {name: report / name for name in _REPORT if (report / name).is_file()}):
        tracker.artifact(_artifact_name("report", str(comparison["name"])), "report", files)
    return tracker.finish()


def _records(group: Sequence[StoredRun]) -> dict[str, Path]:
    """Return the files of a stack's runs, in one folder per seed where there are several."""
    files: dict[str, Path] = {}
    for run in group:
        below = f"seed-{run.seed}/" if len(group) > 1 else ""
        there = [run.directory / name for name in _RECORDS if (run.directory / name).is_file()]
        files |= {f"{below}{path.name}": path for path in [*there, *sample_files(run.directory)]}
    return files


def _artifact_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))[:128]


def _digest(comparison: Mapping[str, Any], group: Sequence[StoredRun], *, whole: bool) -> str:
    """Return what changes when a stack must be logged again; with the report, when anything of the comparison does."""
    made = [run.record.created_at for run in group]
    return content_hash([made, comparison if whole else flat_numbers(comparison, group[0].stack)])


def _remembered(memory: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return what was tracked where, and a line if that cannot be known any more."""
    try:
        tracked = read_json(memory) if memory.exists() else {}
    except DataError:
        tracked = None
    if isinstance(tracked, dict) and all(isinstance(known, dict) for known in tracked.values()):
        return tracked, []
    return {}, [f"{memory} was damaged and is written anew: every stack is tracked again."]


def _described(group: Sequence[StoredRun], comparison: Mapping[str, Any], project: str | None) -> TrackedRun:
    first, record = group[0], group[0].record
    about = ("versions", "git", "data_hash", "prompt_hash", "weights", "created_at", "provenance")
    said = [f"! {line}." for kind in ("warnings", "notes") for line in comparison["stacks"][first.stack][kind]]
    return TrackedRun(
        # The same whenever this stack is tracked in this project, in whatever mode: a second try replaces the first.
        id=content_hash([project, comparison["name"], first.stack, [run.record.created_at for run in group]])[:16],
        name=first.stack,
        group=comparison["name"],
        config={
            **record.config,
            "stack": first.stack,
            "seeds": [run.seed for run in group],
            **{key: getattr(record, key) for key in about},
        },
        notes=" ".join([*comparison["notes"], *said]),
    )


def _said(name: str, places: Sequence[str], tables: SampleTables) -> list[str]:
    if not places:
        return []
    lines = [f"Tracked with {name}: {len(places)} run{'s' if len(places) > 1 else ''} in {places[0].rsplit('/', 1)[0]}"]
    if tables.missing:
        many = f"{tables.missing} pictures" if tables.missing > 1 else "1 picture"
        lines.append(f"{many} could not be opened here and cannot be shown in the sample tables")
    return lines


def flat_numbers(comparison: Mapping[str, Any], stack: str) -> dict[str, float]:
    """Return a stack's results as ``name -> number``; undefined ones are left out.

    A metric is ``NAME``, ``NAME/low``, ``NAME/high``; its difference to the baseline ``difference/NAME`` with
    ``/low``, ``/high``, ``/p``, ``/p_holm``, ``/mde`` and whatever else belongs to it.
    """
    results = comparison["stacks"][stack]
    flat: dict[str, Any] = {key: comparison[key] for key in ("n_images", "n_samples")}
    flat["failures"] = results.get("failures", 0)
    for kind, prefix in (("metrics", ""), ("differences", "difference/")):
        for name, parts in results[kind].items():
            kept = {"" if key == "value" else f"/{key}": part for key, part in parts.items() if key != "undefined"}
            flat |= {f"{prefix}{name}{end}": part for end, part in kept.items()}
    for kind, values in (
        ("mcnemar", results["mcnemar"] or {}),
        ("effect", results["effects"]),
        ("cost", results["cost"]),
    ):
        flat |= {f"{kind}/{key}": value for key, value in values.items()}
    flat |= {f"cost/seconds/{method}": seconds for method, seconds in results["cost"]["method_seconds"].items()}
    for method, counters in results["effects"]["methods"].items():
        flat |= {f"telemetry/{method}/{counter}": value for counter, value in counters.items()}
    # an infinite number is text in JSON
    return {key: float(value) for key, value in flat.items() if isinstance(value, int | float) or value in _INFINITE}
