"""Every setting of a table's comparisons, with its value and where that is from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mitigate.compose.resolved import PLACES
from mitigate.compose.session import flatten

if TYPE_CHECKING:
    from mitigate.compose import ResolvedRun
    from mitigate.reproduction.planning import Job

#: Sections, and keys of others, that say what is asked and answered.
_SHOWN: Final = ("benchmark", "decoding", "methods", "model.path", "model.revision", "model.dtype", "seed")
_HIDDEN: Final = ("benchmark.name", *(f"benchmark.{place}" for place in PLACES))
COMMAND_LINE: Final = "command line"
DEFAULT: Final = "default"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting, over all comparisons with one protocol.

    Parameters
    ----------
    key
        Dotted configuration key.
    values
        Value -> the models and stacks that have it; without any where all have the same.
    origin
        ``paper``, ``code``, ``chosen``, ``command line``, or ``default``: the project's own, on which the table's
        experiment says nothing.
    why
        What the source says, or why this value was chosen.
    """

    key: str
    values: Mapping[str, tuple[str, ...]]
    origin: str
    why: str = ""

    @property
    def text(self) -> str:
        """Return the values as one line."""
        return "; ".join(f"{value} ({', '.join(where)})" if where else value for value, where in self.values.items())


def lines(jobs: Sequence[Job]) -> list[Line]:
    """Return every setting of comparisons with one protocol, the methods' last."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    given: set[str] = set()
    for job in jobs:
        for run in job.runs:
            for key, value in _shown(run):
                found.setdefault(key, {}).setdefault(_text(value), []).append((_model(run), run.stack_name))
                if run.provenance.get(key) == COMMAND_LINE:
                    given.add(key)
    made = []
    for key, values in found.items():
        holders = [holder for where in values.values() for holder in where]
        shown = {value: _where(where, holders) for value, where in values.items()}
        made.append(_line(key, shown, jobs, given))
    return sorted(made, key=lambda line: line.key.startswith("methods."))


def _line(key: str, shown: Mapping[str, tuple[str, ...]], jobs: Sequence[Job], given: set[str]) -> Line:
    setting = jobs[0].protocol.settings.get(key)
    if key in given:
        return Line(key=key, values=shown, origin=COMMAND_LINE)
    if setting is None:
        return Line(key=key, values=shown, origin=DEFAULT)
    origin, why = setting.origin, setting.why
    others = [job.model for job in jobs if setting.models and job.model not in setting.models]
    if others and len(others) == len(jobs):
        origin = "chosen"
    elif others:
        why = f"{why}; chosen for {', '.join(dict.fromkeys(others))}"
    return Line(key=key, values=shown, origin=origin, why=why)


def _shown(run: ResolvedRun) -> list[tuple[str, Any]]:
    flat = flatten(run.config)
    return [
        (key, value)
        for key, value in flat.items()
        if any(key == part or key.startswith(f"{part}.") for part in _SHOWN)
        and key not in _HIDDEN
        and not (key.startswith("methods") and (key == "methods" or key.endswith(".name")))
    ]


def _where(where: Sequence[tuple[str, str]], holders: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Name models, stacks, or both, whichever tells these holders of a value from all the others."""
    others = set(holders) - set(where)
    if not others:
        return ()
    for part in (0, 1):
        own = {holder[part] for holder in where}
        if not own & {holder[part] for holder in others}:
            return tuple(dict.fromkeys(holder[part] for holder in where))
    return tuple(dict.fromkeys(f"{model} {stack}" for model, stack in where))


def _model(run: ResolvedRun) -> str:
    return str(run.config["model"]["name"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
