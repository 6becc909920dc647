"""Hand finished results to a tracker; whatever happens there, the records are already on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mitigate.errors import DataError
from mitigate.jsonfiles import content_hash, read_json, write_json
from mitigate.report.examples import Example, hallucinated
from mitigate.trackers.base import TrackedRun, Tracker

if TYPE_CHECKING:
    from pathlib import Path

    from mitigate.compose import ResolvedRun
    from mitigate.records import RunRecord

SAMPLE_COLUMNS = ("picture", "sample", "task", "prompt", "reply", "hallucinated")


def track(
    tracker: Tracker,
    comparison: Mapping[str, Any],
    resolved: Sequence[ResolvedRun],
    records: Mapping[str, RunRecord],
    examples: Sequence[Example],
    directory: Path,
) -> list[str]:
    """Log every stack as one run of one group; results that were logged before are not logged again.

    Parameters
    ----------
    tracker
        Where to log.
    comparison
        Content of ``comparison.json``.
    resolved, records
        The stacks' runs and records.
    examples
        Pictures for the sample table.
    directory
        Folder of the comparison; ``tracked.json`` in it remembers what was logged where.

    Returns
    -------
    list of str
        Lines for the user: where the runs are, or what failed. A tracker's failure is reported, never raised.
    """
    memory = directory / "tracked.json"
    destination = f"{tracker.name} {tracker.config.get('mode')} {tracker.config.get('project')}"
    tracked, lines = _remembered(memory)
    known, places = tracked.setdefault(destination, {}), []
    for item in resolved:
        stack = item.stack_name
        numbers = flat_numbers(comparison["stacks"][stack])
        digest = content_hash([records[stack].created_at, numbers])
        if known.get(stack) == digest:
            continue
        try:
            tracker.start(_described(item, records[stack], comparison, destination))
            tracker.log(numbers)
            tracker.table("samples", SAMPLE_COLUMNS, sample_rows(stack, examples))
            place = tracker.finish()
            if place is not None:
                places.append(place)
                known[stack] = digest
                write_json(memory, tracked)
        except Exception as error:  # whatever it is, the results are on disk and must stay usable
            tracker.give_up()
            reason = (str(error).splitlines() or ["no message"])[0]
            return [
                *lines,
                f"Tracking with {tracker.name} failed at stack {stack} ({type(error).__name__}: {reason}); "
                "all results are recorded, run the same command again to track them",
            ]
    return [*lines, _say(tracker.name, places)] if places else lines


def _remembered(memory: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return what was tracked where, and a line if that cannot be known any more."""
    try:
        tracked = read_json(memory) if memory.exists() else {}
    except DataError:
        tracked = None
    if isinstance(tracked, dict) and all(isinstance(known, dict) for known in tracked.values()):
        return tracked, []
    return {}, [f"{memory} was damaged and is written anew: every stack is tracked again."]


def _described(item: ResolvedRun, record: RunRecord, comparison: Mapping[str, Any], destination: str) -> TrackedRun:
    return TrackedRun(
        # The same whenever this stack is tracked there: a second try replaces the first one.
        id=content_hash([destination, comparison["name"], item.stack_name, record.created_at])[:16],
        name=item.stack_name,
        group=comparison["name"],
        config={**item.config, "versions": record.versions, "git": record.git, "data_hash": record.data_hash},
        notes=" ".join(comparison["notes"]),
    )


def _say(name: str, places: Sequence[str]) -> str:
    return f"Tracked with {name}: {len(places)} run{'s' if len(places) > 1 else ''} in {places[0].rsplit('/', 1)[0]}"


def flat_numbers(stack: Mapping[str, Any]) -> dict[str, float]:
    """Return a stack's results as ``name -> number``; undefined ones are left out."""
    flat: dict[str, float | None] = {}
    for kind, prefix in (("metrics", ""), ("differences", "difference/")):
        for name, interval in stack[kind].items():
            flat[f"{prefix}{name}"] = interval["value"]
            flat |= {f"{prefix}{name}/{end}": interval[end] for end in ("low", "high")}
    flat |= {f"effect/{key}": value for key, value in stack["effects"].items() if isinstance(value, int | float)}
    flat |= {f"cost/{key}": value for key, value in stack["cost"].items() if isinstance(value, int | float)}
    for method, counters in stack["effects"]["methods"].items():
        flat |= {f"telemetry/{method}/{counter}": value for counter, value in counters.items()}
    return {key: float(value) for key, value in flat.items() if isinstance(value, int | float)}


def sample_rows(stack: str, examples: Sequence[Example]) -> list[list[Any]]:
    """Return the example samples of a stack: picture, id, task, prompt, reply, what it hallucinated."""
    return [
        [
            example.pictures[0] if example.pictures else None,
            entry.sample.id,
            entry.sample.task,
            entry.sample.prompt,
            "".join(span.text for span in entry.spans[stack]),
            ", ".join(span.text for span in hallucinated(entry.spans[stack])),
        ]
        for example in examples
        for entry in example.entries
    ]
