"""Where a report's numbers come from: settings, seeds, software, data, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigate.report.samples import AnsweredRun

#: Where a value came from if nobody chose it.
_UNCHOSEN = ("default",)


@dataclass(frozen=True)
class Part:
    """A titled list of facts."""

    title: str
    facts: list[tuple[str, str]]


def judges_of(runs: Sequence[AnsweredRun]) -> dict[str, list[str]]:
    """Return the names under which judges answered, by stack; stacks that no judge graded are left out."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for record in run.answers.values():
            if "judge" in record.meta:
                found.setdefault(run.stack, set()).add(str(record.meta["judge"]))
    return {stack: sorted(names) for stack, names in found.items()}


def provenance(
    comparison: Mapping[str, Any], command: str = "", judges: Mapping[str, Sequence[str]] | None = None
) -> list[Part]:
    """Return what is the same for all stacks, then what belongs to each.

    Parameters
    ----------
    comparison
        Content of ``comparison.json``.
    command
        Command line that made the report.
    judges
        As `judges_of` finds them.
    """
    benchmark = comparison["benchmark"]
    facts = [("command", command)] if command else []
    facts += [
        ("model", comparison["model"]),
        ("benchmark", f"{benchmark['name']}, version {benchmark['version']}"),
        *(
            (f"benchmark.{key}", _text(value))
            for key, value in benchmark.items()
            if key not in ("name", "version") and value is not None
        ),
        ("seed of bootstrap and choice", str(comparison["seed"])),
        ("data (sha256)", comparison["data_hash"]),
        ("prompts (sha256)", comparison["prompt_hash"]),
    ]
    return [
        Part("All stacks", facts),
        *(_of_stack(name, data, (judges or {}).get(name, ())) for name, data in comparison["stacks"].items()),
    ]


def _of_stack(name: str, data: Mapping[str, Any], judges: Sequence[str]) -> Part:
    record = data["record"]
    sha = record["git"].get("sha")
    dirty = " (with uncommitted changes)" if sha and record["git"].get("dirty") else ""
    facts = [("run created", record["created_at"])]
    if data.get("seeds"):
        facts.append(("seeds", ", ".join(map(str, data["seeds"]))))
    if judges:
        facts.append(("judged by", ", ".join(judges)))
    if record.get("weights"):
        facts.append(("weights", record["weights"]))
    facts.append(("commit", f"{sha}{dirty}" if sha else "not run from a checkout"))
    facts += [(package, version) for package, version in record["versions"].items()]
    for method, parameters in data["methods"].items():
        for key, value in parameters.items():
            origin = data["provenance"].get(f"methods.{method}.{key}")
            facts.append((f"methods.{method}.{key}", _text(value) + (f" ({origin})" if origin else "")))
    chosen = [
        f"{key} ({origin})"
        for key, origin in data["provenance"].items()
        if origin not in _UNCHOSEN and not key.startswith("methods.")
    ]
    if chosen:
        facts.append(("settings that are no defaults", ", ".join(chosen)))
    return Part(name, facts)


def config_text(comparison: Mapping[str, Any]) -> str:
    """Return the configuration that all stacks share, as JSON."""
    return json.dumps(comparison["config"], indent=2, ensure_ascii=False)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
